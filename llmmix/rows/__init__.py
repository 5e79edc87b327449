"""Rows: found by name, read from files of any shape, and turned into tokens."""
