"""`RunHeader`: parameters, tags, dataset inputs and config of an MLflow run, all known before its first step.

`header_of` is the one constructor. `run_header` calls it for a training run.
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.experiments.spec import AnyExperiment, command_of
from orchestrator.runs.identity import Run
from orchestrator.tracking.addresses import without_secrets
from workloads.config import flatten, to_yaml

CLAIM_TAG = "run.claim"
_LONGEST_PARAM = 6000  # characters, MLflow's limit


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetUse:
    """A dataset that a run reads."""

    context: str  # training, evaluation, discovery
    uri: str
    sha256: str  # of its manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHeader:
    """The constant part of an MLflow run; credentials and local paths are removed."""

    name: str
    claim: str
    experiment: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    datasets: Sequence[DatasetUse]
    config_yaml: str


def header_of(
    name: str,
    config: Any,
    *,
    claim: str,
    experiment: str,
    command: str,
    config_sha256: str,
    manifest_sha256: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    datasets: Sequence[DatasetUse],
) -> RunHeader:
    """The header of the run `name`.

    Args:
        config: config object, stored as YAML in the artifacts.
        claim: unique id that the MLflow run carries as the tag `run.claim`, by which it is found again.
        experiment: MLflow experiment.
        command: shown as the run's source, e.g. `train NAME`.
        params: flattened config, and more parameters.
        tags: more tags.
    """
    return RunHeader(
        name=name,
        claim=claim,
        experiment=experiment,
        params={key: _presentable(value)[:_LONGEST_PARAM] for key, value in params.items()},
        tags={
            CLAIM_TAG: claim,
            "config.sha256": config_sha256,
            "data.manifest_sha256": manifest_sha256,
            **tags,
            "mlflow.source.name": f"orchestrator {command}",
            "mlflow.source.type": "JOB",
            **git_tags(),
        },
        datasets=datasets,
        config_yaml=without_secrets(to_yaml(config)),
    )


def run_header(
    experiment: AnyExperiment, run: Run, *, datasets: Sequence[DatasetUse], tags: Mapping[str, str]
) -> RunHeader:
    """The header of a training run."""
    return header_of(
        run.name,
        experiment,
        claim=run.claim,
        experiment=experiment.tracking.experiment,
        command=f"{command_of(experiment)} {experiment.name}",
        config_sha256=run.config_sha256,
        manifest_sha256=run.manifest_sha256,
        params={**flatten(experiment.science), **prefixed("scaling", flatten(experiment.scaling))},
        tags={**tags, "run.loop": experiment.loop},
        datasets=datasets,
    )


def prefixed(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `section.` before each key."""
    return {f"{section}.{key}": value for key, value in values.items()}


def _presentable(value: Any) -> str:
    """A parameter's text: of a local path only the last part, of an address all but its credentials."""
    if isinstance(value, str):
        return f"…/{Path(value).name}" if value.startswith(("/", "file://")) else without_secrets(value)
    return json.dumps(value)  # as it is written on the command line


def dataset_label(uri: str) -> str:
    """A short name for a dataset: the last part of its URI."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", uri.rstrip("/").rpartition("/")[2]) or "data"


def git_tags() -> dict[str, str]:
    """The git commit of the code as MLflow's tag, and whether there are uncommitted changes; empty outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        tags = {"mlflow.source.git.commit": git("rev-parse", "HEAD")}
        return tags | ({"git.uncommitted_changes": "true"} if git("status", "--porcelain", "-uno") else {})
    except (OSError, subprocess.SubprocessError):
        commit = os.environ.get("ORCHESTRATOR_GIT_COMMIT")  # set for a job whose working directory has no .git
        return {"mlflow.source.git.commit": commit} if commit else {}
