"""The `sparseflow` command: one thin file a subcommand."""
