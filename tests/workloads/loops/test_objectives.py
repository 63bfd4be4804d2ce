"""The loop with every objective over pairs of views: resumes bit by bit, measures frozen features, and hands its trunk on."""

import numpy as np
import pytest
import torch

from orchestrator.datasets.build import build_dataset
from tests.workloads.data.images import make_folder
from tests.workloads.loops.test_pretrain import Cut, newest, records, store_of
from workloads.__main__ import main
from workloads.config import apply_overrides, build, parse_overrides, parse_yaml
from workloads.data.build.shards import BuildConfig
from workloads.errors import ConfigError, DataError
from workloads.evaluation.compare import compare, read_run, table
from workloads.loops.pretrain import preflight, pretrain
from workloads.models.backbone import Trunk
from workloads.models.trunks import load_trunk
from workloads.parallel.runtime import LocalRuntime
from workloads.spec.pretrain import PretrainConfig

TINY = """
steps: 4
global_batch_size: 8
log_every: 2
checkpoint_every: 2
views: {kind: pair, view_size: 32}
evaluation: {batch_size: 8, representation: {train_uri: x, view_size: 32, per_class: 6, neighbours: 3, bootstrap: 100}}
"""

OBJECTIVES = {
    "ntxent": "{kind: ntxent, projector_hidden: 16, projection_dim: 8}",
    "detcon_s": "{kind: detcon, variant: S, projector_hidden: 16, projection_dim: 8}",
    "detcon_b": "{kind: detcon, projector_hidden: 16, projection_dim: 8, momentum: 0.9}",
    "detco": "{kind: detco, queue_size: 8, projection_dim: 8, global_hidden: 16, local_hidden: 16, momentum: 0.9}",
}
VIEWS = {
    "detcon_s": ("views.regions.kind=column", "views.regions.name=grid"),
    "detcon_b": ("views.regions.kind=grid",),
    "detco": ("views.patches.view_size=48", "views.patches.size=16", "views.patches.grid=2"),
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("objectives")
    make_folder(root / "images", classes=3, per_class=12)
    given = {
        "source": {"kind": "folder", "inputs": [str(root / "images")]},
        "output": str(root / "shards"),
        "row_group_bytes": 8000,
        "regions": {"grid": {"size": 2}},
    }
    build_dataset(build(BuildConfig, given))
    return str(root / "shards")


def settings_of(uri: str, objective: str, *overrides: str) -> PretrainConfig:
    data = parse_yaml(TINY, source="test") | {"data": {"uri": uri, "decode_size": 48}}
    data["objective"] = parse_yaml(OBJECTIVES[objective], source="test")
    given = ("backbone.norm=group", f"evaluation.representation.train_uri={uri}", *VIEWS.get(objective, ()), *overrides)
    return build(PretrainConfig, apply_overrides(data, parse_overrides(given)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_was_cut_off_ends_bit_equal_targets_and_queues_included(uri, tmp_path, objective):
    settings = settings_of(uri, objective, "evaluation.representation=null")
    pretrain(settings, LocalRuntime(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings, Cut(tmp_path / "cut"))
    pretrain(settings, LocalRuntime(tmp_path / "cut"))
    whole, cut = (store_of(tmp_path / name).read(4).state["model"] for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        places = tensor[:-1] if name.endswith(".keys") else tensor
        assert torch.equal(cut[name][: len(places)] if places.ndim else cut[name], places), name
    if objective in ("detcon_b", "detco"):
        assert any(name.startswith("target") for name in whole)
    if objective == "detco":
        assert int(whole["queues.local_C3.count"]) == 8


@pytest.fixture(scope="module")
def measured(uri, tmp_path_factory: pytest.TempPathFactory):
    """Two runs that were measured by the same protocol."""
    root = tmp_path_factory.mktemp("measured")
    for name in ("ntxent", "detco"):
        pretrain(settings_of(uri, name, "evaluation.every_steps=2"), LocalRuntime(root / name))
    return root


def test_frozen_features_are_measured_at_the_start_now_and_then_and_at_the_end(measured):
    lines = [line for line in records(measured / "ntxent") if "eval/knn" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert ["eval/linear" in line for line in lines] == [True, False, True] and 0 <= lines[2]["eval/linear"] <= 1
    assert lines[0]["eval/knn_images"] == 18 and lines[0]["eval/knn_chance"] == pytest.approx(1 / 3)
    assert lines[0]["eval/knn_pixel"] == lines[2]["eval/knn_pixel"]  # no network is in it
    with np.load(measured / "ntxent" / "artifacts" / "report" / "representation_step_0000004.npz") as found:
        assert found["knn"].shape == found["label"].shape == (18,)


def test_evaluating_a_checkpoint_again_gives_the_same_figures(measured, tmp_path, capsys):
    checkpoint = str(newest(measured / "ntxent"))
    assert main(["evaluate", checkpoint, "--output", str(tmp_path)]) == 0
    again = records(tmp_path)[-1]
    before = next(line for line in records(measured / "ntxent") if line["step"] == 4 and "eval/knn" in line)
    assert again["eval/knn"] == before["eval/knn"] and again["eval/linear"] == before["eval/linear"]


def test_runs_are_compared_with_paired_gains_and_a_picture(measured, tmp_path, capsys):
    runs = [str(measured / name) for name in ("ntxent", "detco")]
    assert main(["compare", *runs, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| ntxent | 32 in 4 steps |" in text and "| detco |" in text and capsys.readouterr().out == text
    rows = compare([read_run(measured / name) for name in ("ntxent", "detco")])
    assert rows[0].computing_to_baseline is not None and rows[0].computing_to_baseline <= 1.0
    gain, low, high = rows[0].gains["knn"]
    curve = rows[0].record.curves["eval/knn"]
    assert gain == pytest.approx(curve[-1][1] - curve[0][1]) and low <= gain <= high
    # Two views of 32 pixels through a ResNet-18, there and back: 0.074 GFLOPs a view forward, nearly three times that in all.
    assert 0.4e9 < rows[0].flops_per_image < 0.45e9
    assert table(rows).count("\n") == 6


def test_runs_of_another_protocol_are_not_compared(uri, measured, tmp_path, capsys):
    pretrain(
        settings_of(uri, "ntxent", "steps=1", "evaluation.representation.per_class=5"), LocalRuntime(tmp_path / "other")
    )
    assert main(["compare", str(measured / "ntxent"), str(tmp_path / "other"), "--output", str(tmp_path)]) == 2
    assert main(["compare", str(tmp_path / "nothing")]) == 2


def test_a_pyramid_is_trained_on_any_objectives_frozen_trunk(uri, measured, tmp_path):
    probe = f"""
steps: 2
global_batch_size: 8
views: {{full_size: 64, crop_size: 16, crops_per_image: 2}}
backbone: {{norm: group, frozen: true}}
trunk_from: {newest(measured / "detco")}
objective: {{kind: anchor_ntxent, levels: [P3, P4], projection_dim: 16, projector_hidden: 16, shared_trunk: true}}
evaluation:
  uri: {uri}
  limit: 4
  heatmaps: 0
  protocol: {{view_size: 64, crop_size: 16, grid: 8, levels: [P3, P4], crops_per_image: 2, untrained_networks: 1, bootstrap: 100}}
"""
    settings = build(PretrainConfig, parse_yaml(probe, source="test") | {"data": {"uri": uri}})
    preflight(settings, 1)
    figures = pretrain(settings, LocalRuntime(tmp_path))
    assert 0 <= figures["eval/sga"] <= 1
    before, after = load_trunk(newest(measured / "detco")), load_trunk(newest(tmp_path))
    assert isinstance(before, Trunk) and isinstance(after, Trunk)
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(old, new), name
    with pytest.raises(ConfigError, match=r"trunk_from: .* holds another trunk than backbone says"):
        other = build(
            PretrainConfig,
            parse_yaml(probe.replace("norm: group", "name: resnet34, norm: group"), source="t")
            | {"data": {"uri": uri}},
        )
        preflight(other, 1)


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (
            "detco",
            ("objective.queue_size=16",),
            r"objective\.queue_size: 16 keys are more than a quarter of the 36 images",
        ),
        ("ntxent", ("evaluation.uri=x",), r"evaluation\.uri: ntxent trains no pyramid, so there is no SGA"),
        ("detcon_b", ("views.regions={kind: column, name: slic}",), r"has no regions 'slic', only grid"),
        ("ntxent", ("evaluation.representation.per_class=99",), r"leaves 0 test images"),
        ("ntxent", ("evaluation.representation.per_class=1",), r"linear: 3 training images are too few"),
    ],
)
def test_what_cannot_work_is_said_before_it_starts(uri, objective, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        preflight(settings_of(uri, objective, *changes), 1)
