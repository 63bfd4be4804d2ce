"""`orchestrator evaluate`: measure a run's model on a dataset and add the figures to the run."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.tracking.addresses import run_address
from orchestrator.tracking.header import dataset_label
from orchestrator.tracking.lookup import find_run, open_tracking
from orchestrator.tracking.model import fetch_weights
from orchestrator.tracking.run_metrics import log_once
from workloads.config import apply_overrides, build, parse_overrides, read_yaml, to_dict
from workloads.errors import ConfigError, RunFailedError


class EvaluationError(RunFailedError):
    """The run has no model that could be evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """What was measured, under the keys it was logged by."""

    run_id: str
    address: str
    metrics: Mapping[str, float]
    headline: Mapping[str, float]  # the same without the dataset's name in the keys
    artifacts: str  # folder of the heatmaps and tables among the run's artifacts


def evaluate_run(
    run: str, arguments: Sequence[str] = (), *, data: str | None = None, tracking_uri: str | None = None
) -> EvaluationResult:
    """Evaluate the model of `run` (id or name) and log eval/*, heatmaps and tables to it.

    On the run's own evaluation set the keys are those of training, `eval/…`; on another, `eval/on_<its name>/…`.

    Raises:
        ConfigError: no such run, no dataset given, or an unknown key.
        DataError: no dataset there.
        EvaluationError: the run has no model yet.
        TrackingError: the run has other figures at this step.
    """
    client = open_tracking(tracking_uri)
    found = find_run(client, run)
    run_id = found.info.run_id
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = fetch_weights(run_id, client=client, folder=Path(folder))
        if checkpoint is None:
            raise EvaluationError(f"run {run} has no model yet; let its training end (the same command continues it)")
        figures, prefix, step, output = _measure(checkpoint, arguments, data, Path(folder, "output"))
        metrics = {key.replace("eval/", prefix, 1): value for key, value in figures.items()}
        log_once(client, run_id, metrics, step=step)
        place = None if prefix == "eval/" else prefix.removeprefix("eval/").rstrip("/")
        _log_artifacts(client, run_id, output / "artifacts", place)
    address = run_address(client.tracking_uri, found.info.experiment_id, run_id)
    heatmaps = "heatmaps" if place is None else f"heatmaps/{place}"
    return EvaluationResult(run_id=run_id, address=address, metrics=metrics, headline=figures, artifacts=heatmaps)


def one_shot_of_run(
    run: str, arguments: Sequence[str] = (), *, data: str, tracking_uri: str | None = None
) -> EvaluationResult:
    """Measure one-shot detection of the model of `run` on the dataset `data` and log figures, table and gallery to it.

    Raises:
        ConfigError: no such run, or an unknown key.
        DataError: no dataset there, or one without objects.
        EvaluationError: the run has no model yet.
        TrackingError: the run has other figures at this step.
    """
    from orchestrator.experiments.load import absolute_uri
    from workloads.data.store.manifest import open_dataset
    from workloads.evaluation.one_shot import OneShotRunConfig, one_shot
    from workloads.parallel.runtime import LocalRuntime
    from workloads.storage.checkpoint import read_meta

    client = open_tracking(tracking_uri)
    found = find_run(client, run)
    uri = absolute_uri(data)
    settings = build(OneShotRunConfig, apply_overrides({"uri": uri}, parse_overrides(arguments)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = fetch_weights(found.info.run_id, client=client, folder=Path(folder))
        if checkpoint is None:
            raise EvaluationError(f"run {run} has no model yet; let its training end (the same command continues it)")
        with LocalRuntime(Path(folder, "output"), interruptible=True) as runtime:
            figures = one_shot(checkpoint, settings, runtime)
        label = f"{dataset_label(uri)}-{open_dataset(uri).manifest.sha256[:8]}"
        metrics = {key.replace("eval/", f"eval/on_{label}/", 1): value for key, value in figures.items()}
        log_once(client, found.info.run_id, metrics, step=read_meta(str(checkpoint)).step)
        _log_artifacts(client, found.info.run_id, Path(folder, "output", "artifacts"), f"on_{label}")
    address = run_address(client.tracking_uri, found.info.experiment_id, found.info.run_id)
    return EvaluationResult(
        run_id=found.info.run_id, address=address, metrics=metrics, headline=figures, artifacts=f"gallery/on_{label}"
    )


def _measure(
    checkpoint: Path, arguments: Sequence[str], data: str | None, output: Path
) -> tuple[dict[str, float], str, int, Path]:
    """Figures, key prefix, step, and the folder that holds `artifacts/`."""
    from orchestrator.experiments.load import absolute_uri
    from workloads.data.store.manifest import open_dataset
    from workloads.loops.dispatch import build_loop, evaluate_loop
    from workloads.parallel.runtime import LocalRuntime
    from workloads.storage.checkpoint import CONFIG, read_meta

    trained = build_loop(read_yaml(checkpoint / CONFIG))
    given = parse_overrides(arguments)
    if "data.uri" in given:  # the spelling of --data
        data = given.pop("data.uri")
    run = build_loop(apply_overrides(to_dict(trained), given))
    settings = run.evaluation
    uri = absolute_uri(data) if data else settings.uri
    probe = getattr(settings, "representation", None)
    labelled = probe.train_uri if probe is not None else None
    if uri is None and labelled is None:
        raise ConfigError("--data: needed, because the run was trained without an evaluation set")
    step = read_meta(str(checkpoint)).step
    on_these = build_loop(apply_overrides(to_dict(run), {"evaluation.uri": uri}))
    with LocalRuntime(output, interruptible=True) as runtime:
        figures = evaluate_loop(checkpoint, on_these, runtime)
    figures = {key: value for key, value in figures.items() if key.startswith("eval/")}
    is_own = uri == trained.evaluation.uri and settings == trained.evaluation
    named = uri or labelled or ""
    label = f"{dataset_label(named)}-{open_dataset(named).manifest.sha256[:8]}"
    return figures, "eval/" if is_own else f"eval/on_{label}/", step, output


def _log_artifacts(client: Any, run_id: str, folder: Path, place: str | None) -> None:
    for kind in sorted(folder.iterdir()) if folder.is_dir() else ():
        client.log_artifacts(run_id, str(kind), kind.name if place is None else f"{kind.name}/{place}")
