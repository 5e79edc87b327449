"""Programs that measure and print one JSON document: `llmmix eval NAME`."""
