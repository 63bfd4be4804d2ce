"""Training at 256 px on a GPU: views/s against the model alone on synthetic input, and SGA against time.

    python tests/benchmarks/gpu.py TRAIN HELDOUT --json gpu.json [--seconds 600] [key=value …]

Needs what `workloads` needs, not Ray. The limit is the same model, batch and precision fed with tensors that are already on
the device; `share_of_limit` is what the whole pipeline (read, decode, views, step) reaches of it.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from workloads.config import apply_overrides, build, parse_overrides, read_yaml
from workloads.loops.pretrain import pretrain
from workloads.parallel.runtime import LocalRuntime
from workloads.spec.factory import build_objective
from workloads.spec.optim import make_optimizer
from workloads.spec.pretrain import ORCHESTRATOR_SECTIONS, PretrainConfig
from workloads.types import CropGeometry, Views

EXPERIMENT = Path(__file__).parents[2] / "orchestrator" / "experiments" / "pretrain" / "anchor_ntxent_caltech.yaml"
GPU = {
    "views.full_size": 256,
    "views.crop_size": 64,
    "data.decode_size": 512,
    "global_batch_size": 256,
    "precision": "bf16",
    "log_every": 50,
    "evaluation.protocol.view_size": 256,
    "evaluation.protocol.grid": 32,
    "evaluation.protocol.pixel_windows": [24, 32, 40, 48, 56, 64],
}


class Timed(LocalRuntime):
    """Remembers when each record came."""

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.rows: list[dict] = []

    def report(self, metrics, *, step, artifacts=None):
        super().report(metrics, step=step, artifacts=artifacts)
        self.rows.append({"step": step, "seconds": time.monotonic() - self._started, **metrics})


def synthetic_rate(settings: PretrainConfig, device: torch.device, steps: int = 30) -> float:
    """Images/s of forward, backward and update on views that are already there."""
    model = build_objective(settings).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, settings.optimizer)
    b, k, size, crop = (
        settings.global_batch_size,
        settings.views.crops_per_image,
        settings.views.full_size,
        settings.views.crop_size,
    )
    corner = torch.rand(b, k, 2, device=device) * size * 0.75
    flips = torch.zeros(b, k, 2, dtype=torch.bool, device=device)
    views = Views(
        full=torch.rand(b, 3, size, size, device=device),
        crops=torch.rand(b, k, 3, crop, crop, device=device),
        geometry=CropGeometry(
            box_xyxy=torch.cat([corner, corner + size * 0.17], -1),
            crop_flips=flips,
            full_flips=flips[:, 0],
            full_size_hw=(size, size),
            crop_size_hw=(crop, crop),
        ),
        valid=torch.ones(b, dtype=torch.bool, device=device),
        positions=torch.arange(b, device=device),
        epoch=0,
    )
    for step in range(steps + 5):
        if step == 5:
            _wait(device)
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = model(views).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    _wait(device)
    return steps * b / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("heldout")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()
    data = {k: v for k, v in read_yaml(EXPERIMENT).items() if k not in ORCHESTRATOR_SECTIONS}
    overrides = {
        **GPU,
        "data.uri": options.train,
        "evaluation.uri": options.heldout,
        **parse_overrides(options.overrides),
    }
    settings = build(PretrainConfig, apply_overrides(data, overrides))
    with tempfile.TemporaryDirectory() as scratch:
        probe = Timed(Path(scratch, "probe"))
        limit = synthetic_rate(settings, probe.device)
        # As many steps as fit, at nine tenths of the limit and a tenth of the time for evaluation.
        steps = max(20, int(0.8 * options.seconds * limit / settings.global_batch_size))
        overrides |= {"steps": steps, "evaluation.every_steps": max(10, steps // 10)}
        settings = build(PretrainConfig, apply_overrides(data, overrides))
        runtime = Timed(Path(scratch, "run"))
        figures = pretrain(settings, runtime)
        rates = [row["train/images_per_s"] for row in runtime.rows if "train/images_per_s" in row][1:]
    rate = sorted(rates)[len(rates) // 2]
    keys = ("step", "seconds", "eval/sga", "eval/photometric/sga", "eval/pixel", "eval/gap_r", "eval/photometric/gap_r")
    result = {
        "device": torch.cuda.get_device_name() if runtime.device.type == "cuda" else "cpu",
        "images_per_s": rate,
        "views_per_s": rate * (1 + settings.views.crops_per_image),
        "synthetic_images_per_s": limit,
        "share_of_limit": rate / limit,
        "curve": [{k: row[k] for k in keys if k in row} for row in runtime.rows if "eval/sga" in row],
        "figures": figures,
    }
    options.json.write_text(json.dumps(result, indent=2))
    print(json.dumps({k: v for k, v in result.items() if k != "figures"}, indent=2))


if __name__ == "__main__":
    main()
