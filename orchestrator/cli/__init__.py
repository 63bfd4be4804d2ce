"""The command line: words, tables, exit codes."""
