"""One script and one YAML of the same stem a method: `llmmix run NAME`."""
