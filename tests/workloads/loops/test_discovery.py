"""Discovery over a dataset: every image once, the same whatever the parts, files for a detector, figures, a detector's boxes."""

import contextlib
import io
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from orchestrator.datasets.build import build_dataset
from tests.workloads.data.images import encoded, picture
from workloads.__main__ import main
from workloads.config import apply_overrides, build, parse_overrides
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.data.store.annotations import read_annotations
from workloads.data.store.manifest import open_dataset
from workloads.data.store.objects import read_objects
from workloads.discovery.components import FeaturesError
from workloads.discovery.pseudo_boxes import read_boxes
from workloads.errors import ConfigError
from workloads.loops.discovery.finish import DiscoveryError, finish, read_parts
from workloads.loops.discovery.job import DiscoverConfig, Job, prepare
from workloads.loops.discovery.worker import PartWorker, check_tokencut_fits
from workloads.metrics.corloc import corloc_hits
from workloads.models.vit import VitConfig, VitTrunk

TINY = {
    "trunk": {"kind": "vit", "vit": {"depth": 2}},
    "part_size": 5,
    "batch_size": 4,
    "gallery": 0,
    "decode_threads": 1,
}


def settings_of(uri: str, *overrides: str) -> DiscoverConfig:
    return build(DiscoverConfig, apply_overrides({**TINY, "uri": uri}, parse_overrides(overrides)))


def complete(settings: DiscoverConfig, output: Path) -> dict[str, float]:
    job = prepare(settings, str(output))
    worker = PartWorker(job)
    for part in job.missing():
        worker.run(part)
    return dict(finish(job, output / "pictures").figures)


def test_parts_and_batches_change_no_box(coco: dict[str, str], tmp_path: Path) -> None:
    methods = "methods=[lost, tokencut, cls_attention, whole, centre, random, felzenszwalb]"
    figures = complete(settings_of(coco["train"], methods), tmp_path / "a")
    again = complete(settings_of(coco["train"], methods, "part_size=16", "batch_size=7"), tmp_path / "b")
    assert figures == again
    ids = sorted(read_annotations(open_dataset(coco["train"])))
    for method in ("lost", "tokencut", "cls_attention", "whole", "centre", "random", "felzenszwalb"):
        one, other = (pq.read_table(tmp_path / x / method / "boxes.parquet") for x in "ab")
        assert one.equals(other) and sorted(one["image_id"].to_pylist()) == ids
        as_json = read_boxes(str(tmp_path / "a" / method / "boxes.json"))
        np.testing.assert_allclose(
            as_json.boxes_xyxy, read_boxes(str(tmp_path / "a" / method / "boxes.parquet")).boxes_xyxy
        )
    assert not list((tmp_path / "a" / "_parts").glob("*"))
    assert figures["eval/images"] == 12 and figures["eval/images_without_objects"] == 4
    # The figures are those of the files.
    boxes = read_boxes(str(tmp_path / "a" / "felzenszwalb" / "boxes.parquet"))
    hits = corloc_hits(boxes.best(), read_annotations(open_dataset(coco["train"])))
    assert figures["eval/felzenszwalb/corloc"] == hits.hit.mean() > 0.3  # the squares stand out
    assert figures["eval/whole/corloc"] == 0 and figures["eval/corloc"] == figures["eval/lost/corloc"]
    gain = figures["eval/felzenszwalb/corloc"] - figures["eval/centre/corloc"]
    assert figures["eval/felzenszwalb/gain_over_centre"] == pytest.approx(gain)


