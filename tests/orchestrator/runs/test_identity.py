"""A run's name belongs to one configuration."""

from pathlib import Path

import pytest

from orchestrator.experiments.load import load_experiment
from orchestrator.experiments.spec import TrainExperiment
from orchestrator.runs.identity import Run, RunHeldError, finished_run, hold_run, mark_finished, refuse_if_held
from orchestrator.runs.identity import claim_run as claim
from orchestrator.tracking.header import DatasetUse, run_header
from workloads.errors import ConfigError


def claim_run(experiment: TrainExperiment, manifest_sha256: str = "0" * 64) -> Run:
    return claim(experiment, manifest_sha256=manifest_sha256)


def test_the_same_config_continues_and_another_is_refused(experiment: Path) -> None:
    first = claim_run(load_experiment(str(experiment), ["tracking.run_name=mine"]))
    elsewhere = ["tracking.run_name=mine", "scaling.num_workers=2"]  # where it runs is not what it is
    assert claim_run(load_experiment(str(experiment), elsewhere)).claim == first.claim
    with pytest.raises(ConfigError, match=r"'mine' already exists .*differs in objective.temperature, steps"):
        claim_run(load_experiment(str(experiment), ["tracking.run_name=mine", "steps=30", "objective.temperature=0.2"]))


def test_other_data_are_refused_with_the_way_out(experiment: Path) -> None:
    loaded = load_experiment(str(experiment), ["tracking.run_name=mine"])
    claim_run(loaded, "a" * 64)
    with pytest.raises(ConfigError, match=r"data\.uri: run 'mine' was started on another dataset .*init_from"):
        claim_run(loaded, "b" * 64)


def test_a_run_has_one_driver_at_a_time(experiment: Path) -> None:
    loaded = load_experiment(str(experiment), ["tracking.run_name=mine"])
    other = load_experiment(str(experiment), ["tracking.run_name=other"])
    with hold_run(loaded):
        with pytest.raises(ConfigError, match="another process is training run 'mine'"), hold_run(loaded):
            pass
        with hold_run(other):
            pass
    with hold_run(loaded):
        pass


def test_without_a_name_the_config_decides(experiment: Path) -> None:
    names = [claim_run(load_experiment(str(experiment), [f"seed={seed}"])).name for seed in (0, 1, 0)]
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("tiny-") for name in names)


def test_params_and_tags_hold_no_secret_and_no_machine_path(experiment: Path) -> None:
    loaded = load_experiment(
        str(experiment), ["tracking.uri=https://me:hunter2@host/", "evaluation.uri=s3://key:hunter2@bucket/val"]
    )
    data = DatasetUse(context="training", uri=loaded.data.uri, sha256="0" * 64)
    header = run_header(loaded, claim_run(loaded), datasets=[data], tags={})
    text = " ".join([*header.params.values(), *header.tags.values(), header.config_yaml])
    assert "hunter2" not in text
    assert not any(value.startswith("/") for value in [*header.params.values(), *header.tags.values()])
    assert header.params["data.uri"] == "…/train"
    assert header.params["objective.levels"] == '["P3"]'


@pytest.mark.parametrize("cut", ["", '{"claim": "ab', "[]"])
def test_a_record_that_a_kill_cut_short_is_none_while_the_run_has_nothing_else(experiment: Path, cut: str) -> None:
    loaded = load_experiment(str(experiment), ["tracking.run_name=cut"])
    record = Path(claim_run(loaded).folder, "run.json")
    record.write_text(cut)
    assert claim_run(loaded).claim == claim_run(loaded).claim
    record.write_text(cut)
    Path(record.parent, "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"tracking\.run_name: .*run\.json is damaged.*restore"):
        claim_run(loaded)


def test_a_damaged_note_that_the_run_has_ended_is_none(experiment: Path) -> None:
    run = claim_run(load_experiment(str(experiment), ["tracking.run_name=ended"]))
    mark_finished(run, "abc")
    assert finished_run(run) == "abc"
    Path(run.folder, "finished.json").write_text('{"run_')
    assert finished_run(run) is None


def test_a_held_run_is_refused_before_anything_is_written(experiment: Path) -> None:
    loaded = load_experiment(str(experiment), ["tracking.run_name=early"])
    refuse_if_held(loaded)
    folder = Path(loaded.storage.path, "early")
    assert not folder.exists()
    with hold_run(loaded), pytest.raises(RunHeldError, match=r"training run 'early' \(process \d+ on"):
        refuse_if_held(loaded)
