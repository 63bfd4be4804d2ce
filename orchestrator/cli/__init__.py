"""The `orchestrator` command: its subcommands, help texts, tables, error messages and exit codes."""
