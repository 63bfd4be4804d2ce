"""Measures the share of a detection evaluation outside the detector's forward pass: python -m tests.benchmarks.detection --json

An untrained RetinaNet-R18 that returns 100 boxes for every image, the most that count, on the images of --data or else on
synthetic ones. The share is of wall time: reading and decoding, rendering, gathering, pycocotools and its bootstrap.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from tests.workloads.data.images import make_coco
from workloads.config import build
from workloads.data.store.manifest import open_dataset
from workloads.data.store.objects import category_names, read_objects
from workloads.evaluation.detection import DetectionEvaluation
from workloads.loops.finetune import FinetuneConfig, build_detector
from workloads.parallel.runtime import LocalRuntime


def measure(uri: str, *, short_side: int, long_side: int, repeats: int) -> dict[str, float]:
    """Seconds of an evaluation and the share that is not the detector's, the median of `repeats`."""
    settings = build(
        FinetuneConfig,
        {
            "data": {"uri": uri, "decode_size": long_side},
            "views": {"short_side": short_side, "long_side": long_side},
            "detector": {"fpn_channels": 128, "smallest_anchor": 16.0, "score_threshold": 0.0},
            "evaluation": {"uri": uri, "batch_size": 16, "pictures": 0},
        },
    )
    dataset = open_dataset(uri)
    names = category_names(dataset, read_objects(dataset), class_agnostic=False)
    with tempfile.TemporaryDirectory() as output:
        runtime = LocalRuntime(output)
        detector = build_detector(settings, names).to(runtime.device)
        evaluation = DetectionEvaluation(
            settings.evaluation,
            dataset,
            views=settings.views,
            reading=settings.data,
            categories=names,
            class_agnostic=False,
            runtime=runtime,
        )
        rows = []
        for _ in range(repeats + 1):  # the first warms up
            began = time.perf_counter()
            figures = evaluation.run(detector, step=0, report=False)
            rows.append((1 - figures["speed/forward_share"], time.perf_counter() - began))
    share, seconds = sorted(rows[1:])[len(rows[1:]) // 2]
    return {"images": figures["eval/images"], "seconds": seconds, "beyond_forward_share": share}


def main() -> None:
    """Print the figures; with --json as one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="dataset with objects, as COCO's; default: synthetic images")
    parser.add_argument("--short-side", type=int, default=192)
    parser.add_argument("--long-side", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        uri = options.data or synthetic_dataset(Path(folder))
        figures = measure(uri, short_side=options.short_side, long_side=options.long_side, repeats=options.repeats)
    result = {**figures, "threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps(result, indent=1) if options.json else result)


def synthetic_dataset(folder: Path) -> str:
    """Address of a dataset of 64 synthetic images with their objects."""
    from orchestrator.datasets.build import build_dataset
    from workloads.data.build.shards import BuildConfig
    from workloads.data.build.sources import CocoSourceConfig

    root = make_coco(folder / "coco", count=64)
    source = CocoSourceConfig(inputs=(str(root / "images"),), annotations=str(root / "instances.json"))
    build_dataset(BuildConfig(source=source, output=str(folder / "shards")))
    return str(folder / "shards")


if __name__ == "__main__":
    main()
