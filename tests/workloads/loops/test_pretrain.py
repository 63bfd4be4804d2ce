"""The pretraining loop on real files: records, resumes bit by bit, refuses, and gives the same on two processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orchestrator.datasets.build import build_dataset
from tests.processes import run_on_ranks
from tests.workloads.data.images import make_folder
from workloads.__main__ import main
from workloads.config import apply_overrides, build, parse_overrides, to_yaml
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.errors import ConfigError, DataError, RunStoppedError
from workloads.evaluation.pretraining import evaluate
from workloads.loops.meter import NonFiniteLossError
from workloads.loops.pretrain import preflight, pretrain
from workloads.parallel.runtime import LocalRuntime
from workloads.spec.loading import load_model
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import CheckpointError
from workloads.storage.checkpoint_store import CheckpointStore

TINY = """
steps: 6
global_batch_size: 8
log_every: 2
views: {full_size: 64, crop_size: 16, crops_per_image: 2}
backbone: {norm: group}
objective: {levels: [P3, P4], projection_dim: 16, projector_hidden: 16}
evaluation:
  batch_size: 4
  limit: 7
  heatmaps: 2
  protocol: {view_size: 64, crop_size: 16, grid: 8, levels: [P3, P4], crops_per_image: 2, untrained_networks: 2, bootstrap: 100}
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("pretrain")
    make_folder(root / "images", classes=2, per_class=12)
    source = FolderSourceConfig(inputs=(str(root / "images"),))
    build_dataset(BuildConfig(source=source, output=str(root / "shards"), row_group_bytes=8000))
    return str(root / "shards")


def settings_of(uri: str, *overrides: str) -> PretrainConfig:
    from workloads.config import parse_yaml

    data = parse_yaml(TINY, source="test") | {"data": {"uri": uri}}
    return build(PretrainConfig, apply_overrides(data, parse_overrides(overrides)))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


class Cut(LocalRuntime):
    """Dies when it is told of step 4."""

    def report(self, metrics, *, step, artifacts=None):
        if step == 4:
            self.flush()
            raise KeyboardInterrupt
        super().report(metrics, step=step, artifacts=artifacts)


def store_of(output: Path) -> CheckpointStore:
    return LocalRuntime(output).checkpoints


def newest(output: Path) -> Path:
    store = store_of(output)
    return Path(store.path_of(store.steps()[-1]))


def test_a_run_leaves_records_a_checkpoint_and_pictures(uri, tmp_path):
    settings = settings_of(uri, f"evaluation.uri={uri}")
    figures = pretrain(settings, LocalRuntime(tmp_path))
    lines = records(tmp_path)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "eval/sga" in line] == [0, 6]
    measured = [line for line in lines if "eval/sga" in line]
    assert "eval/riga" not in measured[0] and "eval/riga" in measured[1]
    assert 0 <= lines[1]["train/data_wait_share"] <= 1 and lines[1]["train/images_per_s"] > 0
    assert measured[1]["eval/images"] == 7
    assert store_of(tmp_path).steps()[-1] == 6
    pictures = sorted(p.name for p in (tmp_path / "artifacts" / "heatmaps").iterdir())
    assert pictures == [f"{s}_step_{n:07d}.png" for s in ("photometric", "plain") for n in (0, 6)]

    again = evaluate(
        newest(tmp_path),
        config=settings.evaluation,
        runtime=LocalRuntime(tmp_path / "again"),
    )
    assert again["eval/sga"] == figures["eval/sga"] and again["eval/riga"] == figures["eval/riga"]


