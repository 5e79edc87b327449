"""Below `llmmix.cli`: flags, YAML, mistakes told in one line, and how a script runs."""
