"""Makes the table of discovery: CorLoc and class-agnostic AP50 of each method and trunk, and of detectors trained on the boxes.

    python tests/benchmarks/discovery_trunks.py TRAIN VAL --work DIR --json table.json \\
        --trunk random18 kind=random --trunk tiny kind=vit,vit.name=vit_tiny --trunk ours kind=checkpoint,uri=CHECKPOINT \\
        [--methods lost,tokencut,cls_attention,centre] [--cad lost,centre] [--clusters 100] [--steps 200] [key=value …]

For each trunk, both datasets are searched. With --cad, a class-agnostic RetinaNet-R18 is trained on the training images'
boxes of each method named, from the trunk if that is a ResNet's checkpoint, else from random weights; with --clusters, another
one on the clusters of the first method's boxes, whose AP50 by class follows the Hungarian match on the training images. Both
are measured on VAL. Results that are in DIR already are read, not computed again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from orchestrator.discovery.run import table
from workloads.config import apply_overrides, build, parse_overrides
from workloads.loops.discovery.job import DiscoverConfig, trunk_of
from workloads.models.vit import VitTrunk

EXPERIMENT = Path(__file__).parents[2] / "orchestrator" / "experiments" / "finetune" / "finetune_retinanet_coco.yaml"


def run(command: str, *arguments: str, output: Path) -> None:
    """One command of `python -m workloads`; its lines go to a file beside the output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{output}.log").open("w") as log:
        line = [sys.executable, "-m", "workloads", command, *arguments, "--output", str(output)]
        subprocess.run(line, check=True, stdout=log, stderr=log)


def discover(dataset: str, output: Path, *arguments: str) -> dict[str, float]:
    """The figures of one discovery."""
    run("discover", f"uri={dataset}", *arguments, output=output)
    return json.loads((output / "figures.json").read_text())["figures"]


def detector(train: str, boxes: Path, output: Path, trunk: list[str], steps: int, *more: str) -> str:
    """The checkpoint of a detector trained on `boxes`."""
    start = [f"trunk.{part}" for part in trunk] if trunk[0] == "kind=checkpoint" else ["trunk.kind=random"]
    options = [f"data.uri={train}", f"boxes={boxes}", f"steps={steps}", "evaluation.uri=null", *start, *more]
    run("finetune", str(EXPERIMENT), *options, output=output)
    return str(output / "checkpoints" / f"step_{steps:08d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--trunk", nargs=2, action="append", required=True, metavar=("NAME", "KEYS"))
    parser.add_argument("--methods", default="lost,tokencut,centre")
    parser.add_argument("--cad", default="")
    parser.add_argument("--clusters", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_intermixed_args()
    train, val = (str(Path(uri).resolve()) for uri in (options.train, options.val))
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, keys in options.trunk:
        trunk, work = keys.split(","), (options.work / name).resolve()
        common = [*(f"trunk.{part}" for part in trunk), *options.overrides]
        settings = build(DiscoverConfig, apply_overrides({"uri": val}, parse_overrides(common)))
        is_vit = isinstance(trunk_of(settings), VitTrunk)
        methods = [m for m in options.methods.split(",") if is_vit or m != "cls_attention"]
        clusters = [f"clusters.count={options.clusters}"] if options.clusters else []
        asked = f"methods=[{','.join(methods)}]"
        result[name] = {
            "train": discover(train, work / "train", asked, *common, *clusters),
            "val": discover(val, work / "val", asked, *common),
        }
        show(f"{name}, val", result[name]["val"], methods)
        for method in filter(None, options.cad.split(",")):
            boxes = work / "train" / method / "boxes.parquet"
            checkpoint = detector(train, boxes, work / f"cad_{method}", trunk, options.steps, "class_agnostic=true")
            figures = discover(val, work / f"val_cad_{method}", "methods=[detector,centre]", f"detector={checkpoint}")
            result[name][f"cad_{method}"] = figures
            show(f"{name}, detector trained on the boxes of {method}", figures, ["detector"])
        if options.clusters:
            boxes = work / "train" / methods[0] / "boxes.parquet"
            checkpoint = detector(train, boxes, work / "od", trunk, options.steps)
            matched = (
                "methods=[detector,centre]",
                f"detector={checkpoint}",
                f"match.boxes={boxes}",
                f"match.uri={train}",
            )
            figures = discover(val, work / "val_od", *matched)
            result[name]["od"] = figures
            print(f"{name}, clusters as classes: mean AP50 {100 * figures['eval/matched_ap50']:.2f}")
    options.json.write_text(json.dumps(result, indent=2))


def show(title: str, figures: dict[str, float], methods: list[str]) -> None:
    print(f"\n{title}: {figures['eval/images']:.0f} images")
    print("\n".join(table(figures, methods)), flush=True)


if __name__ == "__main__":
    main()
