"""`python -m workloads`: trains, evaluates and exports without Ray and MLflow, in one process or under torchrun.

It uses argparse, because typer is not among the core dependencies: this must run where only torch and its companions are.
torch is imported inside the commands, so that a wrong command line is answered at once.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from workloads.config import apply_overrides, build, describe, parse_overrides, read_yaml, to_dict
from workloads.errors import DataError, RequestError, RunFailedError, UserError

if TYPE_CHECKING:
    from workloads.parallel.runtime import LocalRuntime

_LOG = logging.getLogger("workloads")
_DESCRIPTION = (
    "Pretrain, fine-tune and evaluate without Ray and MLflow. Under torchrun, every process takes its share of the global batch. "
    "Results: OUTPUT/metrics.jsonl, OUTPUT/checkpoints, OUTPUT/artifacts. Exit codes: 0 done, 1 the run failed, 2 the request "
    "was wrong."
)

Options = argparse.Namespace
Overrides = dict[str, object]


@dataclass(frozen=True, slots=True)
class _Command:
    """A subcommand: what runs it, its help text, and the default of its --output folder."""

    run: Callable[[Options, Overrides], None]
    help: str
    output: str | None
    checkpoint: str | None = None  # help text of its first argument, if that is a checkpoint
    keys: str | None = None  # help text of its key=value arguments, if it has any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 done, 1 the run failed, 2 the request was wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    # argparse accepts positional arguments in one group only; users write key=value after options too.
    if unknown := [other for other in others if other.startswith("-") or "=" not in other]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        _COMMANDS[options.command].run(options, parse_overrides([*getattr(options, "overrides", []), *others]))
    except UserError as error:
        _LOG.error("%s", error)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workloads", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name, help=command.help) for name, command in _COMMANDS.items()}
    for name in ("train", "finetune"):
        sections = "its scaling, tracking, storage and failure sections are ignored"
        parsers[name].add_argument("experiment", type=Path, help=f"YAML file; {sections}")
    for name, command in _COMMANDS.items():
        if command.checkpoint is not None:
            parsers[name].add_argument("checkpoint", type=Path, help=command.checkpoint)
        if command.keys is not None:
            parsers[name].add_argument("overrides", nargs="*", metavar="key=value", help=command.keys)
        if command.output is not None:
            parsers[name].add_argument(
                "--output", type=Path, default=Path(command.output), help="folder of the results (default: %(default)s)"
            )
    parsers["export"].add_argument(
        "--format", action="append", help="format to write; may be given again (default: all)"
    )
    parsers["export"].add_argument("--licence", help="licence to state in the model card")
    parsers["compare"].add_argument(
        "runs", nargs="+", type=Path, help="output folders of `train`, evaluated by the same protocol"
    )
    parsers["keys"].add_argument("loop", nargs="?", default="pretrain", help="pretrain (the default) or finetune")
    return parser


def _train(options: Options, overrides: Overrides) -> None:
    from workloads.loops.dispatch import load_loop, preflight, run_loop

    settings = load_loop(options.experiment, overrides, loop="pretrain" if options.command == "train" else "finetune")
    with _runtime(options.output, interruptible=False) as runtime:
        preflight(settings, runtime.world_size)
        try:
            run_loop(settings, runtime)
        except DataError as error:  # found under a run that had begun, which is no longer a wrong request
            raise RunFailedError(str(error)) from error


def _evaluate(options: Options, overrides: Overrides) -> None:
    from workloads.loops.dispatch import build_loop, evaluate_loop

    run = build_loop(read_yaml(_config_of(options.checkpoint)))
    settings = apply_overrides(to_dict(run), {f"evaluation.{key}": value for key, value in overrides.items()})
    with _runtime(options.output) as runtime:
        evaluate_loop(options.checkpoint, build_loop(settings), runtime)


def _one_shot(options: Options, overrides: Overrides) -> None:
    from workloads.evaluation.one_shot import OneShotRunConfig, one_shot

    settings = build(OneShotRunConfig, apply_overrides({}, overrides))
    _config_of(options.checkpoint)
    with _runtime(options.output) as runtime:
        one_shot(options.checkpoint, settings, runtime)


def _discover(options: Options, overrides: Overrides) -> None:
    if "uri" not in overrides:
        raise RequestError("uri: give a dataset, as uri=FOLDER")
    from workloads.loops.discovery.job import DiscoverConfig
    from workloads.loops.discovery.loop import discover

    settings = build(DiscoverConfig, apply_overrides({}, overrides))
    with _runtime(options.output) as runtime:
        discover(settings, runtime, str(options.output))


def _export(options: Options, overrides: Overrides) -> None:
    if overrides:
        raise RequestError(f"{next(iter(overrides))}: `export` has no keys, only options")
    _config_of(options.checkpoint)
    from workloads.serving.export import FORMATS, export_checkpoint

    if unknown := set(options.format or ()) - set(FORMATS):
        raise RequestError(f"--format {min(unknown)}: give one of {', '.join(FORMATS)}")
    formats = tuple(name for name in FORMATS if not options.format or name in options.format)
    files = export_checkpoint(
        options.checkpoint, formats, options.output, title=options.output.name, source={}, licence=options.licence
    )
    for purpose, file in files.items():
        sys.stdout.write(f"{purpose:<20} {file}\n")


def _compare(options: Options, overrides: Overrides) -> None:
    from workloads.evaluation import compare as comparison

    rows = comparison.compare([comparison.read_run(run) for run in options.runs])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "comparison.md").write_text(comparison.table(rows), encoding="utf-8")
    comparison.draw(rows, options.output / "comparison.png")
    sys.stdout.write(comparison.table(rows))


def _keys(options: Options, overrides: Overrides) -> None:
    from workloads.loops.dispatch import LOOPS

    if options.loop not in LOOPS:
        raise RequestError(f"keys {options.loop}: give one of {', '.join(LOOPS)}")
    for key, default, help_text in describe(LOOPS[options.loop]):
        sys.stdout.write(f"{key}  [{default}]\n    {help_text}\n")


def _runtime(output: Path, *, interruptible: bool = True) -> "LocalRuntime":
    """A runtime that prints to the terminal; without `interruptible`, SIGTERM asks for a checkpoint before the end."""
    from workloads.parallel.runtime import LocalRuntime

    return LocalRuntime(output, stream=sys.stdout, interruptible=interruptible)


def _config_of(checkpoint: Path) -> Path:
    """The config file of a checkpoint.

    Raises:
        RequestError: the folder is not a checkpoint.
    """
    from workloads.storage.checkpoint import CONFIG

    if not (checkpoint / CONFIG).is_file():
        raise RequestError(f"{checkpoint}: is no checkpoint; give a folder below OUTPUT/checkpoints")
    return checkpoint / CONFIG


_CHECKPOINT = "folder below OUTPUT/checkpoints"
_COMMANDS = {
    "train": _Command(
        _train,
        "pretrain: run or continue an experiment",
        "runs/local",
        keys="dotted keys, as objective.temperature=0.2",
    ),
    "finetune": _Command(
        _train,
        "fine-tune a detector: run or continue an experiment",
        "runs/local",
        keys="dotted keys, as optimizer.lr=1e-4",
    ),
    "evaluate": _Command(
        _evaluate,
        "evaluate a checkpoint as its loop does",
        "runs/evaluation",
        _CHECKPOINT,
        "evaluation keys, as uri=DATASET",
    ),
    "discover": _Command(
        _discover,
        "find one object in each image, and measure CorLoc where objects are annotated",
        "runs/discovery",
        keys="uri=DATASET, methods, trunk.kind …",
    ),
    "one-shot": _Command(
        _one_shot,
        "find an object in other images by a checkpoint's embeddings",
        "runs/one_shot",
        _CHECKPOINT,
        "uri=DATASET and other keys of the evaluation",
    ),
    "export": _Command(
        _export, "export a checkpoint's trunk for torchvision, timm, ONNX and others", "exported", _CHECKPOINT
    ),
    "compare": _Command(
        _compare, "compare pretraining runs in a table and curves; the first run is the baseline", "comparison"
    ),
    "keys": _Command(_keys, "list every key of an experiment file with its default and meaning", None),
}


if __name__ == "__main__":
    sys.exit(main())
