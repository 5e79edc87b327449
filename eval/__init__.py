"""Programs that measure, print a table and write one JSON document: `llmmix eval NAME`."""
