"""The command `luthier`. Each subcommand is a module with `HELP`, `add_arguments(parser)` and `run(args) -> exit code`.

Nothing heavy is imported before `run`, so that `--help` and mistakes in a config answer at once.
"""
