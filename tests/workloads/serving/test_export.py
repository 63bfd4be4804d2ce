"""Exported trunks load where nothing of this project is, give the same numbers there, and say what they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import workloads.examples
from tests.workloads.data.images import picture
from workloads.__main__ import main
from workloads.config import build
from workloads.errors import ConfigError
from workloads.loops.finetune import FinetuneConfig
from workloads.loops.pretrain import pretrain
from workloads.models.backbone import BackboneConfig, Trunk
from workloads.models.detector import Detector, DetectorConfig
from workloads.parallel.runtime import LocalRuntime
from workloads.serving.export import FORMATS, Exported, ExportError, check_onnx, export, exported_of, presentable
from workloads.spec.loading import load_model
from workloads.spec.pretrain import PretrainConfig

EXAMPLES = Path(workloads.examples.__file__).parent

ISOLATED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("orchestrator", "workloads", "cluster"):
            raise ModuleNotFoundError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
"""

LOADED = """
import json, pathlib, timm, torch, torchvision
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone

for name in ("orchestrator", "workloads", "cluster"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported here")
folder = pathlib.Path(sys.argv[1])
told = json.loads((folder / "metadata.json").read_text())
read = lambda purpose: torch.load(folder / told["files"][purpose], weights_only=True)
plain = torchvision.models.resnet18()
plain.load_state_dict(read("torchvision"), strict=True)
backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
backbone.load_state_dict(read("torchvision_fpn"), strict=True)
layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
pyramid = BackboneWithFPN(torchvision.models.resnet18(), layers, [128, 256, 512], 16)
pyramid.load_state_dict(read("torchvision_pyramid"), strict=True)
model = timm.create_model("resnet18", num_classes=0)
model.load_state_dict(read("timm"), strict=True)
given = torch.load(folder / "expected.pt", weights_only=True)
with torch.no_grad():
    images = given["images"]
    x = plain.eval().maxpool(plain.relu(plain.bn1(plain.conv1(images))))
    results = {
        "torchvision": plain.layer4(plain.layer3(plain.layer2(plain.layer1(x)))),
        "timm": model.eval().forward_features(images),
        "fpn": backbone.eval().body(images)["3"],
    }
    for name, value in results.items():
        torch.testing.assert_close(value, given["C5"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pyramid.eval()(images)["0"], given["P3"], rtol=1e-4, atol=1e-4)
print("same")
"""


