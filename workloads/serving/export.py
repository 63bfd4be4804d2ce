"""Exports a ResNet trunk as torchvision, timm, safetensors, ONNX and torch.export files (`export`), and verifies each.

Loading a file needs no part of this project. Every file is loaded again and its output compared with the trunk's.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from workloads.config import to_dict
from workloads.errors import ConfigError, RunFailedError
from workloads.loops.finetune import FinetuneConfig
from workloads.models.backbone import IMAGENET_MEAN, IMAGENET_STD, STAGES, Trunk, norm_layer
from workloads.models.detector import Detector
from workloads.models.fpn import Pyramid
from workloads.objectives.anchor_ntxent import AnchorNTXent
from workloads.serving.model_card import write_card
from workloads.serving.predict import Predictor
from workloads.spec.factory import AnyObjective
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import read_meta

Format = Literal["torchvision", "timm", "safetensors", "onnx", "torch_export"]
FORMATS: tuple[Format, ...] = get_args(Format)

_CLASSES = 1000
_TOLERANCE = 1e-4
_CHECKED = ((1, 64, 64), (2, 96, 64), (3, 224, 224))  # (batch, height, width)


class ExportError(RunFailedError):
    """An exported file differs from the trunk or cannot be written; the message names the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A ResNet trunk to export, and its pyramid where the run trained one."""

    trunk: Trunk
    pyramid: Pyramid | None
    input_size: int  # pixels, the side of the view that it was trained on
    facts: Mapping[str, Any]  # of the run, for the metadata


def export(what: Exported, formats: tuple[Format, ...], folder: Path) -> dict[str, Path]:
    """Write `formats` and `metadata.json` into `folder`; returns format or purpose → file.

    Raises:
        ConfigError: a library that a format needs is not installed.
        ExportError: the output of a written file differs from the trunk's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    what.trunk.eval()
    writers: dict[Format, Callable[[Exported, Path], dict[str, Path]]] = {
        "torchvision": _torchvision,
        "timm": _timm,
        "safetensors": _safetensors,
        "onnx": _onnx,
        "torch_export": _torch_export,
    }
    files: dict[str, Path] = {}
    for name in formats:
        try:
            files |= writers[name](what, folder)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--format {name}: needs {error.name}, which is not installed here") from None
    text = json.dumps(metadata(what, files), indent=2)
    (folder / "metadata.json").write_text(text + "\n", encoding="utf-8")
    return {**files, "metadata": folder / "metadata.json"}


def metadata(what: Exported, files: Mapping[str, Path]) -> dict[str, Any]:
    """Metadata of the exported files: architecture, normalisation, input size, outputs, and the facts of the run."""
    settings = what.trunk.settings
    return {
        "architecture": settings.name,
        "norm": settings.norm,
        "input": {
            "layout": "NCHW, RGB, float32 in [0, 1], then normalised",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "size": [what.input_size, what.input_size],
            "any_size": True,
        },
        "outputs": {
            stage: {"channels": channels, "stride": 4 * 2**i}
            for i, (stage, channels) in enumerate(zip(STAGES, what.trunk.channels, strict=True))
        },
        "files": {name: path.name for name, path in files.items()},
        **what.facts,
    }


def trunk_state(trunk: Trunk) -> dict[str, Tensor]:
    """The trunk's tensors under torchvision's and timm's names, without a classifier."""
    return {name: value.detach().cpu().contiguous() for name, value in trunk.body.state_dict().items()}


def _torchvision(what: Exported, folder: Path) -> dict[str, Path]:
    """`resnet*` with a classifier of zeros, `resnet_fpn_backbone`, and the run's own pyramid where it trained one."""
    name, state = what.trunk.settings.name, trunk_state(what.trunk)
    width = what.trunk.channels[-1]
    classifier = {"fc.weight": torch.zeros(_CLASSES, width), "fc.bias": torch.zeros(_CLASSES)}
    files = {
        "torchvision": folder / f"{name}_torchvision.pth",
        "torchvision_fpn": folder / f"{name}_fpn_torchvision.pth",
    }
    torch.save({**state, **classifier}, files["torchvision"])
    plain = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer(_plain_norm(what)))
    plain.load_state_dict(torch.load(files["torchvision"], weights_only=True))
    _compare(what, _stages_of(plain.eval()), "torchvision")

    body = {f"body.{key}": value for key, value in state.items()}
    torch.save({**body, **_fresh_fpn(what)}, files["torchvision_fpn"])
    if what.pyramid is not None and {"P3", "P4", "P5"} <= set(what.pyramid.inner) & set(what.pyramid.levels):
        files["torchvision_pyramid"] = folder / f"{name}_pyramid_torchvision.pth"
        torch.save({**body, **_pyramid_state(what.pyramid)}, files["torchvision_pyramid"])
        _check_pyramid(what, files["torchvision_pyramid"])
    return files


