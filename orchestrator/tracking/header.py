"""Parameters, tags and dataset inputs of an MLflow run, known before its first step."""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.experiments.spec import AnyExperiment, command_of
from orchestrator.experiments.sweep_spec import SweepExperiment
from orchestrator.runs.identity import Run
from orchestrator.tracking.addresses import without_secrets
from workloads.config import flatten, to_yaml

CLAIM_TAG = "run.claim"
_LONGEST_PARAM = 6000  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHeader:
    """What is known of a run before its first step."""

    name: str
    claim: str
    experiment: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    datasets: Sequence[tuple[str, str, str, str]]  # context (training, evaluation), name, digest, kind of source
    config_yaml: str


def run_header(
    experiment: AnyExperiment, run: Run, *, manifests: Mapping[str, tuple[str, str]], tags: Mapping[str, str]
) -> RunHeader:
    """Parameters, tags, dataset inputs and config of `run`.

    Args:
        manifests: context (`training`, `evaluation`) → (data URI, manifest SHA-256).
        tags: more tags.
    """
    science = flatten(experiment.science)
    scaling = {f"scaling.{key}": value for key, value in flatten(experiment.scaling).items()}
    tags = {
        CLAIM_TAG: run.claim,
        "config.sha256": run.config_sha256,
        "data.manifest_sha256": run.manifest_sha256,
        **tags,
        "run.loop": experiment.loop,
        "mlflow.source.name": f"orchestrator {command_of(experiment)} {experiment.name}",
        "mlflow.source.type": "JOB",
        **git_tags(),
    }
    return RunHeader(
        name=run.name,
        claim=run.claim,
        experiment=experiment.tracking.experiment,
        params={key: _presentable(value)[:_LONGEST_PARAM] for key, value in {**science, **scaling}.items()},
        tags=tags,
        datasets=[
            (context, dataset_label(uri), digest[:36], "s3" if uri.startswith("s3://") else "local")
            for context, (uri, digest) in manifests.items()
        ],
        config_yaml=without_secrets(to_yaml(experiment)),
    )


def sweep_header(experiment: SweepExperiment, run: Run) -> RunHeader:
    """Parameters, tags and config of a sweep's parent run."""
    values = {**flatten(experiment.science), **{f"sweep.{key}": v for key, v in flatten(experiment.sweep).items()}}
    return RunHeader(
        name=run.name,
        claim=run.claim,
        experiment=experiment.tracking.experiment,
        params={key: _presentable(value)[:_LONGEST_PARAM] for key, value in values.items()},
        tags={
            CLAIM_TAG: run.claim,
            "config.sha256": run.config_sha256,
            "data.manifest_sha256": run.manifest_sha256,
            "sweep.name": run.name,
            "sweep.stage": "sweep",
            "mlflow.source.name": f"orchestrator sweep {experiment.name}",
            "mlflow.source.type": "JOB",
            **git_tags(),
        },
        datasets=[],
        config_yaml=without_secrets(to_yaml(experiment)),
    )


def shown_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters as a run shows them: no machine paths, no credentials, no text longer than MLflow takes."""
    return {key: _presentable(value)[:_LONGEST_PARAM] for key, value in values.items()}


def _presentable(value: Any) -> str:
    """A parameter's text: a local path is only its last part, an address loses its credentials."""
    if isinstance(value, str):
        return f"…/{Path(value).name}" if value.startswith(("/", "file://")) else without_secrets(value)
    return json.dumps(value)  # as it would be given on the command line


def dataset_label(uri: str) -> str:
    """A short name for a dataset: the last part of its URI."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", uri.rstrip("/").rpartition("/")[2]) or "data"


def git_tags() -> dict[str, str]:
    """The commit that the code was checked out from, if it was."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        tags = {"mlflow.source.git.commit": git("rev-parse", "HEAD")}
        return tags | ({"git.uncommitted_changes": "true"} if git("status", "--porcelain", "-uno") else {})
    except (OSError, subprocess.SubprocessError):
        commit = os.environ.get("ORCHESTRATOR_GIT_COMMIT")  # for a job whose working directory came without .git
        return {"mlflow.source.git.commit": commit} if commit else {}
