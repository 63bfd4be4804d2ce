"""The records of a run's journal, `MetricsRecord | ArtifactsRecord | TagsRecord | FaultRecord`, and their JSON form.

`to_json` and `from_json` are the only places that know the stored keys. Journals of earlier versions are read too: their
tags and artifacts may lack the step or the time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsRecord:
    """Metric values at one step."""

    step: int
    time_ms: int  # since 1970, of the worker that reported them
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactsRecord:
    """A folder of files for the run's artifacts."""

    folder: str  # relative to the run's folder in the storage
    step: int | None = None
    time_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TagsRecord:
    """Tags to set on the tracked run. One that has a time marks the start of an attempt."""

    tags: Mapping[str, str]
    time_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRecord:
    """A failed attempt; not sent to the tracking server."""

    command: str  # id of the command whose attempt failed
    failure: Mapping[str, Any]  # the fields of `training.failures.Failure`


Record = MetricsRecord | ArtifactsRecord | TagsRecord | FaultRecord


def to_json(record: Record) -> dict[str, Any]:
    """`record` as the object that one line of the journal holds."""
    match record:
        case MetricsRecord():
            return {"kind": "metrics", "step": record.step, "time_ms": record.time_ms, "metrics": dict(record.metrics)}
        case ArtifactsRecord():
            stamp = {"step": record.step, "time_ms": record.time_ms}
            return {"kind": "artifacts", **_without_none(stamp), "folder": record.folder}
        case TagsRecord():
            return {"kind": "tags", **_without_none({"time_ms": record.time_ms}), "tags": dict(record.tags)}
        case FaultRecord():
            return {"kind": "fault", "command": record.command, "failure": dict(record.failure)}


def from_json(line: Mapping[str, Any]) -> Record:
    """The record that `to_json` made `line` of.

    Raises:
        ValueError: the kind is unknown.
        KeyError: a field is missing.
    """
    match line["kind"]:
        case "metrics":
            return MetricsRecord(step=line["step"], time_ms=line["time_ms"], metrics=line["metrics"])
        case "artifacts":
            return ArtifactsRecord(folder=line["folder"], step=line.get("step"), time_ms=line.get("time_ms"))
        case "tags":
            return TagsRecord(tags=line["tags"], time_ms=line.get("time_ms"))
        case "fault":
            return FaultRecord(command=line["command"], failure=line["failure"])
        case kind:
            raise ValueError(f"unknown kind {kind!r}")


def _without_none(stamp: Mapping[str, int | None]) -> dict[str, int]:
    return {key: value for key, value in stamp.items() if value is not None}
