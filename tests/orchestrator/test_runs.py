"""A run's name belongs to one configuration."""

from pathlib import Path

import pytest

from orchestrator.load import load_experiment
from orchestrator.runs import claim_run
from orchestrator.track import run_header
from workloads.config import ConfigError


def test_the_same_config_continues_and_another_is_refused(experiment: Path) -> None:
    first = claim_run(load_experiment(str(experiment), ["tracking.run_name=mine"]))
    elsewhere = ["tracking.run_name=mine", "scaling.num_workers=2"]  # where it runs is not what it is
    assert claim_run(load_experiment(str(experiment), elsewhere)).claim == first.claim
    with pytest.raises(ConfigError, match=r"'mine' already exists .*differs in objective.temperature, steps"):
        claim_run(load_experiment(str(experiment), ["tracking.run_name=mine", "steps=30", "objective.temperature=0.2"]))


def test_without_a_name_the_config_decides(experiment: Path) -> None:
    names = [claim_run(load_experiment(str(experiment), [f"seed={seed}"])).name for seed in (0, 1, 0)]
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("tiny-") for name in names)


def test_params_and_tags_hold_no_secret_and_no_machine_path(experiment: Path) -> None:
    loaded = load_experiment(
        str(experiment), ["tracking.uri=https://me:hunter2@host/", "evaluation.uri=s3://key:hunter2@bucket/val"]
    )
    header = run_header(loaded, claim_run(loaded), manifests={"training": (loaded.data.uri, "0" * 64)})
    text = " ".join([*header.params.values(), *header.tags.values(), header.config_yaml])
    assert "hunter2" not in text
    assert not any(value.startswith("/") for value in [*header.params.values(), *header.tags.values()])
    assert header.params["data.uri"] == "…/train"
    assert header.params["objective.levels"] == '["P3"]'
