"""The typer applications that the command modules add their commands to."""

import typer

_HELP = "Pretrain, compare and use detector backbones. Exit codes: 0 done, 1 the run failed, 2 the request was wrong."

# torch, Ray and MLflow are imported inside the commands: `--help` and a mistyped name must not wait for them.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=_HELP)
data_app = typer.Typer(no_args_is_help=True, help="Make, check and describe datasets of Parquet shards.")
