"""The fine-tuning loop on real files: records, resumes bit by bit, refuses, and gives the same on several processes."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.processes import run_on_ranks
from workloads.__main__ import main
from workloads.config import apply_overrides, build, parse_overrides, parse_yaml, to_yaml
from workloads.data.store.objects import BOXES_SCHEMA
from workloads.errors import ConfigError, DataError
from workloads.loops.dispatch import load_loop, run_loop
from workloads.loops.finetune import FinetuneConfig, build_detector, finetune, load_detector, preflight
from workloads.loops.meter import NonFiniteLossError
from workloads.loops.pretrain import pretrain
from workloads.parallel.runtime import LocalRuntime
from workloads.spec.loading import load_model
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import CheckpointError

TINY = """
loop: finetune
steps: 4
global_batch_size: 4
log_every: 2
checkpoint_epochs: null
views: {short_side: 48, long_side: 64}
detector: {kind: retinanet, fpn_channels: 16, smallest_anchor: 8.0, statistics: frozen, proposals: 16, region_batch: 16}
optimizer: {kind: sgd, lr: 0.001}
evaluation: {batch_size: 5, pictures: 2, resamples: 20}
"""


def settings_of(coco: dict[str, str], *overrides: str) -> FinetuneConfig:
    data = parse_yaml(TINY, source="test") | {"data": {"uri": coco["train"], "decode_size": 96}}
    return build(FinetuneConfig, apply_overrides(data, parse_overrides(overrides)))


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def newest(output: Path) -> str:
    store = LocalRuntime(output).checkpoints
    return store.path_of(store.steps()[-1])


def states_of(*outputs: Path) -> list[dict[str, torch.Tensor]]:
    return [LocalRuntime(output).checkpoints.read_newest().state["model"] for output in outputs]


def assert_same(first: dict, second: dict) -> None:
    tensors = [name for name in first if isinstance(first[name], torch.Tensor)]
    assert len(tensors) > 60 and all(torch.equal(first[name], second[name]) for name in tensors)


@pytest.fixture(scope="module")
def trunk(coco, tmp_path_factory) -> str:
    """The checkpoint of a pretraining run of two steps."""
    output = tmp_path_factory.mktemp("trunk")
    data = {
        "steps": 2, "global_batch_size": 4, "data": {"uri": coco["train"]},
        "views": {"full_size": 64, "crop_size": 16, "crops_per_image": 2},
        "objective": {"levels": ["P3"], "projection_dim": 16, "projector_hidden": 16},
    }  # fmt: skip
    pretrain(build(PretrainConfig, data), LocalRuntime(output))
    return newest(output)


def test_a_run_leaves_records_a_checkpoint_and_a_picture(coco, trunk, tmp_path):
    settings = settings_of(coco, f"evaluation.uri={coco['val']}", f"trunk={{kind: checkpoint, uri: {trunk}}}")
    figures = finetune(settings, LocalRuntime(tmp_path))
    lines = records(tmp_path)
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4]
    measured = next(line for line in lines if "eval/ap50" in line)
    assert measured["eval/images"] == 16 and 0 <= measured["eval/ap50"] <= 1
    assert lines[-1]["train/loss"] == pytest.approx(
        lines[-1]["train/loss_category"] + lines[-1]["train/loss_box"], rel=1e-5
    )
    assert (tmp_path / "artifacts" / "detections" / "step_0000004.png").stat().st_size > 1000
    report = json.loads((tmp_path / "artifacts" / "report" / "detection_step_0000004.json").read_text())
    assert report["categories"] == ["bar", "square"]

    detector, run = load_detector(newest(tmp_path))
    assert run == settings and detector.categories == ("bar", "square") and not detector.training
    assert figures["eval/ap50"] == measured["eval/ap50"]


def test_the_trunk_begins_with_the_checkpoints_weights_and_the_head_is_the_same_for_every_trunk(coco, trunk):
    from workloads.loops.finetune import build_detector

    pretrained = load_model(Path(trunk))[0].trunk.state_dict()
    detectors = [
        build_detector(settings_of(coco, *more), ("a", "b"))
        for more in ([f"trunk={{kind: checkpoint, uri: {trunk}}}"], [])
    ]
    states = [detector.state_dict() for detector in detectors]
    ours = {k.removeprefix("network.backbone.trunk."): v for k, v in states[0].items() if ".trunk." in k}
    assert ours.keys() == pretrained.keys() and all(torch.equal(ours[k], pretrained[k]) for k in ours)
    heads = [k for k in states[0] if ".trunk." not in k and isinstance(states[0][k], torch.Tensor)]
    assert heads and all(torch.equal(states[0][k], states[1][k]) for k in heads)
    assert not torch.equal(
        states[0]["network.backbone.trunk.body.conv1.weight"], states[1]["network.backbone.trunk.body.conv1.weight"]
    )


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn_fpn"])
def test_the_pyramid_of_the_checkpoint_becomes_the_detectors(coco, tmp_path, kind):
    data = {
        "steps": 1, "global_batch_size": 4, "data": {"uri": coco["train"]},
        "views": {"full_size": 64, "crop_size": 16, "crops_per_image": 2},
        "objective": {"levels": ["P3", "P4", "P5", "P6"], "projection_dim": 16, "projector_hidden": 16, "anchor_negatives": 0},
    }  # fmt: skip
    pretrain(build(PretrainConfig, data), LocalRuntime(tmp_path))
    checkpoint = newest(tmp_path)
    source = f"trunk={{kind: checkpoint, uri: {checkpoint}, pyramid: true}}"
    detector = build_detector(
        settings_of(coco, source, f"detector.kind={kind}", "detector.fpn_channels=16"), ("cat",)
    ).eval()
    pretrained = load_model(Path(checkpoint))[0]
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        wanted = pretrained.pyramid(pretrained.trunk(images))
        levels = list(detector.network.backbone(images).values())
    for level, features in zip(wanted, levels if kind == "retinanet" else levels[1:], strict=False):
        if level == "P6" and kind != "retinanet":
            continue  # Faster R-CNN pools its last level
        torch.testing.assert_close(features, wanted[level])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["detector.fpn_channels=32"], r"has 16 channels; set detector\.fpn_channels=16"),
        (["detector.kind=faster_rcnn_c4"], r"detector\.kind=faster_rcnn_c4 has no feature pyramid"),
    ],
)
def test_a_pyramid_that_does_not_fit_is_refused_before_anything_starts(coco, trunk, overrides, sentence):
    source = f"trunk={{kind: checkpoint, uri: {trunk}, pyramid: true}}"
    with pytest.raises(ConfigError, match=sentence):
        preflight(settings_of(coco, source, *overrides), 1)


def test_a_state_dict_of_torchvisions_is_a_supervised_trunk(coco, tmp_path):
    import torchvision

    from workloads.models.trunks import SupervisedTrunkConfig, load_resnet

    torch.manual_seed(3)
    plain = torchvision.models.resnet18()
    torch.save(plain.state_dict(), tmp_path / "resnet18.pth")
    trunk = load_resnet(SupervisedTrunkConfig(file=str(tmp_path / "resnet18.pth")))
    assert torch.equal(trunk.body.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
    for name, message in (("resnet34", "give resnet34's state dict"), ("resnet18", "cannot be read")):
        path = tmp_path / ("resnet18.pth" if name == "resnet34" else "missing.pth")
        with pytest.raises(ConfigError, match=f"trunk.file: .*{message}"):
            load_resnet(SupervisedTrunkConfig(name=name, file=str(path)))


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn_c4"])
def test_a_run_that_was_cut_off_ends_bit_equal(coco, tmp_path, kind):
    class Cut(LocalRuntime):
        """Dies when it is told of step 4."""

        def report(self, metrics, *, step, artifacts=None):
            if step == 4:
                self.flush()
                raise KeyboardInterrupt
            super().report(metrics, step=step, artifacts=artifacts)

    settings = settings_of(coco, "checkpoint_every=3", f"detector.kind={kind}", "detector.fpn_channels=16", *FEW)
    finetune(settings, LocalRuntime(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        finetune(settings, Cut(tmp_path / "cut"))
    assert LocalRuntime(tmp_path / "cut").checkpoints.steps() == [3]
    finetune(settings, LocalRuntime(tmp_path / "cut"))
    assert_same(*states_of(tmp_path / "whole", tmp_path / "cut"))
    losses = [[r["train/loss"] for r in records(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


FEW = (
    "detector.statistics=frozen", "detector.smallest_anchor=8.0", "detector.proposals=16", "detector.region_batch=16",
)  # fmt: skip


def finetune_on_rank(rank: int, world_size: int, coco: dict, output: str) -> dict:
    settings = settings_of(coco, f"evaluation.uri={coco['val']}", "data.lanes=4", "log_every=1", "steps=3", "seed=3")
    return finetune(settings, LocalRuntime(output))


def test_three_processes_train_and_measure_what_one_does(coco, tmp_path):
    alone = finetune_on_rank(0, 1, coco, str(tmp_path / "one"))
    ranks = run_on_ranks(finetune_on_rank, 3, tmp_path / "ranks", coco, str(tmp_path / "three"))
    shares = [rank.pop("speed/forward_share") for rank in ranks]  # each measures its own time
    assert all(0 < share < 1 for share in shares) and repr(ranks[0]) == repr(ranks[1]) == repr(ranks[2])
    assert ranks[0]["eval/images"] == 16 and ranks[0]["eval/ap50"] == pytest.approx(alone["eval/ap50"], abs=0.02)
    losses = [[r["train/loss"] for r in records(tmp_path / name) if "train/loss" in r] for name in ("one", "three")]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[0]) == 3
    for first, second in zip(
        *(states.values() for states in states_of(tmp_path / "one", tmp_path / "three")), strict=True
    ):
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_mask_rcnn_learns_and_is_measured_by_panoptic_masks(coco, tmp_path):
    masks = [
        f"masks={coco['train_panoptic']}",
        f"evaluation.uri={coco['val']}",
        f"evaluation.masks={coco['val_panoptic']}",
    ]
    kind = ["detector.kind=mask_rcnn_fpn", "detector.fpn_channels=16", "detector.score_threshold=0.0"]
    figures = finetune(settings_of(coco, "steps=1", *masks, *kind, *FEW), LocalRuntime(tmp_path))
    assert "train/loss_mask" in records(tmp_path)[-1]
    assert 0 <= figures["eval/mask_ap50"] <= 1 and 0 <= figures["eval/ap50"] <= 1


def test_boxes_from_elsewhere_of_one_category_are_trained_on_and_change_the_runs_identity(coco, tmp_path):
    rows = [(str(i), 5.0, 5.0, 30.0, 40.0, 1.0, "lost") for i in range(1, 13)]
    names = BOXES_SCHEMA.names

    def write(rows: list) -> str:
        table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=BOXES_SCHEMA)
        pq.write_table(table, tmp_path / "boxes.parquet")
        return str(tmp_path / "boxes.parquet")

    more = [f"boxes={write(rows)}", "class_agnostic=true", "steps=1", f"evaluation.uri={coco['val']}"]
    settings = settings_of(coco, *more)
    before = preflight(settings, 1)
    assert before.num_images == 12
    finetune(settings, LocalRuntime(tmp_path / "run"))
    report = json.loads(next((tmp_path / "run" / "artifacts" / "report").iterdir()).read_text())
    assert report["categories"] == ["object"]
    write(rows[:-1])
    assert preflight(settings, 1).manifest_sha256 != before.manifest_sha256
    with pytest.raises(CheckpointError, match="another dataset"):
        finetune(settings, LocalRuntime(tmp_path / "run"))


def test_a_fraction_trains_on_its_images_only(coco, tmp_path):
    from workloads.data.loading.ledger import read_ledger

    trained = {}
    for fraction in (0.5, 1.0):
        ledger = tmp_path / f"ledger-{fraction}"
        more = [f"fraction={fraction}", f"ledger={ledger}", "steps=3", "global_batch_size=2"]
        finetune(settings_of(coco, *more), LocalRuntime(tmp_path / str(fraction)))
        trained[fraction] = {image for line in read_ledger(ledger) for image, _ in line["trained"]}
    assert len(trained[0.5]) == 6
    assert preflight(settings_of(coco, "fraction=0.5"), 1).num_images == 6


@pytest.mark.parametrize(
    ("overrides", "error", "sentence"),
    [
        (["data.decode_size=48"], ConfigError, r"data\.decode_size: 48 is less than views\.long_side=64"),
        (["detector.kind=mask_rcnn_fpn"], ConfigError, "masks: needed"),
        (["masks=a.json", "boxes=b.parquet"], ConfigError, "boxes: give either boxes or masks"),
        (["trunk={kind: checkpoint, uri: nowhere}"], ConfigError, r"trunk\.uri: nowhere is not a checkpoint"),
        (
            ["trunk={kind: random, backbone: {name: vit_tiny}}"],
            ConfigError,
            r"trunk\.backbone\.name: a transformer, but a detector needs a ResNet",
        ),
        (["detector.statistics=batch"], ConfigError, r"detector\.statistics: batch normalises over each worker"),
        (["fraction=0.1"], ValueError, "has only 1 images"),
        (["boxes=nowhere.parquet"], DataError, "boxes: "),
        (["evaluation.uri=nowhere"], DataError, "nowhere"),
        (["detectors.kind=a"], ConfigError, r"did you mean detector\.kind"),
        (["loop=pretrain"], ConfigError, "loop: "),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(coco, overrides, error, sentence):
    with pytest.raises(error, match=sentence):
        preflight(settings_of(coco, *overrides), 2)


def test_a_loss_that_is_not_finite_names_the_images(coco, tmp_path):
    with pytest.raises(NonFiniteLossError, match="or set gradient_clip"):
        finetune(settings_of(coco, "optimizer.lr=1e30", "log_every=4"), LocalRuntime(tmp_path))


def test_the_loop_key_decides_which_loop_runs(coco, tmp_path, caplog):
    file = tmp_path / "experiment.yaml"
    file.write_text(
        to_yaml(settings_of(coco, "steps=1", "log_every=1", "data.lanes=4")) + "scaling: {num_workers: 2}\n"
    )
    assert isinstance(load_loop(file, {}), FinetuneConfig)
    with pytest.raises(ConfigError, match="loop: expected one of pretrain, finetune"):
        load_loop(file, {"loop": "finetunes"})
    assert "train/loss" in run_loop(load_loop(file, {}), LocalRuntime(tmp_path / "local"))
    assert main(["train", str(file), "--output", str(tmp_path / "wrong")]) == 2
    assert "is an experiment of the finetune loop, not of pretrain" in caplog.text
    assert main(["finetune", str(file), "--output", str(tmp_path / "two")]) == 0
    assert records(tmp_path / "two")[0]["train/loss"] == records(tmp_path / "local")[0]["train/loss"]