def _plain_norm(what: Exported) -> Literal["batch", "group"]:
    return "group" if what.trunk.settings.norm == "group" else "batch"


def _fresh_fpn(what: Exported) -> dict[str, Tensor]:
    """The pyramid of torchvision's `resnet_fpn_backbone`, of 256 channels over C2 to C5, as it is initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pyramid = torchvision.ops.FeaturePyramidNetwork(list(what.trunk.channels), 256)
    return {f"fpn.{name}": value for name, value in pyramid.state_dict().items()}


def _pyramid_state(pyramid: Pyramid) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, level in enumerate(("P3", "P4", "P5")):
        for theirs, ours in (("inner_blocks", pyramid.lateral), ("layer_blocks", pyramid.output)):
            for key, value in ours[level].state_dict().items():
                state[f"fpn.{theirs}.{i}.0.{key}"] = value.detach().cpu().contiguous()
    return state


def _pyramid_width(pyramid: Pyramid) -> int:
    convolution: Any = pyramid.output["P3"]
    return int(convolution.out_channels)


def _check_pyramid(what: Exported, file: Path) -> None:
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    pyramid = what.pyramid
    assert pyramid is not None
    channels = _pyramid_width(pyramid)
    plain = torchvision.models.get_model(
        what.trunk.settings.name, weights=None, norm_layer=norm_layer(_plain_norm(what))
    )
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    theirs = BackboneWithFPN(plain, layers, list(what.trunk.channels[1:]), channels)
    theirs.load_state_dict(torch.load(file, weights_only=True))

    def ours(images: Tensor) -> list[Tensor]:
        maps = pyramid(what.trunk(images))
        return [maps[level] for level in ("P3", "P4", "P5")]

    levels = theirs.eval()
    _compare(what, lambda images: list(levels(images).values())[:3], "torchvision_pyramid", ours=ours)


def _timm(what: Exported, folder: Path) -> dict[str, Path]:
    import timm

    file = folder / f"{what.trunk.settings.name}_timm.pth"
    torch.save(trunk_state(what.trunk), file)
    options: dict[str, Any] = {"norm_layer": "groupnorm"} if what.trunk.settings.norm == "group" else {}
    plain: Any = timm.create_model(what.trunk.settings.name, pretrained=False, num_classes=0, **options)
    plain.load_state_dict(torch.load(file, weights_only=True))
    deepest = plain.eval()
    _compare(
        what, lambda images: [deepest.forward_features(images)], "timm", ours=lambda images: [what.trunk(images)["C5"]]
    )
    return {"timm": file}


def _safetensors(what: Exported, folder: Path) -> dict[str, Path]:
    from safetensors.torch import load_file, save_file

    file = folder / f"{what.trunk.settings.name}.safetensors"
    state = trunk_state(what.trunk)
    save_file(state, file, metadata=_as_text(metadata(what, {})))
    again = load_file(file)
    if again.keys() != state.keys() or any(not torch.equal(again[name], state[name]) for name in state):
        raise ExportError(f"{file.name}: holds other numbers than the trunk")
    return {"safetensors": file}


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Metadata for a file header that holds strings only."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


class _Stages(nn.Module):
    """The module that is traced: normalised images to the maps of the four stages, in order."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.trunk(images)
        return tuple(maps[stage] for stage in STAGES)


def _program(what: Exported) -> torch.export.ExportedProgram:
    # Sides of more than one stride, so that no size is taken for a special case.
    sides = {i: 32 * torch.export.Dim(name, min=2, max=256) for i, name in ((2, "rows"), (3, "columns"))}
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096), **sides},)
    with torch.no_grad():
        return torch.export.export(_Stages(what.trunk), (torch.zeros(2, 3, 96, 128),), dynamic_shapes=shapes)


def _torch_export(what: Exported, folder: Path) -> dict[str, Path]:
    file = folder / f"{what.trunk.settings.name}.pt2"
    torch.export.save(_program(what), file)
    program: Any = torch.export.load(file).module()
    _compare(what, lambda images: list(program(images)), "torch_export")
    return {"torch_export": file}


def _onnx(what: Exported, folder: Path) -> dict[str, Path]:
    import onnx
    import onnxscript  # noqa: F401 - torch's exporter needs it, and says so less plainly

    file = folder / f"{what.trunk.settings.name}.onnx"
    program = torch.onnx.export(
        _program(what), input_names=["images"], output_names=list(STAGES), dynamo=True, verbose=False
    )
    assert program is not None
    program.save(str(file), external_data=False)
    model = onnx.load(str(file))
    onnx.helper.set_model_props(model, _as_text(metadata(what, {})))
    onnx.checker.check_model(model)
    onnx.save(model, str(file))
    check_onnx(what, file)
    return {"onnx": file}


