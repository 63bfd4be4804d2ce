"""Measures what a pretrained trunk is worth to a detector: AP50 of the same short fine-tuning from several trunks, over seeds.

python -m tests.benchmarks.transfer --train COCO_TRAIN --val COCO_VAL --trunk ours=CHECKPOINT --output DIR [key=value …]

`random` is always among them. Finished runs are read, not repeated, so a table can be made in several sessions.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from workloads.config import parse_overrides
from workloads.loops.dispatch import load_loop
from workloads.loops.finetune import FinetuneConfig, finetune
from workloads.parallel.runtime import LocalRuntime

EXPERIMENT = Path("orchestrator/experiments/finetune_retinanet_coco.yaml")
_SHOWN = ("eval/ap50", "eval/ap", "eval/ar")


def one_run(settings: FinetuneConfig, output: Path) -> dict[str, float]:
    """The last evaluation of the run in `output`, which is trained to its end first if it has not ended."""
    records = output / "metrics.jsonl"
    if not (records.is_file() and _last(records, settings.steps)):
        runtime = LocalRuntime(output, stream=sys.stderr)
        finetune(settings, runtime)
        runtime.close()
    figures = _last(records, settings.steps)
    assert figures is not None
    return figures


def _last(records: Path, step: int) -> dict[str, float] | None:
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    return next((line for line in reversed(lines) if line["step"] == step and "eval/ap50" in line), None)


def main() -> None:
    """Print one line a trunk: mean, least and most over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--trunk", action="append", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    trunks: dict[str, dict[str, Any]] = {"random": {"kind": "random"}}
    for given in options.trunk:
        name, _, uri = given.partition("=")
        trunks[name] = {"kind": "checkpoint", "uri": uri}
    table: dict[str, dict[str, list[float]]] = {name: {key: [] for key in _SHOWN} for name in trunks}
    for seed in range(options.seeds):  # seed by seed, so that an early end still compares
        for name, trunk in trunks.items():
            overrides = {
                "data.uri": options.train,
                "evaluation.uri": options.val,
                "trunk": trunk,
                "seed": seed,
                **parse_overrides(options.overrides),
            }
            settings = load_loop(EXPERIMENT, overrides, loop="finetune")
            assert isinstance(settings, FinetuneConfig)
            figures = one_run(settings, options.output / f"{name}-{seed}")
            for key in _SHOWN:
                table[name][key].append(figures.get(key, float("nan")))
    gains = {
        name: [ours - theirs for ours, theirs in zip(row["eval/ap50"], table["random"]["eval/ap50"], strict=True)]
        for name, row in table.items()
    }
    if options.json:
        print(json.dumps({"runs": table, "ap50_over_random": gains}, indent=1))
        return
    for name, row in table.items():
        parts = [
            f"{key.removeprefix('eval/')} {statistics.mean(v):.4f} [{min(v):.4f}, {max(v):.4f}]"
            for key, v in row.items()
        ]
        print(f"{name:<12} {'   '.join(parts)}   ap50 over random {statistics.mean(gains[name]):+.4f}")


if __name__ == "__main__":
    main()
