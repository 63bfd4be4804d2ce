"""Promotes a run's model (`promote`): registers it as a version of a model in MLflow and moves an alias to it; `roll_back` undoes it.

A promotion requires that every gate holds. If the alias already names a version, it also requires a paired gain over that
version, above 0 beyond its interval, on the same crops of the same images. The alias is moved last, so a promotion that is
killed changes nothing that anybody loads.
"""

import json
import operator
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.results.evaluate import weights_of
from orchestrator.tracking.lookup import find_run, open_tracking
from orchestrator.tracking.models.registry import register_model, version_at
from workloads.config import build
from workloads.errors import ConfigError, RunFailedError
from workloads.evaluation.tables import hits_of
from workloads.metrics.grid_accuracy import GridAccuracyConfig, paired_difference

if TYPE_CHECKING:
    from orchestrator.tracking.types import MlflowClient, ModelVersion, Run

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_LINEAGE = (
    "data.manifest_sha256",
    "config.sha256",
    "mlflow.source.git.commit",
    "git.uncommitted_changes",
    "ray.job_id",
)
_PREVIOUS, _ROLLED_BACK = "promotion.previous", "promotion.rolled_back"


class PromotionRefusedError(RunFailedError):
    """The model is not promoted; the message lists the reasons. `force` overrules them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A condition on a metric of the model's own step."""

    metric: str
    sign: str
    bound: float

    def failure(self, figures: Mapping[str, float]) -> str | None:
        """Why the gate does not hold, or None."""
        if self.metric not in figures:
            return f"{self} cannot be checked: the run has no {self.metric} at the step of its model"
        value = figures[self.metric]
        return None if _OPERATORS[self.sign](value, self.bound) else f"{self} does not hold: it is {value:.4f}"

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Paired difference of the hits of two models on the same crops, with its 95 % interval over images."""

    suite: str
    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.suite} {100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A promotion that was done."""

    model: str
    version: str
    alias: str
    previous: str | None  # version that had the alias
    run_id: str
    gains: Sequence[Gain]
    overruled: Sequence[str]  # reasons against it, overruled by `force`

    def lines(self) -> list[str]:
        """A summary for the terminal."""
        lines = [f"models:/{self.model}@{self.alias} is now version {self.version} (run {self.run_id})"]
        if self.previous:
            gains = "; ".join(map(str, self.gains)) or "not measured"
            lines.append(f"it was version {self.previous}; paired gain: {gains}")
        return lines + [f"forced, although {reason}" for reason in self.overruled]


def parse_gate(text: str) -> Gate:
    """Parse a gate such as `eval/sga >= 0.45`.

    Raises:
        ConfigError: `text` is not METRIC SIGN NUMBER.
    """
    match = re.fullmatch(r"\s*([A-Za-z][\w./@-]*)\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", text)
    if match is None:
        raise ConfigError(f"--gate {text!r}: expected METRIC >= NUMBER (or >, <, <=), as in 'eval/sga >= 0.45'")
    metric, sign, bound = match.groups()
    try:
        return Gate(metric=metric, sign=sign, bound=float(bound))
    except ValueError:
        raise ConfigError(f"--gate {text!r}: {bound} is not a number") from None


def promote(
    target: str,
    *,
    gates: Sequence[Gate],
    alias: str = "champion",
    model: str | None = None,
    force: bool = False,
    tracking_uri: str | None = None,
) -> Promotion:
    """Register the model of a run, or of the winner of a sweep, and move `alias` of the registered model to it.

    Args:
        model: name in the registry; by default that of the experiment.

    Raises:
        ConfigError: no such run, or it has no model.
        PromotionRefusedError: there is a reason against it, and `force` is false.
    """
    client = open_tracking(tracking_uri)
    run = _resolve(client, target)
    candidate = _Candidate.newest(client, run)
    name = model or run.data.params.get("name") or run.info.run_name
    champion = version_at(client, name, alias)
    if champion is not None and _model_id(champion) == candidate.model_id:
        raise PromotionRefusedError(
            f"{name}@{alias} is already the model of run {run.info.run_name} (version {champion.version})"
        )
    reasons, gains = _judge(client, candidate, gates, champion)
    if reasons and not force:
        raise PromotionRefusedError(f"run {run.info.run_name} is not promoted: " + "; ".join(reasons))
    tags = {"promotion.gates": "; ".join(map(str, gates)), "promotion.gain": "; ".join(map(str, gains))}
    if reasons:
        tags["promotion.forced_over"] = "; ".join(reasons)
    if champion is not None:
        tags[_PREVIOUS] = str(champion.version)
    version = _register(client, name, candidate, tags)
    client.set_registered_model_alias(name, alias, version)
    return Promotion(
        model=name,
        version=version,
        alias=alias,
        previous=str(champion.version) if champion is not None else None,
        run_id=run.info.run_id,
        gains=gains,
        overruled=reasons,
    )


def _judge(
    client: "MlflowClient", candidate: "_Candidate", gates: Sequence[Gate], champion: "ModelVersion | None"
) -> tuple[list[str], list[Gain]]:
    """The reasons against a promotion, and the gains over the version that has the alias."""
    reasons = [why for gate in gates if (why := gate.failure(candidate.figures))]
    if champion is None:
        return reasons, []
    try:
        gains = paired_gains(client, candidate, _Candidate.of_version(client, champion))
    except PromotionRefusedError as error:
        return [*reasons, str(error)], []
    reasons += [
        f"the paired gain over version {champion.version} is not above 0 beyond its interval: {gain}"
        for gain in gains
        if gain.low <= 0
    ]
    return reasons, gains


