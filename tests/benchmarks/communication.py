"""Measures and models the bytes that ranks exchange in one step, and estimates their time on 8, 64 and 512 GPUs.

    python tests/benchmarks/communication.py --json communication.json

Measured on real gloo ranks by counting the bytes of each collective; the model must agree exactly. The time on larger clusters
follows the usual cost model: an all-reduce of S bytes over W ranks moves 2 (W-1)/W S through each rank's link, an all-gather
(W-1)/W S, and each takes 2 log2 W consecutive messages. It is an upper bound, since DDP overlaps most of the gradients with
computation.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from orchestrator.datasets.build import build_dataset  # noqa: E402
from orchestrator.demo.scenes import write_scenes  # noqa: E402
from tests.processes import run_on_ranks  # noqa: E402
from workloads.config import build  # noqa: E402
from workloads.data.build.shards import BuildConfig  # noqa: E402
from workloads.data.build.sources import FolderSourceConfig  # noqa: E402
from workloads.spec.factory import build_objective  # noqa: E402
from workloads.spec.pretrain import PretrainConfig  # noqa: E402

BATCH, CROPS, DIM, LEVELS = 12, 4, 64, ("P3", "P4", "P5")
SHORT, LONG = 2, 5

LINKS = {
    # Most GPUs that it joins, bytes per second of one GPU's way out, seconds of one message; half of the data sheets' figures.
    "NVLink 4, within a machine": (8, 225e9, 5e-6),
    "400 Gb/s for each GPU": (1024, 25e9, 15e-6),
    "100 Gb/s for each machine of 8": (1024, 0.8e9, 30e-6),
}
BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {"measured": {}, "step_ms": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_scenes(folder / "images", split="train", count=48)
        source = FolderSourceConfig(inputs=(str(folder / "images"),))
        build_dataset(BuildConfig(source=source, output=str(folder / "shards")))
        for ranks in (2, 3):
            counts = {}
            for steps in (SHORT, LONG):
                values = settings(str(folder / "shards"), steps)
                counts[steps] = run_on_ranks(counted, ranks, folder / f"{ranks}-{steps}", values)[0]
            step = {kind: (counts[LONG][kind] - counts[SHORT][kind]) // (LONG - SHORT) for kind in counts[LONG]}
            said = model(parameters(settings("", 1)), ranks=ranks, rows=BATCH * CROPS, levels=len(LEVELS), dim=DIM)
            print(f"{ranks} ranks: measured {step}, modelled {said}", file=sys.stderr)
            result["measured"][ranks] = {"measured": step, "modelled": said}
    for name, architecture in (("ResNet-18", "resnet18"), ("ResNet-50", "resnet50")):
        values = settings("", 1)
        values["backbone"]["name"] = architecture
        count = parameters(values)
        for gpus in (8, 64, 512):
            said = model(count, ranks=gpus, rows=32 * gpus * CROPS, levels=len(LEVELS), dim=DIM)
            result["step_ms"][f"{name}, {gpus} GPUs, 32 images each"] = {
                "bytes": said,
                **{
                    link: round(1000 * seconds(said, gpus, speed, message), 2)
                    for link, (most, speed, message) in LINKS.items()
                    if gpus <= most
                },
            }
    options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def settings(uri: str, steps: int) -> dict[str, Any]:
    """A run that exchanges as much as a real one, with small images."""
    return {
        "name": "communication",
        "steps": steps,
        "global_batch_size": BATCH,
        "log_every": 100,
        "checkpoint_every": None,
        "checkpoint_epochs": None,
        "data": {"uri": uri, "decode_size": 64, "lanes": 12},
        "views": {"full_size": 64, "crop_size": 32, "crops_per_image": CROPS},
        "backbone": {"norm": "group"},
        "objective": {"kind": "anchor_ntxent", "levels": list(LEVELS), "projection_dim": DIM, "crop_stages": ["C2"]},
        "evaluation": {"uri": None},
    }


def parameters(values: dict[str, Any]) -> int:
    """Number of trained parameters of the objective."""
    module = build_objective(build(PretrainConfig, values))
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def model(count: int, *, ranks: int, rows: int, levels: int, dim: int) -> dict[str, int]:
    """Bytes of one step's collectives, as the size of their result on each rank.

    Args:
        rows: crops of the global batch.
    """
    padded = ranks * -(-rows // ranks)  # an all-gather is of equal parts
    return {
        "gradients": 4 * count,
        # For each level: the positive cells' embeddings, the image's number and whether it counts, and how many rows there are.
        "embeddings": levels * (padded * (4 * dim + 8 + 8) + 8 * ranks),
        "embeddings_backward": levels * rows * 4 * dim,
    }


def seconds(step: dict[str, int], ranks: int, bytes_per_s: float, message_s: float) -> float:
    """The time of one step's collectives, one after the other."""
    share = (ranks - 1) / ranks
    reduced = step["gradients"] + step["embeddings_backward"]
    # For each level four gathers and one reduction, then the gradients' buckets and the sums of loss and metrics.
    collectives = 5 * len(LEVELS) + math.ceil(step["gradients"] / BUCKET) + 2
    return (2 * share * reduced + share * step["embeddings"]) / bytes_per_s + (
        collectives * 2 * math.log2(ranks) * message_s
    )


def counted(rank: int, world_size: int, values: dict[str, Any]) -> dict[str, int]:
    """Train on this rank, and count the bytes of each collective."""
    from workloads.loops.pretrain import pretrain
    from workloads.parallel import runtime

    found: Counter[str] = Counter()
    gather, reduce, wrap = dist.all_gather, dist.all_reduce, runtime.averaging_gradients

    def all_gather(parts: list[torch.Tensor], part: torch.Tensor, *rest: Any, **more: Any) -> Any:
        found["embeddings"] += sum(p.numel() * p.element_size() for p in parts)
        return gather(parts, part, *rest, **more)

    def all_reduce(value: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if value.ndim != 1 or value.numel() < 1000:  # else a bucket of gradients, which the hook counts
            kind = "embeddings_backward" if value.ndim == 2 and value.shape[1] == DIM else "sums"
            found[kind] += value.numel() * value.element_size()
        return reduce(value, *rest, **more)

    def averaging(module: torch.nn.Module, device: torch.device, size: int) -> Any:
        wrapped: Any = wrap(module, device, size)

        def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            buffer = bucket.buffer()
            found["gradients"] += buffer.numel() * buffer.element_size()
            return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

        wrapped.register_comm_hook(None, hook)
        return wrapped

    dist.all_gather, dist.all_reduce, runtime.averaging_gradients = all_gather, all_reduce, averaging
    with tempfile.TemporaryDirectory() as output:
        pretrain(build(PretrainConfig, values), runtime.LocalRuntime(output))
    return dict(found)


if __name__ == "__main__":
    main()
