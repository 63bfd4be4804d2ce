"""`orchestrator demo`: from nothing to a compared model in minutes, on one machine, without any service or download."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.demo.scenes import Split, write_scenes
from orchestrator.experiments.load import load_experiment
from orchestrator.training.run import train
from orchestrator.training.session import Stopwatch, TrainOutcome

TRAIN_SCENES, HELDOUT_SCENES = 600, 128
_COUNTS: dict[Split, int] = {"train": TRAIN_SCENES, "heldout": HELDOUT_SCENES}
_SWEEP_COUNTS: dict[Split, int] = {"train": 160, "heldout": 32}
_SELECTED = 0.2  # of the sweep's training scenes, by which trials are ranked


def run_demo(output: str, overrides: Sequence[str], *, began: float, console: Any, debug: bool) -> None:
    """Draw scenes, shard them, pretrain, evaluate on scenes that were not seen, and print what was found.

    Raises:
        ConfigError: an override is wrong.
        TrainingError: the training failed.
    """
    root = Path(output).absolute()
    given = [f"data.uri={root}/train", f"evaluation.uri={root}/heldout", f"storage.path={root}/runs"]
    taken = {argument.partition("=")[0] for argument in overrides}
    arguments = [argument for argument in given if argument.partition("=")[0] not in taken] + list(overrides)
    experiment = load_experiment("demo", arguments)
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


def run_sweep_demo(output: str, overrides: Sequence[str], *, console: Any, debug: bool) -> None:
    """Draw fewer scenes, sweep three knobs over a handful of trials of seconds each; all of its state lies below `output`.

    Raises:
        ConfigError: an override is wrong.
        SweepError: no trial ended well.
    """
    from orchestrator.experiments.load import load_sweep
    from orchestrator.runs.identity import open_storage
    from orchestrator.sweeps.run import show_sweep, sweep, sweep_name

    root = Path(output).absolute()
    given = {
        "data.uri": root / "train" / "train",
        "sweep.selection_uri": root / "train" / "val",  # scenes like the training ones, none of which is trained on
        "evaluation.uri": root / "heldout",
        "storage.path": root,
        "tracking.uri": f"sqlite:///{root}/mlflow.db",
    }
    taken = {argument.partition("=")[0] for argument in overrides}
    experiment = load_sweep("demo_sweep", [f"{k}={v}" for k, v in given.items() if k not in taken] + list(overrides))
    for split, count in _SWEEP_COUNTS.items():
        _make_dataset(root, split, count, console=console, val_share=_SELECTED if split == "train" else 0.0)
    filesystem, path = open_storage(experiment.storage.path)
    begun = filesystem.get_file_info(f"{path}/{sweep_name(experiment)}/run.json").is_file
    show_sweep(sweep(experiment, console=console, resume=begun, debug=debug), console=console)


def _make_dataset(root: Path, split: Split, count: int, *, console: Any, val_share: float = 0.0) -> None:
    """Draw and shard one split; scenes are a function of the code, so a finished dataset is taken as it is."""
    from orchestrator.datasets.build import build_parts
    from workloads.data.build.shards import BuildConfig
    from workloads.data.build.sources import FolderSourceConfig
    from workloads.data.store.manifest import MANIFEST_NAME

    if (root / split / ("train" if val_share else "") / MANIFEST_NAME).is_file():
        console.print(f"{split}: {root / split} is there already", highlight=False, soft_wrap=True)
        return
    write_scenes(root / "images" / split, split=split, count=count)
    source = FolderSourceConfig(inputs=(str(root / "images" / split),))
    for part, made in build_parts(BuildConfig(source=source, output=str(root / split), val_share=val_share)).items():
        line = f"{made.num_images} scenes in {len(made.shards)} shards, manifest {made.sha256[:12]}…"
        console.print(f"{split}{f'/{part}' if part else ''}: {line}", highlight=False)


def show_figures(metrics: Mapping[str, float], *, console: Any) -> None:
    """A table of both suites: the model, and what a model must beat."""
    from rich.table import Table

    table = Table(title="held-out scenes: is the crop found where it was taken?", title_justify="left")
    for column, justify in (("", "left"), ("plain", "right"), ("photometric", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows = (
        ("SGA, the trained model", "sga", "{:.1%}"),
        ("RIGA, untrained networks", "riga", "{:.1%}"),
        ("GAP-R = SGA / RIGA", "gap_r", "{:.1f}"),
        ("pixel, colour statistics, learns nothing", "pixel", "{:.1%}"),
        ("chance", "chance", "{:.1%}"),
    )
    for title, key, form in rows:
        values = [metrics.get(prefix + key) for prefix in ("eval/", "eval/photometric/")]
        table.add_row(title, *("–" if value is None else form.format(value) for value in values))
    console.print(table)


def newest_heatmap(outcome: TrainOutcome) -> str:
    """The path of the newest heatmap of the plain suite."""
    found = sorted(Path(outcome.run.folder, "artifacts").glob("step_*/heatmaps/plain*.png"))
    return str(found[-1]) if found else "none was drawn"
