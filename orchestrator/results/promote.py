"""`orchestrator promote`: a run's best model becomes a registered version, and an alias moves to it, for a stated reason.

A promotion needs every gate to hold and, where the alias already stands somewhere, a paired gain over the model there that is
above 0 beyond its interval, on the same crops of the same images. Aliases are moved last: a killed promotion changes nothing
that anybody loads.
"""

import json
import operator
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.tracking.lookup import find_run, open_tracking
from orchestrator.tracking.registry import register_model, version_at
from workloads.config import build
from workloads.errors import ConfigError, RunFailedError
from workloads.evaluation.tables import hits_of
from workloads.metrics.grid_accuracy import GridAccuracyConfig, paired_difference

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
    """The model is not promoted; the message lists the reasons."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A condition on a metric of the model's own step."""

    metric: str
    sign: str
    bound: float

    def failure(self, figures: Mapping[str, float]) -> str | None:
        """Why it does not hold, or None."""
        if self.metric not in figures:
            return f"{self} cannot be judged: the run has no {self.metric} at the model's step"
        value = figures[self.metric]
        return None if _OPERATORS[self.sign](value, self.bound) else f"{self} does not hold: it is {value:.4f}"

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Paired difference of two models' hits on the same crops, with its 95 % interval over images."""

    suite: str
    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.suite} {100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """What was done."""

    model: str
    version: str
    alias: str
    previous: str | None  # version that had the alias
    run_id: str
    gains: Sequence[Gain]
    overruled: Sequence[str]  # reasons against it, with --force

    def lines(self) -> list[str]:
        """For people."""
        told = [f"models:/{self.model}@{self.alias} is now version {self.version} (run {self.run_id})"]
        if self.previous:
            told.append(
                f"before, version {self.previous}; paired gain: {'; '.join(map(str, self.gains)) or 'not measured'}"
            )
        return told + [f"forced, although {reason}" for reason in self.overruled]


def parse_gate(text: str) -> Gate:
    """`eval/sga >= 0.45` as a gate.

    Raises:
        ConfigError: it is not METRIC SIGN NUMBER.
    """
    found = re.fullmatch(r"\s*([A-Za-z][\w./@-]*)\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", text)
    if found is None:
        raise ConfigError(f"--gate {text!r}: expected METRIC >= NUMBER (or >, <, <=), as in 'eval/sga >= 0.45'")
    metric, sign, bound = found.groups()
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
    """Register the best checkpoint of a run, or of a sweep's winner, and move `alias` of the registered model to it.

    Args:
        model: name in the registry; by default the experiment's.

    Raises:
        ConfigError: no such run, or it has no model.
        PromotionRefusedError: a gate fails, or the gain over the model that has the alias is not above 0 (not with `force`).
    """
    client = open_tracking(tracking_uri)
    run = _resolve(client, target)
    candidate = _Candidate.of(client, run)
    name = model or run.data.params.get("name") or run.info.run_name
    reasons = [why for gate in gates if (why := gate.failure(candidate.figures))]
    champion = version_at(client, name, alias)
    gains: list[Gain] = []
    if champion is not None:
        if champion.run_id == run.info.run_id:
            raise PromotionRefusedError(f"{name}@{alias} is this run's model already (version {champion.version})")
        try:
            gains = paired_gains(client, candidate, _Candidate.of(client, client.get_run(str(champion.run_id))))
        except PromotionRefusedError as error:
            reasons.append(str(error))
        reasons += [
            f"the paired gain over version {champion.version} is not above 0 beyond its interval: {gain}"
            for gain in gains
            if gain.low <= 0
        ]
    if reasons and not force:
        raise PromotionRefusedError(f"run {run.info.run_name} is not promoted: " + "; ".join(reasons))
    told = {"promotion.gates": "; ".join(map(str, gates)), "promotion.gain": "; ".join(map(str, gains))}
    if reasons:
        told["promotion.forced_over"] = "; ".join(reasons)
    if champion is not None:
        told[_PREVIOUS] = str(champion.version)
    version = _register(client, name, candidate, told)
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


def roll_back(model: str, *, alias: str = "champion", tracking_uri: str | None = None) -> tuple[str, str]:
    """Move `alias` back to the version that had it before; returns (version from, version to).

    Raises:
        ConfigError: no such model or alias, or nothing had it before.
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


def _resolve(client: Any, target: str) -> Any:
    run = find_run(client, target)
    if run.data.tags.get("sweep.stage") != "sweep":
        return run
    winner = run.data.tags.get("sweep.winner_run")
    if winner is None:
        raise ConfigError(
            f"{target}: this sweep has no winner at full length (sweep.final_seeds=0, or it has not ended)"
        )
    return find_run(client, winner)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A run's model, and what was measured of it."""

    run: Any
    model_id: str
    step: int
    figures: Mapping[str, float]

    @classmethod
    def of(cls, client: Any, run: Any) -> "_Candidate":
        """The newest model of `run`.

        Raises:
            ConfigError: it has none.
        """
        outputs = run.outputs.model_outputs if run.outputs else []
        if not outputs:
            raise ConfigError(
                f"run {run.info.run_name} has no model; it has not ended, or tracking.log_model was false"
            )
        model = outputs[-1]
        figures = {}
        for key, latest in run.data.metrics.items():
            if key.startswith("eval/"):
                history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, key)}
                # What only the last evaluation measures, as RIGA, does not depend on the step.
                figures[key] = history.get(model.step, latest)
        return cls(run=run, model_id=model.model_id, step=model.step, figures=figures)


def paired_gains(client: Any, ours: _Candidate, theirs: _Candidate) -> list[Gain]:
    """Of both suites.

    Raises:
        PromotionRefusedError: the two were not measured on the same crops.
    """
    (our_record, our_hits), (their_record, their_hits) = (_evaluation(client, one) for one in (ours, theirs))
    for what in ("dataset_manifest_sha256", "protocol_sha256"):
        if our_record[what] != their_record[what]:
            raise PromotionRefusedError(
                f"it and run {theirs.run.info.run_name} were not measured alike ({what} differs), so there is no paired "
                "gain; train or evaluate both on the same evaluation.uri and protocol"
            )
    protocol = build(GridAccuracyConfig, our_record["protocol"])
    return [
        Gain(suite=suite, difference=difference, low=low, high=high)
        for suite in our_hits
        for difference, low, high in [paired_difference(our_hits[suite], their_hits[suite], protocol)]
    ]


def _evaluation(client: Any, candidate: _Candidate) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
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


def _register(client: Any, name: str, candidate: _Candidate, told: Mapping[str, str]) -> str:
    """The model's version in the registry, created now or by an earlier promotion that was killed; tagged with its lineage."""
    run = candidate.run
    lineage = {key: run.data.tags[key] for key in _LINEAGE if key in run.data.tags}
    measured = {key: f"{value:.6g}" for key, value in candidate.figures.items() if _is_headline(key)}
    tags = {**lineage, **measured, "run.name": run.info.run_name, "run.step": candidate.step, **told}
    return register_model(client, name, model_id=candidate.model_id, run_id=run.info.run_id, tags=tags)


def _is_headline(key: str) -> bool:
    return (
        re.fullmatch(r"eval/(photometric/)?(sga|gap_r|gain|riga)(_low|_high)?|eval/(photometric/)?(pixel|chance)", key)
        is not None
    )