def roll_back(model: str, *, alias: str = "champion", tracking_uri: str | None = None) -> tuple[str, str]:
    """Move `alias` back to the version that had it before; returns (old version, new version).

    Raises:
        ConfigError: there is no such model or alias, or no version had the alias before.
    """
    client = open_tracking(tracking_uri)
    current = version_at(client, model, alias)
    if current is None:
        raise ConfigError(f"--model {model}: no registered model of this name has the alias {alias}")
    previous = current.tags.get(_PREVIOUS)
    if not previous:
        raise ConfigError(f"{model}@{alias} is version {current.version}, and no version had the alias before it")
    client.set_registered_model_alias(model, alias, previous)
    client.set_model_version_tag(
        model, current.version, _ROLLED_BACK, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    )
    return str(current.version), str(previous)


def _resolve(client: "MlflowClient", target: str) -> "Run":
    """The run of this id or name, or, of a sweep, the final run of its winner."""
    run = find_run(client, target)
    if run.data.tags.get("sweep.stage") != "sweep":
        return run
    winner = run.data.tags.get("sweep.winner_run")
    if winner is None:
        raise ConfigError(
            f"{target}: this sweep has no winner at full length (it has not ended, or sweep.final_seeds was 0); "
            "promote one of its runs"
        )
    return find_run(client, winner)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A model of a run, and the figures at its step."""

    run: "Run"
    model_id: str
    step: int
    figures: Mapping[str, float]

    @classmethod
    def newest(cls, client: "MlflowClient", run: "Run") -> "_Candidate":
        """The newest model of `run` that is complete.

        Raises:
            ConfigError: the run has no model.
        """
        with tempfile.TemporaryDirectory() as folder:
            weights = weights_of(client, run, Path(folder))
        return cls._of(client, run, weights.model_id, weights.step)

    @classmethod
    def of_version(cls, client: "MlflowClient", version: "ModelVersion") -> "_Candidate":
        """The model of a registered version.

        Raises:
            PromotionRefusedError: the version is of no run, or of one without models.
        """
        run = client.get_run(version.run_id) if version.run_id else None
        models = run.outputs.model_outputs if run is not None and run.outputs else []
        steps = {model.model_id: model.step for model in models}
        model_id = _model_id(version)
        if run is None or model_id not in steps:
            raise PromotionRefusedError(
                f"version {version.version} has no model that a run logged, so there is no paired gain"
            )
        return cls._of(client, run, model_id, steps[model_id])

    @classmethod
    def _of(cls, client: "MlflowClient", run: "Run", model_id: str, step: int) -> "_Candidate":
        figures = {}
        for key, latest in run.data.metrics.items():
            if key.startswith("eval/"):
                history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, key)}
                # A metric that only the last evaluation has, as RIGA, does not depend on the step.
                figures[key] = history.get(step, latest)
        return cls(run=run, model_id=model_id, step=step, figures=figures)


def _model_id(version: "ModelVersion") -> str | None:
    """The LoggedModel of a registered version; MLflow gives it in the source alone to those that look by alias."""
    source = version.source or ""
    return version.model_id or (source.removeprefix("models:/") if source.startswith("models:/m-") else None)


def paired_gains(client: "MlflowClient", ours: _Candidate, theirs: _Candidate) -> list[Gain]:
    """The gains of `ours` over `theirs`, one for each suite.

    Raises:
        PromotionRefusedError: the two were not measured on the same crops.
    """
    (our_record, our_hits), (their_record, their_hits) = (_evaluation(client, one) for one in (ours, theirs))
    for what in ("dataset_manifest_sha256", "protocol_sha256"):
        if our_record[what] != their_record[what]:
            raise PromotionRefusedError(
                f"it and run {theirs.run.info.run_name} were measured differently ({what} differs), so there is no paired "
                "gain; train or evaluate both with the same evaluation.uri and protocol"
            )
    protocol = build(GridAccuracyConfig, our_record["protocol"])
    return [
        Gain(suite=suite, difference=difference, low=low, high=high)
        for suite in our_hits
        for difference, low, high in [paired_difference(our_hits[suite], their_hits[suite], protocol)]
    ]


def _evaluation(client: "MlflowClient", candidate: _Candidate) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    stem = f"report/grid_accuracy_step_{candidate.step:07d}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            record = Path(client.download_artifacts(candidate.run.info.run_id, f"{stem}.json", folder))
            hits = Path(client.download_artifacts(candidate.run.info.run_id, f"{stem}.npz", folder))
        except Exception as error:
            raise PromotionRefusedError(
                f"run {candidate.run.info.run_name} has no evaluation of its step {candidate.step} ({type(error).__name__})"
            ) from None
        return json.loads(record.read_text()), hits_of(hits.read_bytes())


def _register(client: "MlflowClient", name: str, candidate: _Candidate, tags: Mapping[str, str]) -> str:
    """Register the model, unless a promotion that was killed has; tag the version with its lineage; returns its number."""
    run = candidate.run
    lineage = {key: run.data.tags[key] for key in _LINEAGE if key in run.data.tags}
    measured = {key: f"{value:.6g}" for key, value in candidate.figures.items() if _is_headline(key)}
    tags = {**lineage, **measured, "run.name": run.info.run_name, "run.step": str(candidate.step), **tags}
    return register_model(client, name, model_id=candidate.model_id, run_id=run.info.run_id, tags=tags)


def _is_headline(key: str) -> bool:
    return (
        re.fullmatch(
            r"eval/(photometric/)?(sga|gap_r|gain|riga)(_strict)?(_low|_high)?|eval/(photometric/)?(pixel|chance)(_strict)?",
            key,
        )
        is not None
    )