def test_a_run_that_was_cut_off_ends_bit_equal(uri, tmp_path):
    settings = settings_of(uri, "checkpoint_every=2")
    pretrain(settings, LocalRuntime(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, Cut(tmp_path / "cut"))
    assert store_of(tmp_path / "cut").steps() == [2, 3]  # the last within the window of the record that is lost
    pretrain(settings, LocalRuntime(tmp_path / "cut"))
    states = [store_of(tmp_path / name).read_newest().state["model"] for name in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    losses = [[r["train/loss"] for r in records(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


class CutInEvaluation(LocalRuntime):
    """Dies when it is told of the last evaluation."""

    def report(self, metrics, *, step, artifacts=None):
        if step == 6 and "eval/sga" in metrics:
            raise KeyboardInterrupt
        super().report(metrics, step=step, artifacts=artifacts)


def test_a_run_cut_off_in_its_last_evaluation_is_not_taken_for_complete(uri, tmp_path):
    settings = settings_of(uri, "checkpoint_every=3", f"evaluation.uri={uri}")
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, CutInEvaluation(tmp_path))
    assert "eval/sga" in pretrain(settings, LocalRuntime(tmp_path))
    assert store_of(tmp_path).steps()[-1] == 6


def test_another_config_or_a_damaged_checkpoint_is_refused(uri, tmp_path):
    pretrain(settings_of(uri, "steps=2"), LocalRuntime(tmp_path))
    with pytest.raises(CheckpointError, match="another configuration"):
        pretrain(settings_of(uri, "steps=3"), LocalRuntime(tmp_path))
    checkpoint = newest(tmp_path)
    (checkpoint / "state.pt").write_bytes((checkpoint / "state.pt").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
        load_model(checkpoint)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(uri, tmp_path, caplog):
    settings = settings_of(uri, "checkpoint_every=2", "checkpoint_epochs=null")
    pretrain(settings, LocalRuntime(tmp_path / "whole"))
    pretrain(settings, LocalRuntime(tmp_path / "hurt"))
    state = newest(tmp_path / "hurt") / "state.pt"
    state.write_bytes(state.read_bytes()[:-5])
    pretrain(settings, LocalRuntime(tmp_path / "hurt"))
    assert "falling back to the one before" in caplog.text
    states = [store_of(tmp_path / name).read_newest().state["model"] for name in ("whole", "hurt")]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


class Asked(LocalRuntime):
    """Is asked to stop after so many steps."""

    calls = 0

    def request(self):
        self.calls += 1
        return "stop" if self.calls == 3 else "go on"


def test_a_run_that_is_asked_to_stop_takes_a_checkpoint_and_goes_on_later(uri, tmp_path):
    settings = settings_of(uri, "log_every=4", "checkpoint_epochs=null")
    pretrain(settings, LocalRuntime(tmp_path / "whole"))
    with pytest.raises(RunStoppedError, match="after step 3 of 6"):
        pretrain(settings, Asked(tmp_path / "asked"))
    assert store_of(tmp_path / "asked").steps() == [3]
    pretrain(settings, LocalRuntime(tmp_path / "asked"))
    losses = [[(r["step"], r["train/loss"]) for r in records(tmp_path / name)] for name in ("whole", "asked")]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [4, 6]


def test_sigterm_to_the_command_saves_and_says_how_to_continue(uri, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(to_yaml(settings_of(uri, "steps=5000", "log_every=1")))
    command = [sys.executable, "-m", "workloads", "train", str(file), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped on request after step" in errors and "Traceback" not in errors
    steps = store_of(tmp_path / "run").steps()
    assert f"step {steps[-1]} of 5000" in errors


def test_torchrun_trains_as_one_process_does(uri, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(to_yaml(settings_of(uri, "steps=2", "log_every=1", "data.lanes=4")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    for name, begin in (("one", [sys.executable, "-m"]), ("two", launch)):
        command = [*begin, "workloads", "train", str(file), "--output", str(tmp_path / name)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-2000:]
    losses = [[r["train/loss"] for r in records(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 2
    assert store_of(tmp_path / "two").steps()[-1] == 2


def test_a_run_may_begin_with_the_weights_of_another(uri, tmp_path):
    pretrain(settings_of(uri, "steps=2"), LocalRuntime(tmp_path / "first"))
    begun = settings_of(uri, "steps=1", "seed=7", "optimizer.lr=1e-30", f"init_from={newest(tmp_path / 'first')}")
    pretrain(begun, LocalRuntime(tmp_path / "second"))
    first, second = (store_of(tmp_path / name).read_newest() for name in ("first", "second"))
    assert second.meta.step == 1
    for name, value in first.state["model"].items():
        torch.testing.assert_close(second.state["model"][name], value)
    with pytest.raises(ConfigError, match=r"init_from: .*other networks"):
        preflight(settings_of(uri, f"init_from={newest(tmp_path / 'first')}", "objective.projection_dim=8"), 1)
    with pytest.raises(ConfigError, match=r"init_from: .*not a checkpoint"):
        preflight(settings_of(uri, "init_from=nowhere"), 1)


def test_batch_norm_on_several_workers_is_refused_unless_allowed(uri):
    with pytest.raises(ConfigError, match="another number of workers is another model"):
        preflight(settings_of(uri, "backbone.norm=batch"), 2)
    preflight(settings_of(uri, "backbone.norm=batch", "allow_local_statistics=true"), 2)
    preflight(settings_of(uri, "backbone.norm=sync_batch"), 2)


def test_micro_batches_train_as_the_whole_batch_does(uri, tmp_path):
    for name, more in (("whole", []), ("micro", ["micro_batch_size=3"])):
        pretrain(settings_of(uri, "log_every=1", "optimizer.kind=sgd", *more), LocalRuntime(tmp_path / name))
    losses = [[r["train/loss"] for r in records(tmp_path / name)] for name in ("whole", "micro")]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # rounding, amplified by six updates


def test_a_loss_that_is_not_finite_names_the_images(uri, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"class_\d.*no checkpoint was written yet"):
        pretrain(settings_of(uri, "optimizer.kind=sgd", "optimizer.lr=1e30"), LocalRuntime(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        (["data.uri=nowhere"], DataError, "nowhere"),
        (["global_batch_size=64"], ValueError, "global_batch_size"),
        (["data.lanes=3"], ValueError, "lanes"),
        (["evaluation.protocol.levels=[P3, P5]"], ConfigError, "P5 is not trained"),
        (["evaluation.uri=nowhere"], DataError, "nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(uri, overrides, error, sentence):
    with pytest.raises(error, match=sentence):
        held_out = [] if "evaluation.uri=nowhere" in overrides else [f"evaluation.uri={uri}"]
        preflight(settings_of(uri, *held_out, *overrides), 1)


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(uri, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, free=1 << 20))
    with (
        LocalRuntime(tmp_path) as runtime,
        pytest.raises(ConfigError, match=r"the disk has 1\.0 MiB free, a checkpoint"),
    ):
        pretrain(settings_of(uri), runtime)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_more_workers_than_lanes_are_refused(uri):
    with pytest.raises(ConfigError, match="9 workers are more than the 8 lanes"):
        preflight(settings_of(uri), 9)


def train_on_rank(rank: int, world_size: int, uri: str, output: str) -> dict:
    settings = settings_of(uri, f"evaluation.uri={uri}", "data.lanes=4", "steps=3", "log_every=1")
    return pretrain(settings, LocalRuntime(output))


def test_three_processes_train_and_measure_what_one_does(uri, tmp_path):
    alone = train_on_rank(0, 1, uri, str(tmp_path / "one"))
    ranks = run_on_ranks(train_on_rank, 3, tmp_path / "ranks", uri, str(tmp_path / "three"))
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0]["eval/chance"] == alone["eval/chance"] and ranks[0]["eval/pixel"] == alone["eval/pixel"]
    assert ranks[0]["eval/images"] == 7
    losses = [[r["train/loss"] for r in records(tmp_path / name) if "train/loss" in r] for name in ("one", "three")]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    # AdamW's first updates have the size of the learning rate whatever the gradient's: they amplify rounding.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 3


def test_the_command_line_says_what_is_wrong_and_exits_with_2(uri, tmp_path, caplog):
    file = tmp_path / "experiment.yaml"
    file.write_text(to_yaml(settings_of(uri, "steps=1")) + "tracking: {uri: elsewhere}\n")
    output = ["--output", str(tmp_path / "run")]
    assert main(["train", str(file), *output]) == 0
    assert main(["train", str(file), "step=1", *output]) == 2
    assert "did you mean steps?" in caplog.text
    assert main(["train", str(tmp_path / "missing.yaml"), *output]) == 2
    assert main(["train", str(file), "data.uri=nowhere", *output]) == 2
    assert (
        main(
            [
                "train",
                str(file),
                "optimizer.kind=sgd",
                "optimizer.lr=1e38",
                "name=x",
                "--output",
                str(tmp_path / "x"),
                "steps=4",
            ]
        )
        == 1
    )
    checkpoint = newest(tmp_path / "run")
    assert main(["evaluate", str(checkpoint)]) == 2
    assert main(["evaluate", str(checkpoint), f"uri={uri}", "--output", str(tmp_path / "e")]) == 0
    assert "eval/gap_r" in records(tmp_path / "e")[0] or "eval/riga" in records(tmp_path / "e")[0]