def test_the_boxes_train_a_detector_whose_boxes_are_measured(coco: dict[str, str], tmp_path: Path) -> None:
    complete(
        settings_of(coco["train"], "methods=[felzenszwalb]", "clusters.count=4", "clusters.crop_size=32"),
        tmp_path / "found",
    )
    boxes = str(tmp_path / "found" / "felzenszwalb" / "boxes.parquet")
    objects = read_objects(open_dataset(coco["train"]), boxes=boxes)
    categories = {name for item in objects.values() for name in item.categories}
    assert categories <= {f"cluster_{i:03d}" for i in range(4)} and len(categories) > 1

    experiment = tmp_path / "finetune.yaml"
    experiment.write_text(
        f"""
loop: finetune
steps: 3
global_batch_size: 4
boxes: {boxes}
data: {{uri: {coco["train"]}, decode_size: 96}}
views: {{short_side: 48, long_side: 64}}
detector: {{kind: retinanet, fpn_channels: 16, smallest_anchor: 8.0, statistics: frozen, score_threshold: 0.0}}
optimizer: {{kind: sgd, lr: 0.001}}
"""
    )
    assert main(["finetune", str(experiment), "--output", str(tmp_path / "run")]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    options = (f"detector={checkpoint}", f"match.boxes={boxes}", f"match.uri={coco['train']}")
    figures = complete(settings_of(coco["val"], "methods=[detector, centre]", *options), tmp_path / "val")
    found = read_boxes(str(tmp_path / "val" / "detector" / "boxes.parquet"))
    assert len(found) > 16 and set(found.categories) <= categories
    assert 0 <= figures["eval/ap50"] <= 1 and "eval/gain_over_centre" in figures
    record = json.loads((tmp_path / "val" / "figures.json").read_text())
    assert set(record["classes"]["ap50"]) == {"square", "bar", "mean"}
    assert figures["eval/matched_ap50"] == record["classes"]["ap50"]["mean"]
    assert set(record["classes"]["match"].values()) <= {"square", "bar"}


def test_a_part_that_is_missing_damaged_or_double_is_noticed(coco: dict[str, str], tmp_path: Path) -> None:
    settings = settings_of(coco["val"], "methods=[centre]")
    job = prepare(settings, str(tmp_path / "out"))
    assert (job.num_parts, [job.images_in(p) for p in range(4)]) == (4, [4, 4, 4, 4]) and job.missing() == [0, 1, 2, 3]
    worker = PartWorker(job)
    assert [worker.run(part) for part in (0, 1, 3)] == [4, 4, 4]
    with pytest.raises(DiscoveryError, match="1 of 4 parts are missing, the first is 2"):
        finish(job, tmp_path)
    Path(job.part_path(2)).write_bytes(Path(job.part_path(1)).read_bytes())
    with pytest.raises(DiscoveryError, match="16 rows of 12 images, expected each of 16 once"):
        read_parts(job)
    Path(job.part_path(2)).write_bytes(b"PAR1")
    with pytest.raises(DiscoveryError, match="is damaged"):
        read_parts(job)
    Path(job.part_path(2)).unlink()
    worker.run(2)
    assert finish(job, tmp_path).figures["discover/images"] == 16


def test_a_finished_output_is_kept_and_another_request_refused(coco: dict[str, str], tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out")]
    command = ["discover", f"uri={coco['val']}", "methods=[centre]", "gallery=3", *output]
    assert main(command) == 0
    assert (tmp_path / "out" / "artifacts" / "gallery" / "boxes.png").is_file()
    before = (tmp_path / "out" / "centre" / "boxes.parquet").stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "out" / "centre" / "boxes.parquet").stat().st_mtime_ns == before
    assert main([*command, "centre.side=0.5"]) == 2


def test_images_that_do_not_decode_are_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(encoded(picture(i)))
    output = tmp_path / "shards"
    build_dataset(BuildConfig(source=FolderSourceConfig(inputs=(str(folder),)), output=str(output)))
    # A file that is whole as Parquet, and an image in it that is none.
    dataset = open_dataset(str(output))
    shard = Path(dataset.shard_path(0))
    data = bytearray(shard.read_bytes())
    start = data.find(b"\xff\xd8\xff")
    job = prepare(settings_of(str(output), "methods=[lost, centre]"), str(tmp_path / "out"))
    worker = PartWorker(job)
    batches = list(worker._batches(0))
    assert start > 0 and len(batches) == 1
    batch = batches[0]
    batch.valid[1], batch.images[1], batch.content_hw[1], batch.source_hw[1] = False, 0, 0, 0
    rows = worker._rows(batch)
    assert [(r["image_id"] == batch.image_ids[1], r["x0"] is None, r["decoded"]) for r in rows] == [
        (i == 1, i == 1, i != 1) for i in (0, 0, 1, 1, 2, 2)
    ]


def test_features_that_are_not_finite_name_the_images(coco: dict[str, str], tmp_path: Path) -> None:
    job = prepare(settings_of(coco["val"]), str(tmp_path / "out"))
    worker = PartWorker(job)
    torch.nn.init.constant_(worker._extractor.trunk.body.cls_token, torch.nan)
    with pytest.raises(FeaturesError, match=r"lost: .* not finite.*among the images \d+"):
        worker.run(0)
    assert job.missing() == [0, 1, 2, 3]


def test_boxes_of_another_program_are_measured(coco: dict[str, str], tmp_path: Path) -> None:
    truth = read_annotations(open_dataset(coco["val"]))
    found = {f"{name}.jpg": item.boxes_xyxy[0].tolist() for name, item in truth.items() if len(item.boxes_xyxy)}
    left_out = sorted(found)[0]
    del found[left_out]
    (tmp_path / "preds.json").write_text(json.dumps(found))
    figures = complete(settings_of(coco["val"], "methods=[file]", f"file={tmp_path / 'preds.json'}"), tmp_path / "out")
    assert figures["eval/corloc"] == pytest.approx(11 / 12)
    assert len(read_boxes(str(tmp_path / "out" / "file" / "boxes.json"))) == 11


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["methods=[file]"], "file: give it together"),
        (["methods=[lost, lost]"], "name each one once"),
        (["trunk=null"], "trunk.kind: needed by these methods"),
        (["lost.k=0"], "lost.k"),
        (["lost.kk=1"], "did you mean lost.k"),
        (["methods=[detector]"], "detector: give it together"),
        (["match.uri=x"], "match.boxes: give match.boxes and match.uri together"),
    ],
)
def test_a_wrong_request_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of("somewhere", *overrides)


