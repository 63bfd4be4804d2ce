"""Runs the demo (`run_demo`, `run_sweep_demo`): draws scenes, shards them, pretrains, evaluates, and prints a table; no download."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.demo.scenes import Split, write_scenes
from orchestrator.experiments.load import load_experiment
from orchestrator.training.run import train
from orchestrator.training.session import Stopwatch, TrainOutcome

if TYPE_CHECKING:
    from rich.console import Console

TRAIN_SCENES, HELDOUT_SCENES = 600, 128
_COUNTS: dict[Split, int] = {"train": TRAIN_SCENES, "heldout": HELDOUT_SCENES}
_SWEEP_COUNTS: dict[Split, int] = {"train": 160, "heldout": 32}
_SELECTION_SHARE = 0.2  # of the sweep's training scenes, set aside to rank trials


def run_demo(output: str, overrides: Sequence[str], *, began: float, console: "Console", debug: bool) -> None:
    """Draw scenes, shard them, pretrain, evaluate on held-out scenes, and print the figures.

    Raises:
        ConfigError: an override is wrong.
        TrainingError: the training failed.
    """
    root = Path(output).absolute()
    places = {"data.uri": f"{root}/train", "evaluation.uri": f"{root}/heldout", "storage.path": f"{root}/runs"}
    experiment = load_experiment("demo", _with_defaults(places, overrides))
    for split, count in _COUNTS.items():
        _make_dataset(root, split, count, console=console)
    console.print(f"pretraining {experiment.steps} steps on {TRAIN_SCENES} scenes …", highlight=False)
    started = time.time()
    outcome = train(experiment, console=console, watch=Stopwatch(began), debug=debug)
    console.print(f"trained and evaluated in {time.time() - started:.0f} s\n", highlight=False)
    show_figures(outcome.metrics, console=console)
    heatmap = newest_heatmap(outcome)
    console.print(f"\nheatmap  {heatmap}", highlight=False, soft_wrap=True)
    console.print(f"look     {outcome.address}", highlight=False, soft_wrap=True)
    console.print(f"run      {outcome.run_id} ({outcome.run.name})", highlight=False, soft_wrap=True)


def run_sweep_demo(output: str, overrides: Sequence[str], *, console: "Console", debug: bool) -> None:
    """Draw fewer scenes and run a sweep of a few short trials over three keys; all files are written below `output`.

    Raises:
        ConfigError: an override is wrong.
        SweepError: no trial ended well.
    """
    from orchestrator.experiments.load import load_sweep
    from orchestrator.runs.identity import open_storage
    from orchestrator.sweeps.run import show_sweep, sweep, sweep_name

    root = Path(output).absolute()
    places = {
        "data.uri": f"{root}/train/train",
        "sweep.selection_uri": f"{root}/train/val",  # drawn like the training scenes, but not trained on
        "evaluation.uri": f"{root}/heldout",
        "storage.path": str(root),
        "tracking.uri": f"sqlite:///{root}/mlflow.db",
    }
    experiment = load_sweep("demo_sweep", _with_defaults(places, overrides))
    for split, count in _SWEEP_COUNTS.items():
        _make_dataset(root, split, count, console=console, val_share=_SELECTION_SHARE if split == "train" else 0.0)
    filesystem, path = open_storage(experiment.storage.path)
    has_begun = filesystem.get_file_info(f"{path}/{sweep_name(experiment)}/run.json").is_file
    show_sweep(sweep(experiment, console=console, resume=has_begun, debug=debug), console=console)


def _with_defaults(defaults: Mapping[str, str], overrides: Sequence[str]) -> list[str]:
    """`overrides`, and before them those defaults that they do not set."""
    given = {argument.partition("=")[0] for argument in overrides}
    return [f"{key}={value}" for key, value in defaults.items() if key not in given] + list(overrides)


def _make_dataset(root: Path, split: Split, count: int, *, console: "Console", val_share: float = 0.0) -> None:
    """Draw and shard one split, unless it is there: the code determines the scenes, so a finished dataset is the same."""
    from orchestrator.datasets.build import build_parts
    from workloads.data.build.shards import BuildConfig
    from workloads.data.build.sources import FolderSourceConfig
    from workloads.data.store.manifest import MANIFEST_NAME

    if (root / split / ("train" if val_share else "") / MANIFEST_NAME).is_file():
        console.print(f"{split}: {root / split} exists", highlight=False, soft_wrap=True)
        return
    write_scenes(root / "images" / split, split=split, count=count)
    source = FolderSourceConfig(inputs=(str(root / "images" / split),))
    parts = build_parts(BuildConfig(source=source, output=str(root / split), val_share=val_share))
    for part, manifest in parts.items():
        line = f"{manifest.num_images} scenes in {len(manifest.shards)} shards, manifest {manifest.sha256[:12]}…"
        console.print(f"{split}{f'/{part}' if part else ''}: {line}", highlight=False)


def show_figures(metrics: Mapping[str, float], *, console: "Console") -> None:
    """Print the figures of both suites: those of the model, and the baselines that it must beat."""
    from rich.table import Table

    table = Table(title="held-out scenes: is a crop found where it was taken?", title_justify="left")
    for column, justify in (("", "left"), ("plain", "right"), ("photometric", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows = (
        ("SGA, the trained model", "sga", "{:.1%}"),
        ("SGA by the strict rule", "sga_strict", "{:.1%}"),
        ("RIGA, untrained networks", "riga", "{:.1%}"),
        ("GAP-R = SGA / RIGA", "gap_r", "{:.1f}"),
        ("pixel, the colour-statistics baseline", "pixel", "{:.1%}"),
        ("chance", "chance", "{:.1%}"),
    )
    for title, key, form in rows:
        values = [metrics.get(prefix + key) for prefix in ("eval/", "eval/photometric/")]
        table.add_row(title, *("–" if value is None else form.format(value) for value in values))
    console.print(table)


def newest_heatmap(outcome: TrainOutcome) -> str:
    """The path of the newest heatmap of the plain suite."""
    paths = sorted(Path(outcome.run.folder, "artifacts").glob("step_*/heatmaps/plain*.png"))
    return str(paths[-1]) if paths else "none was drawn"