def check_onnx(what: Exported, file: Path) -> float:
    """The largest difference between onnxruntime and torch, relative to the stage's largest value, over several sizes.

    Raises:
        ExportError: it is more than 1e-4.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def theirs(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(value)) for value in session.run(None, {"images": images.numpy()})]

    return _compare(what, theirs, "onnx")


def _stages_of(network: Any) -> Callable[[Tensor], list[Tensor]]:
    def stages(images: Tensor) -> list[Tensor]:
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
        maps = []
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    return stages


@torch.no_grad()
def _compare(
    what: Exported,
    theirs: Callable[[Tensor], list[Tensor]],
    name: str,
    *,
    ours: Callable[[Tensor], list[Tensor]] | None = None,
) -> float:
    expect = ours or (lambda images: list(what.trunk(images).values()))
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, height, width in _CHECKED:
        images = torch.randn(batch, 3, height, width, generator=generator)
        for expected, given in zip(expect(images), theirs(images), strict=True):
            if expected.shape != given.shape:
                raise ExportError(f"{name}: gives {tuple(given.shape)} for {(batch, 3, height, width)}")
            scale = float(expected.abs().max().clamp(min=1.0))
            worst = max(worst, float((expected - given).abs().max()) / scale)
    if not worst <= _TOLERANCE:
        raise ExportError(f"{name}: differs from the trunk by {worst:.1e}, more than {_TOLERANCE:.0e}")
    return worst


def exported_of(
    model: AnyObjective | Detector, settings: PretrainConfig | FinetuneConfig, *, facts: Mapping[str, Any]
) -> Exported:
    """The trunk of a run's model, ready to export; the model is not changed.

    Raises:
        ConfigError: the trunk is no ResNet.
    """
    trunk = _whole_trunk(model) if isinstance(model, Detector) else model.trunk
    pyramid = model.pyramid if isinstance(model, AnchorNTXent) else None
    if not isinstance(trunk, Trunk):
        raise ConfigError("export: only ResNet trunks are exported; a ViT's state dict is timm's already")
    described = {"config": presentable(to_dict(settings)), **facts}
    return Exported(trunk=trunk, pyramid=pyramid, input_size=settings.views.input_size, facts=described)


def _whole_trunk(detector: Detector) -> Trunk:
    """A detector's trunk with all four stages; a C4 detector has the last one in its head."""
    trunk: Trunk = detector.network.backbone.trunk
    if len(list(trunk.body.layer4.children())):
        return trunk
    trunk = copy.deepcopy(trunk)
    trunk.body.layer4, trunk.stages = copy.deepcopy(detector.network.roi_heads.box_head.layer4), STAGES
    return trunk


def presentable(value: Any) -> Any:
    """Nested plain values without private details, for a file that is shared: local paths are cut to their last part."""
    if isinstance(value, dict):
        return {key: presentable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [presentable(item) for item in value]
    if isinstance(value, str):
        bare = re.sub(r"://[^/@\s]+@", "://", value)
        return f"…/{Path(bare).name}" if bare.startswith(("/", "file://")) else bare
    return value


def export_checkpoint(
    checkpoint: Path,
    formats: tuple[Format, ...],
    folder: Path,
    *,
    title: str,
    source: Mapping[str, str],
    metrics: Mapping[str, float] | None = None,
    licence: str | None = None,
) -> dict[str, Path]:
    """Export the trunk of a run's checkpoint, with its model card; returns purpose → file.

    Args:
        source: origin of the model, as run id, for the card and the metadata; the hashes of data and config are added.
        metrics: figures of the run, by tracking key; by default those in the checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: the trunk is no ResNet, or a library is missing.
        ExportError: the output of a written file differs from the trunk's.
    """
    predictor, meta = Predictor(checkpoint), read_meta(str(checkpoint))
    origin = {
        **source,
        "step": str(meta.step),
        "data manifest SHA-256": meta.manifest_sha256,
        "config SHA-256": meta.config_sha256,
    }
    facts = {"source": origin, "licence": licence}
    what = exported_of(predictor.module, predictor.settings, facts=facts)
    files = export(what, formats, folder)
    card = write_card(
        folder,
        title=title,
        described=metadata(what, {name: path for name, path in files.items() if name != "metadata"}),
        config=presentable(to_dict(predictor.settings)),
        metrics=meta.metrics if metrics is None else metrics,
        licence=licence,
        source=origin,
        channels=_pyramid_width(what.pyramid) if "torchvision_pyramid" in files and what.pyramid else None,
    )
    return {**files, "card": card}
