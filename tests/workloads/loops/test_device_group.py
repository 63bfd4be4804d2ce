"""Every loop on two ranks whose default process group refuses tensors on the host, as NCCL's does on a GPU machine."""

import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.datasets.build import build_dataset
from tests.processes import DEVICE_ONLY, run_on_ranks
from tests.workloads.data.images import make_folder
from workloads.config import build
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.evaluation.one_shot import OneShotRunConfig, one_shot
from workloads.evaluation.pretraining import evaluate
from workloads.loops.discovery.job import DiscoverConfig
from workloads.loops.discovery.loop import discover
from workloads.loops.finetune import FinetuneConfig, evaluate_detector, finetune
from workloads.loops.pretrain import pretrain
from workloads.parallel.distributed import wait_for_all
from workloads.parallel.runtime import LocalRuntime
from workloads.spec.pretrain import PretrainConfig

PROTOCOL = {
    "view_size": 64, "crop_size": 16, "grid": 8, "levels": ["P3"], "crops_per_image": 2, "untrained_networks": 1, "bootstrap": 100,
}  # fmt: skip


def pretraining(labelled: str) -> PretrainConfig:
    return build(
        PretrainConfig,
        {
            "steps": 1, "global_batch_size": 4, "data": {"uri": labelled},
            "views": {"full_size": 64, "crop_size": 16, "crops_per_image": 2},
            "backbone": {"norm": "group"},
            "objective": {"levels": ["P3"], "projection_dim": 16, "projector_hidden": 16},
            "evaluation": {
                "uri": labelled, "at_start": False, "batch_size": 4, "limit": 7, "heatmaps": 1, "protocol": PROTOCOL,
                "representation": {"train_uri": labelled, "view_size": 32, "per_class": 4, "neighbours": 3, "bootstrap": 100},
            },
        },
    )  # fmt: skip


def finetuning(coco: dict[str, str]) -> FinetuneConfig:
    return build(
        FinetuneConfig,
        {
            "steps": 1, "global_batch_size": 4, "data": {"uri": coco["train"], "decode_size": 64},
            "views": {"short_side": 48, "long_side": 64},
            "detector": {"kind": "retinanet", "fpn_channels": 16, "smallest_anchor": 8.0, "statistics": "frozen"},
            "optimizer": {"kind": "sgd", "lr": 0.001},
            "evaluation": {"uri": coco["val"], "batch_size": 5, "pictures": 1, "resamples": 20},
        },
    )  # fmt: skip


ONE_SHOT = {
    "view_size": 64, "crop_size": 16, "grid": 16, "least_side": 8, "untrained_networks": 0, "pixel_windows": [8], "resamples": 50,
}  # fmt: skip


def every_loop(rank: int, _: int, labelled: str, coco: dict[str, str], output: str) -> dict[str, Any]:
    folder = Path(output)

    def runtime(name: str) -> LocalRuntime:
        return LocalRuntime(folder / name)

    tempfile.tempdir = str(folder.parent / "temporary")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    figures: dict[str, Any] = {}
    settings = pretraining(labelled)
    figures["pretrain"] = pretrain(settings, runtime("pretrain"))
    checkpoint = folder / "pretrain" / "checkpoints" / "step_00000001"
    wait_for_all()  # for rank 0's checkpoint, as between two commands
    figures["evaluate"] = evaluate(checkpoint, config=settings.evaluation, runtime=runtime("evaluate"))
    detection = finetuning(coco)
    figures["finetune"] = finetune(detection, runtime("finetune"))
    trained = folder / "finetune" / "checkpoints" / "step_00000001"
    wait_for_all()
    figures["detector"] = evaluate_detector(str(trained), settings=detection.evaluation, runtime=runtime("detector"))
    looking = build(
        DiscoverConfig, {"uri": coco["val"], "methods": ["centre"], "part_size": 3, "gallery": 1, "decode_threads": 1}
    )
    if rank == 1:  # arrives late, when the other may have done parts already
        deadline = time.monotonic() + 1.0
        while not list(folder.glob("discover/_parts/*/part-*.parquet")) and time.monotonic() < deadline:
            time.sleep(0.01)
    figures["discover"] = discover(looking, runtime("discover"), str(folder / "discover"))
    shooting = build(OneShotRunConfig, {"uri": coco["val"], "gallery": 1, "top": 2, "protocol": ONE_SHOT})
    figures["one_shot"] = one_shot(checkpoint, shooting, runtime("one_shot"))
    return figures


def test_every_loop_runs_and_measures_every_image(coco, tmp_path):
    make_folder(tmp_path / "images", classes=2, per_class=8)
    source = FolderSourceConfig(inputs=(str(tmp_path / "images"),))
    build_dataset(BuildConfig(source=source, output=str(tmp_path / "shards"), row_group_bytes=8000))
    arguments = (str(tmp_path / "shards"), coco, str(tmp_path / "runs"))
    first, second = run_on_ranks(every_loop, 2, tmp_path / "ranks", *arguments, backend=DEVICE_ONLY)
    for name in ("pretrain", "evaluate"):
        assert first[name]["eval/images"] == second[name]["eval/images"] == 7 and first[name]["eval/knn_images"] == 8
        assert first[name]["eval/sga"] == second[name]["eval/sga"]
    assert {"eval/gap_r", "eval/linear"} <= first["evaluate"].keys()
    for name in ("finetune", "detector"):  # every rank decides on these, so every rank has them
        figures = [{k: v for k, v in rank[name].items() if not k.startswith("speed/")} for rank in (first, second)]
        assert figures[0] == figures[1] and figures[0]["eval/images"] == 16 and "eval/ap50" in figures[0]
    assert first["discover"]["discover/images"] == 16 and "eval/corloc" in first["discover"]
    assert first["one_shot"]["eval/one_shot/queries"] > 10 and second["one_shot"] == {}
    assert not list((tmp_path / "temporary").glob("report-*"))  # artifacts were moved, and only rank 0 made any