def test_trunks_that_do_not_fit_are_refused(coco: dict[str, str], tmp_path: Path) -> None:
    for overrides, message in (
        (["methods=[cls_attention]", "trunk.kind=random"], "needs a transformer"),
        (["trunk.kind=checkpoint", f"trunk.uri={tmp_path}/nothing"], "nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            PartWorker(prepare(settings_of(coco["val"], *overrides), str(tmp_path / "x")))


def test_random_weights_are_the_seeds(coco: dict[str, str], tmp_path: Path) -> None:
    def boxes(name: str, *overrides: str) -> np.ndarray:
        complete(settings_of(coco["val"], *overrides), tmp_path / name)
        return read_boxes(str(tmp_path / name / "lost" / "boxes.parquet")).boxes_xyxy

    torch.manual_seed(5)
    first, again, other = boxes("a"), boxes("b"), boxes("c", "seed=1")
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_identity_is_what_decides_boxes(coco: dict[str, str], tmp_path: Path) -> None:
    def job(*overrides: str) -> Job:
        return prepare(settings_of(coco["val"], *overrides), str(tmp_path / "x"))

    weights = tmp_path / "weights.pth"
    state = VitTrunk(VitConfig(depth=2)).body.state_dict()
    torch.save(state, weights)
    with_file = f"trunk.vit.weights={weights}"
    before = job(with_file).identity
    torch.save({name: value + 1 for name, value in state.items()}, weights)
    assert job(with_file).identity != before
    assert job().identity == job("batch_size=2", "gallery=3").identity
    assert len({job(*o).identity for o in ([], ["lost.k=3"], ["seed=1"], ["limit=4"], ["long_side=32"])}) == 5


def test_an_image_too_large_for_tokencut_is_refused_before_any_is_decoded(coco: dict[str, str]) -> None:
    dataset = open_dataset(coco["val"])
    largest = max((item.size_hw for item in read_annotations(dataset).values()), key=lambda hw: hw[0] * hw[1])
    cells = -(-largest[0] // 2) * -(-largest[1] // 2)
    check_tokencut_fits(settings_of(coco["val"]), dataset, 2, 48 * cells**2)
    with pytest.raises(
        ConfigError, match=rf"long_side: tokencut needs .*\({cells:,} cells\).* set long_side=(\d+)"
    ) as refused:
        check_tokencut_fits(settings_of(coco["val"]), dataset, 2, 48 * cells**2 - 1)
    fits = re.search(r"long_side=(\d+)", str(refused.value))
    assert fits is not None
    check_tokencut_fits(settings_of(coco["val"], f"long_side={fits[1]}"), dataset, 2, 48 * cells**2 - 1)


def test_weights_that_do_not_load_are_refused_before_work_starts(coco: dict[str, str], tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"weights: .*weights\.pth holds another model"):
        prepare(settings_of(coco["val"], f"trunk.vit.weights={tmp_path / 'weights.pth'}"), str(tmp_path / "x"))


class _EndsAtTheFirstPart(io.StringIO):
    """A terminal that sends SIGTERM to the process when the first part is shown as done."""

    def write(self, text: str) -> int:
        if text.startswith("step 10/"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_sigterm_ends_the_command_and_the_same_command_continues(
    coco: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    command = [
        "discover",
        f"uri={coco['val']}",
        "methods=[centre]",
        "gallery=0",
        "part_size=4",
        "--output",
        str(output),
    ]
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(_EndsAtTheFirstPart()):
        assert main(command) == 1 and "stopped on request" in caplog.text
    assert len(list(output.glob("_parts/*/part-*.parquet"))) == 1 and signal.getsignal(signal.SIGTERM) == before
    assert main(command) == 0
    assert json.loads((output / "figures.json").read_text())["figures"]["discover/images"] == 16
