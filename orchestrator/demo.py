"""`orchestrator demo`: from nothing to a compared model in minutes, on one machine, without any service or download."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.load import load_experiment
from orchestrator.scenes import Split, write_scenes
from orchestrator.train import Stopwatch, TrainOutcome, train

TRAIN_SCENES, HELDOUT_SCENES = 600, 128
_COUNTS: dict[Split, int] = {"train": TRAIN_SCENES, "heldout": HELDOUT_SCENES}


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


def _make_dataset(root: Path, split: Split, count: int, *, console: Any) -> None:
    """Draw and shard one split; scenes are a function of the code, so a finished dataset is taken as it is."""
    from orchestrator.ingest import build_dataset
    from workloads.data.manifest import MANIFEST_NAME
    from workloads.data.shards import BuildConfig
    from workloads.data.sources import FolderSourceConfig

    if (root / split / MANIFEST_NAME).is_file():
        console.print(f"{split}: {root / split} is there already", highlight=False, soft_wrap=True)
        return
    write_scenes(root / "images" / split, split=split, count=count)
    source = FolderSourceConfig(inputs=(str(root / "images" / split),))
    manifest = build_dataset(BuildConfig(source=source, output=str(root / split)))
    line = f"{split}: {manifest.num_images} scenes in {len(manifest.shards)} shards, manifest {manifest.sha256[:12]}…"
    console.print(line, highlight=False)


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