def run_isolated(code: str, *arguments: str, cwd: Path) -> str:
    """Run `code` in a process of its own: no user site or environment (-I), another folder, our packages blocked."""
    command = [sys.executable, "-I", "-c", ISOLATED + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(coco, tmp_path_factory) -> Path:
    """Of a pretraining run of one step."""
    output = tmp_path_factory.mktemp("run")
    data = {
        "steps": 1, "global_batch_size": 4, "data": {"uri": coco["train"]},
        "views": {"full_size": 64, "crop_size": 16, "crops_per_image": 2},
        "objective": {"projection_dim": 16, "projector_hidden": 16},
    }  # fmt: skip
    pretrain(build(PretrainConfig, data), LocalRuntime(output))
    return next((output / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory) -> Path:
    """The folder of all formats, made by the command."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    assert main(["export", str(checkpoint), "--output", str(folder), "--licence", "CC BY 4.0"]) == 0
    return folder


def test_state_dicts_and_examples_work_where_this_project_is_not(exported: Path, checkpoint: Path, tmp_path: Path):
    """In one process, because importing torch, torchvision and timm is most of its time."""
    model, _ = load_model(checkpoint)
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        stages = model.trunk(images)
        expected = {"images": images, "C5": stages["C5"], "P3": model.pyramid(stages)["P3"]}
    torch.save(expected, exported / "expected.pt")
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.jpg")
    examples = [(EXAMPLES / name).read_text() for name in ("use_in_torchvision.py", "use_in_timm.py")]
    code = LOADED + "".join(f"\nexec({text!r}, {{}})\n" for text in examples)
    said = run_isolated(code, str(exported), str(tmp_path / "0.jpg"), str(tmp_path / "1.jpg"), cwd=tmp_path)
    assert [text in said for text in ("same", "loss_classifier", "512 features")] == [True] * 3


def test_the_one_shot_example_runs_and_all_are_short(checkpoint: Path, tmp_path: Path):
    for i in range(2):
        picture(i, width=120, height=90).save(tmp_path / f"{i}.jpg")
    command = [sys.executable, str(EXAMPLES / "one_shot.py"), str(checkpoint)]
    command += [str(tmp_path / "0.jpg"), "10 10 50 40", str(tmp_path / "1.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("similarity") == 3
    assert all(len(path.read_text().splitlines()) < 40 for path in EXAMPLES.glob("*.py"))


def test_graphs_take_any_batch_and_size_and_onnx_is_checked(exported: Path, checkpoint: Path):
    model, settings = load_model(checkpoint)
    what = exported_of(model, settings, facts={})
    assert check_onnx(what, exported / "resnet18.onnx") < 1e-4
    program = torch.export.load(exported / "resnet18.pt2").module()
    with torch.no_grad():
        for shape in ((1, 3, 64, 64), (5, 3, 160, 96)):
            images = torch.rand(shape)
            torch.testing.assert_close(program(images)[3], what.trunk(images)["C5"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        what.trunk.body.layer4[1].conv2.weight.mul_(1.01)
    with pytest.raises(ExportError, match="onnx: differs from the trunk by"):
        check_onnx(what, exported / "resnet18.onnx")


def test_metadata_and_card_say_what_it_is_and_no_path_of_this_machine(exported: Path, checkpoint: Path):
    from safetensors import safe_open

    told = json.loads((exported / "metadata.json").read_text())
    assert told["input"]["mean"] == [0.485, 0.456, 0.406] and told["input"]["size"] == [64, 64]
    assert told["outputs"]["C5"] == {"channels": 512, "stride": 32}
    assert set(FORMATS) <= told["files"].keys()
    with safe_open(str(exported / "resnet18.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["input"]) == told["input"]
    meta = json.loads((checkpoint / "meta.json").read_text())
    card = (exported / "README.md").read_text()
    for text in (meta["manifest_sha256"], meta["config_sha256"], "CC BY 4.0", "kind: anchor_ntxent", "## Limits"):
        assert text in card
    for file in (exported / "metadata.json", exported / "README.md"):
        assert str(Path(meta and checkpoint).parents[2]) not in file.read_text() and "/tmp/" not in file.read_text()


def test_the_card_shows_metrics_with_their_intervals(checkpoint: Path, tmp_path: Path):
    from workloads.serving.export import export_checkpoint

    metrics = {"eval/sga": 0.5, "eval/sga_low": 0.4, "eval/sga_high": 0.6, "eval/pixel": 0.3, "train/loss": 1.0}
    export_checkpoint(checkpoint, ("safetensors",), tmp_path, title="x", source={"run": "r"}, metrics=metrics)
    card = (tmp_path / "README.md").read_text()
    assert "| `eval/sga` | 0.5000 | 0.4000 to 0.6000 |" in card and "train/loss" not in card
    assert "finds 30.0% of the plain queries; this model 50.0%" in card and "licence | not stated" in card


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn_c4"])
def test_a_detectors_trunk_is_exported_too(kind: str, tmp_path: Path):
    torch.manual_seed(0)
    trunk = Trunk(BackboneConfig(norm="group"))
    expected = {name: value.clone() for name, value in trunk.body.state_dict().items()}
    detector = Detector(DetectorConfig(kind=kind, fpn_channels=16), trunk, ("a",)).eval()

    settings = build(FinetuneConfig, {"data": {"uri": "x", "decode_size": None}, "detector": {"kind": kind}})
    layers = len(list(trunk.body.layer4.children()))
    what = exported_of(detector, settings, facts={})
    assert len(list(detector.network.backbone.trunk.body.layer4.children())) == layers  # the detector is as before
    files = export(what, ("torchvision", "timm"), tmp_path)
    state = torch.load(files["timm"], weights_only=True)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_what_cannot_be_exported_is_said(checkpoint: Path, tmp_path: Path, caplog):
    class Model:
        trunk = torch.nn.Linear(1, 1)

    class Settings:
        views = type("Views", (), {"input_size": 64})

    with pytest.raises(ConfigError, match="only ResNet trunks"):
        exported_of(Model(), Settings, facts={})
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "x")]) == 2
    trunk = Trunk(BackboneConfig())
    what = Exported(trunk=trunk, pyramid=None, input_size=64, facts={})
    files = export(what, ("torchvision",), tmp_path / "plain")
    assert "torchvision_pyramid" not in files


def test_paths_and_credentials_are_left_out():
    given = {"a": ["/home/me/data", "s3://key:secret@bucket/x"], "b": {"c": "file:///x/y", "d": 3, "e": "runs/x"}}
    assert presentable(given) == {"a": ["…/data", "s3://bucket/x"], "b": {"c": "…/y", "d": 3, "e": "runs/x"}}
