"""`python -m workloads`: the same loops without Ray and MLflow, on one process or under torchrun."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from workloads.config import apply_overrides, build, describe, parse_overrides, read_yaml, to_dict
from workloads.discovery.components import FeaturesError
from workloads.errors import ConfigError, DataError, RunStoppedError
from workloads.evaluation.one_shot import OneShotRunConfig, one_shot
from workloads.loops.discovery.finish import DiscoveryError
from workloads.loops.discovery.job import DiscoverConfig
from workloads.loops.discovery.loop import discover
from workloads.loops.dispatch import LOOPS, build_loop, evaluate_loop, load_loop, preflight, run_loop
from workloads.loops.meter import NonFiniteLossError
from workloads.parallel.runtime import LocalRuntime
from workloads.serving.export import FORMATS, ExportError, export_checkpoint
from workloads.storage.checkpoint import CONFIG, CheckpointError
from workloads.storage.checkpoint_writer import CheckpointWriteError

_LOG = logging.getLogger("workloads")
_FAILURES = (
    NonFiniteLossError,
    RunStoppedError,
    CheckpointWriteError,
    DiscoveryError,
    FeaturesError,
    ExportError,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workloads",
        description="Pretrain, fine-tune and evaluate without Ray and MLflow. Under torchrun, every process takes its share of the "
        "global batch. Results: OUTPUT/metrics.jsonl, OUTPUT/checkpoints, OUTPUT/artifacts.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("train", "pretrain"), ("finetune", "fine-tune a detector")):
        train = commands.add_parser(name, help=f"{what}: run or continue an experiment file")
        train.add_argument(
            "experiment", type=Path, help="YAML file; its scaling, tracking and storage sections are skipped"
        )
        train.add_argument(
            "overrides", nargs="*", metavar="key=value", help="dotted keys, as objective.temperature=0.2"
        )
        train.add_argument(
            "--output", type=Path, default=Path("runs/local"), help="folder of the run (default: %(default)s)"
        )
    measure = commands.add_parser("evaluate", help="measure a checkpoint on a dataset, as its loop does")
    measure.add_argument("checkpoint", type=Path, help="a folder below OUTPUT/checkpoints")
    measure.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the evaluation section, as uri=…")
    measure.add_argument(
        "--output", type=Path, default=Path("runs/evaluation"), help="folder for the figures and heatmaps"
    )
    look = commands.add_parser("discover", help="find one object an image, and measure CorLoc where objects are known")
    look.add_argument("overrides", nargs="*", metavar="key=value", help="uri=DATASET, methods, trunk.kind …")
    look.add_argument("--output", type=Path, default=Path("runs/discovery"), help="folder for boxes and figures")
    shot = commands.add_parser("one-shot", help="look for one object in other images with a checkpoint's embeddings")
    shot.add_argument("checkpoint", type=Path, help="a folder below OUTPUT/checkpoints of a pretraining run")
    shot.add_argument(
        "overrides", nargs="*", metavar="key=value", help="uri=DATASET, and other keys of the measurement"
    )
    shot.add_argument(
        "--output", type=Path, default=Path("runs/one_shot"), help="folder for the figures and the gallery"
    )
    out = commands.add_parser("export", help="write a checkpoint's trunk for torchvision, timm, ONNX and others")
    out.add_argument("checkpoint", type=Path, help="a folder below OUTPUT/checkpoints")
    out.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    out.add_argument("--format", action="append", choices=FORMATS, help="may be given again (default: all)")
    out.add_argument("--licence", help="what the model card says of the licence")
    out.add_argument("--output", type=Path, default=Path("exported"), help="folder of the files (default: %(default)s)")
    side = commands.add_parser(
        "compare", help="put pretraining runs side by side: table, curves, computing; the first is the baseline"
    )
    side.add_argument("runs", nargs="+", type=Path, help="output folders of `train`, measured by the same protocol")
    side.set_defaults(overrides=[])
    side.add_argument(
        "--output", type=Path, default=Path("comparison"), help="folder of the files (default: %(default)s)"
    )
    keys = commands.add_parser("keys", help="list every key of an experiment file, its default and its meaning")
    keys.add_argument("loop", nargs="?", default="pretrain", choices=LOOPS, help="which loop (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 done, 1 the run failed, 2 the request was wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    # argparse takes positionals in one run only; people put key=value after options too.
    if unknown := [other for other in others if other.startswith("-") or "=" not in other]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if options.command == "keys":
            for key, default, help_text in describe(LOOPS[options.loop]):
                sys.stdout.write(f"{key}  [{default}]\n    {help_text}\n")
            return 0
        overrides = parse_overrides([*options.overrides, *others])
        if options.command == "export":
            return _export(options)
        if options.command == "compare":
            return _compare(options)
        others_than_training = {"evaluate": _evaluate, "one-shot": _one_shot, "discover": _discover}
        return others_than_training.get(options.command, _train)(options, overrides)
    except _FAILURES as error:
        _LOG.error("%s", error)
        return 1
    except (ConfigError, DataError, CheckpointError) as error:
        _LOG.error("%s", error)
        return 2


def _train(options: argparse.Namespace, overrides: dict[str, object]) -> int:
    loop = "pretrain" if options.command == "train" else options.command
    settings = load_loop(options.experiment, overrides, loop=loop)
    runtime = LocalRuntime(options.output, stream=sys.stdout)
    try:
        preflight(settings, runtime.world_size)
        try:
            run_loop(settings, runtime)
        except DataError as error:  # after preflight, the data broke under a run that had begun
            _LOG.error("%s", error)
            return 1
    finally:
        runtime.close()
    return 0


def _evaluate(options: argparse.Namespace, overrides: dict[str, object]) -> int:
    run = build_loop(read_yaml(options.checkpoint / CONFIG))
    settings = apply_overrides(to_dict(run), {f"evaluation.{key}": value for key, value in overrides.items()})
    with LocalRuntime(options.output, stream=sys.stdout, interruptible=True) as runtime:
        evaluate_loop(options.checkpoint, build_loop(settings), runtime)
    return 0


def _export(options: argparse.Namespace) -> int:
    files = export_checkpoint(
        options.checkpoint,
        tuple(options.format or FORMATS),
        options.output,
        title=options.output.name,
        source={},
        licence=options.licence,
    )
    for purpose, file in files.items():
        sys.stdout.write(f"{purpose:<20} {file}\n")
    return 0


def _one_shot(options: argparse.Namespace, overrides: dict[str, object]) -> int:
    settings = build(OneShotRunConfig, apply_overrides({}, overrides))
    with LocalRuntime(options.output, stream=sys.stdout, interruptible=True) as runtime:
        one_shot(options.checkpoint, settings, runtime)
    return 0


def _discover(options: argparse.Namespace, overrides: dict[str, object]) -> int:
    if "uri" not in overrides:
        raise ConfigError("uri: name the dataset to look at, as uri=FOLDER")
    settings = build(DiscoverConfig, apply_overrides({}, overrides))
    with LocalRuntime(options.output, stream=sys.stdout, interruptible=True) as runtime:
        discover(settings, runtime, str(options.output))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from workloads.evaluation import compare as comparison

    rows = comparison.compare([comparison.read_run(run) for run in options.runs])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "comparison.md").write_text(comparison.table(rows), encoding="utf-8")
    comparison.draw(rows, options.output / "comparison.png")
    sys.stdout.write(comparison.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
