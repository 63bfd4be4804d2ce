"""Measures the model of a finished run and logs the figures to it: `evaluate_run`, and `one_shot_of_run` for one-shot detection."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.experiments.load import absolute_uri, with_absolute_paths
from orchestrator.tracking.addresses import run_address
from orchestrator.tracking.header import dataset_label
from orchestrator.tracking.lookup import find_run, open_tracking
from orchestrator.tracking.models.logged_model import Weights, fetch_weights
from orchestrator.tracking.run_metrics import log_once
from workloads.config import apply_overrides, build, parse_overrides, read_yaml, to_dict
from workloads.data.store.manifest import open_dataset
from workloads.errors import ConfigError
from workloads.metrics.names import MetricName
from workloads.parallel.runtime import LocalRuntime

if TYPE_CHECKING:
    from orchestrator.tracking.types import MlflowClient, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """What was measured and logged."""

    run_id: str
    address: str
    metrics: Mapping[str, float]  # under the keys in MLflow
    headline: Mapping[str, float]  # the same without the dataset in the keys
    artifacts: str  # folder of the heatmaps and tables among the artifacts of the run


def evaluate_run(
    run: str, arguments: Sequence[str] = (), *, data: str | None = None, tracking_uri: str | None = None
) -> EvaluationResult:
    """Evaluate the model of `run` (id or name) and log metrics, heatmaps and tables to it.

    On the run's own evaluation set, the keys are those of training, `eval/…`; on another, `eval/on_<its name>/…`.

    Raises:
        ConfigError: no such run, it has no model, no dataset is given, or a key is unknown.
        DataError: there is no dataset.
        TrackingError: the run has other figures at this step.
    """
    client = open_tracking(tracking_uri)
    target = find_run(client, run)
    with tempfile.TemporaryDirectory() as folder:
        weights = weights_of(client, target, Path(folder))
        figures, dataset = _measure(weights, arguments, data, Path(folder, "output"))
        return _log(client, target, weights, figures, dataset, Path(folder, "output", "artifacts"), shown="heatmaps")


def one_shot_of_run(
    run: str, arguments: Sequence[str] = (), *, data: str, tracking_uri: str | None = None
) -> EvaluationResult:
    """Measure one-shot detection of the model of `run` on the dataset `data`, and log metrics, table and gallery to it.

    Raises:
        ConfigError: no such run, it has no model, or a key is unknown.
        DataError: there is no dataset, or it has no objects.
        TrackingError: the run has other figures at this step.
    """
    from workloads.evaluation.one_shot import OneShotRunConfig, one_shot

    client = open_tracking(tracking_uri)
    target = find_run(client, run)
    values = apply_overrides({"uri": data}, parse_overrides(arguments))
    settings = with_absolute_paths(build(OneShotRunConfig, values))
    with tempfile.TemporaryDirectory() as folder:
        weights = weights_of(client, target, Path(folder))
        with LocalRuntime(Path(folder, "output"), interruptible=True) as runtime:
            figures = one_shot(weights.checkpoint, settings, runtime)
        artifacts = Path(folder, "output", "artifacts")
        return _log(client, target, weights, figures, _label_of(settings.uri), artifacts, shown="gallery")


def weights_of(client: "MlflowClient", run: "Run", folder: Path) -> Weights:
    """The newest complete model of `run`, downloaded below `folder`.

    Raises:
        ConfigError: the run has no model.
    """
    weights = fetch_weights(run.info.run_id, client=client, folder=folder)
    if weights is None:
        raise ConfigError(
            f"run {run.info.run_name} has no model; let its training end (the same command continues it), "
            "with tracking.log_model=true"
        )
    return weights


def _measure(
    weights: Weights, arguments: Sequence[str], data: str | None, output: Path
) -> tuple[dict[str, float], str | None]:
    """The figures, and the label of the dataset unless it is the run's own evaluation set."""
    from workloads.loops.dispatch import build_loop, evaluate_loop
    from workloads.storage.checkpoint import CONFIG

    trained = build_loop(read_yaml(weights.checkpoint / CONFIG))
    overrides = parse_overrides(arguments)
    data = overrides.pop("data.uri", data)  # accepted as an alias of --data
    run = with_absolute_paths(build_loop(apply_overrides(to_dict(trained), overrides)))
    uri = absolute_uri(data) if data else run.evaluation.uri
    probe = getattr(run.evaluation, "representation", None)
    labelled = probe.train_uri if probe is not None else None
    if uri is None and labelled is None:
        raise ConfigError("--data: needed, because the run was trained without an evaluation set")
    settings = build_loop(apply_overrides(to_dict(run), {"evaluation.uri": uri}))
    with LocalRuntime(output, interruptible=True) as runtime:
        figures = evaluate_loop(weights.checkpoint, settings, runtime)
    is_own = uri == trained.evaluation.uri and run.evaluation == trained.evaluation
    figures = {key: value for key, value in figures.items() if key.startswith("eval/")}
    return figures, None if is_own else _label_of(uri or labelled or "")


def _label_of(uri: str) -> str:
    return f"{dataset_label(uri)}-{open_dataset(uri).manifest.sha256[:8]}"


def _log(
    client: "MlflowClient",
    run: "Run",
    weights: Weights,
    figures: Mapping[str, float],
    dataset: str | None,
    artifacts: Path,
    *,
    shown: str,
) -> EvaluationResult:
    """Log figures and artifacts to `run`; `shown` is the folder of the artifacts that the result names."""
    metrics = {str(MetricName.parse(key).on(dataset)): value for key, value in figures.items()}
    log_once(client, run.info.run_id, metrics, step=weights.step)
    below = "" if dataset is None else f"/on_{dataset}"
    for kind in sorted(artifacts.iterdir()) if artifacts.is_dir() else ():
        client.log_artifacts(run.info.run_id, str(kind), f"{kind.name}{below}")
    address = run_address(client.tracking_uri, run.info.experiment_id, run.info.run_id)
    return EvaluationResult(
        run_id=run.info.run_id, address=address, metrics=metrics, headline=figures, artifacts=f"{shown}{below}"
    )
