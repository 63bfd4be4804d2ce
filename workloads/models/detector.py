"""Contains `Detector`: torchvision's RetinaNet, Faster R-CNN (FPN, C4) and Mask R-CNN on a pretrained trunk.

Their own transform, which works image by image, is not used: images arrive on one canvas (`data.views.detection`).
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from workloads.config import config, to_dict
from workloads.data.views.detection import DetectionViews
from workloads.errors import ConfigError
from workloads.models.backbone import STAGES, GlobalBatchNorm2d, Stage, Trunk
from workloads.models.retinanet_loss import retinanet_loss
from workloads.parallel.distributed import averaged, global_mean
from workloads.types import Detections, StepResult

_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1")  # as torchvision counts its trainable layers


@config
class DetectorConfig:
    """Architecture of the detector, and how it is trained and asked for detections."""

    kind: Literal["retinanet", "faster_rcnn_fpn", "faster_rcnn_c4", "mask_rcnn_fpn"] = "retinanet"
    """Architecture of torchvision; C4: regions of the stride-16 map are processed by the trunk's last stage."""
    fpn_channels: Annotated[int, Field(ge=16)] = 256
    """Channels of the feature pyramid."""
    smallest_anchor: PositiveFloat = 32.0
    """Side of the anchors of the finest level, pixels of the view; it doubles from level to level."""
    trainable_layers: Annotated[int, Field(ge=0, le=5)] = 5
    """Trailing parts of the trunk that are trained: 5 all, 3 layer2 to layer4, 0 none (a frozen trunk)."""
    statistics: Literal["batch", "sync_batch", "frozen"] = "batch"
    """Statistics of the trunk's batch normalisation: batch: a worker's share; sync_batch: the global batch; frozen: the
    pretrained running statistics."""
    proposals: Annotated[int, Field(ge=8)] = 1000
    """Region proposals of an image that Faster and Mask R-CNN classify."""
    region_batch: Annotated[int, Field(ge=8)] = 512
    """Region proposals of an image that Faster and Mask R-CNN sample for training."""
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Detections of a lower score are dropped."""
    nms_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of two detections of a category with a larger IoU, only the one of the higher score is returned."""


class _Pyramid(nn.Module):
    """A trunk and torchvision's feature pyramid over some of its stages."""

    def __init__(self, trunk: Trunk, stages: tuple[Stage, ...], channels: int, *, retina: bool) -> None:
        super().__init__()
        self.trunk, self.stages, self.out_channels = trunk, stages, channels
        widths = dict(zip(STAGES, trunk.channels, strict=True))
        extra = LastLevelP6P7(channels, channels) if retina else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork([widths[stage] for stage in stages], channels, extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = self.trunk(images)
        return self.fpn(OrderedDict((str(i), found[stage]) for i, stage in enumerate(self.stages)))

    def load_pyramid(self, state: Mapping[str, Tensor]) -> None:
        """Start the levels that `models.fpn.Pyramid` has in common with this one from its parameters (`state`).

        Raises:
            ConfigError: it has another number of channels.
        """
        places = {f"P{stage[1]}": place for place, stage in enumerate(self.stages)}
        blocks: dict[str, nn.Module] = {}
        for level, place in places.items():
            blocks |= {
                f"lateral.{level}": self.fpn.inner_blocks[place][0],
                f"output.{level}": self.fpn.layer_blocks[place][0],
            }
        if isinstance(self.fpn.extra_blocks, LastLevelP6P7):
            blocks |= {"down.P6": self.fpn.extra_blocks.p6, "down.P7": self.fpn.extra_blocks.p7}
        for name, conv in blocks.items():
            if f"{name}.weight" not in state:
                continue
            weight = state[f"{name}.weight"]
            if len(weight) != self.out_channels:
                raise ConfigError(
                    f"trunk.pyramid: the checkpoint's pyramid has {len(weight)} channels; set detector.fpn_channels={len(weight)}"
                )
            conv.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"]})


class _C4(nn.Module):
    """A trunk up to its stride-16 stage."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk, self.out_channels = trunk, trunk.channels[2]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return OrderedDict([("0", self.trunk(images)["C4"])])


class _LastStage(nn.Module):
    """The trunk's last stage over regions of the one before, averaged."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, regions: Tensor) -> Tensor:
        return self.layer4(regions).mean((-2, -1))


class Detector(nn.Module):
    """A detector of named categories, labelled from 1; the names are part of its state dict.

    `forward` returns the training loss, `detect` the detections. The trunk is `network.backbone.trunk`.
    """

    def __init__(self, settings: DetectorConfig, trunk: Trunk, categories: tuple[str, ...]) -> None:
        super().__init__()
        self.settings, self.categories, self.backbone = settings, categories, trunk.settings
        if settings.statistics == "sync_batch":
            _use_global_statistics(trunk)
        trained = _LAYERS[: settings.trainable_layers] + (("bn1",) if settings.trainable_layers == 5 else ())
        self._frozen: list[nn.Module] = [
            part for name, part in trunk.body.named_children() if not name.startswith(trained)
        ]
        for part in self._frozen:
            part.requires_grad_(False)
        self._trunk_norms: list[nn.Module] = [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]
        self.network: Any = _network(settings, trunk, len(categories))
        self.network.transform = nn.Identity()

    def load_pyramid(self, state: Mapping[str, Tensor]) -> None:
        """Start the feature pyramid from that of a pretraining run (`models.trunks.load_pyramid`).

        Raises:
            ConfigError: this detector has no pyramid, or one of another number of channels.
        """
        backbone = self.network.backbone
        if not isinstance(backbone, _Pyramid):
            raise ConfigError(f"trunk.pyramid: detector.kind={self.settings.kind} has no feature pyramid; leave it out")
        backbone.load_pyramid(state)

    def train(self, mode: bool = True) -> "Detector":
        """Set train or eval mode; frozen parts keep their running statistics."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        if self.settings.statistics == "frozen":
            for norm in self._trunk_norms:
                norm.eval()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """The categories' names and the trunk's architecture, from which `load_detector` rebuilds the detector."""
        return {"categories": list(self.categories), "backbone": {**to_dict(self.backbone), "weights": "none"}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.categories = tuple(state["categories"])

    def forward(self, views: DetectionViews) -> StepResult:
        """The loss of this rank's views, averaged over the images of the global batch.

        RetinaNet's loss is a mean over images, so that any number of ranks gives the same; the others' is a mean over the
        regions of a rank, which is weighted by the rank's images.
        """
        losses = self._losses(views)
        count = views.counted.sum()
        parts = {name: value.float() * count for name, value in losses.items()}
        total = torch.stack(list(parts.values())).sum()
        metrics = averaged({f"train/{name}": (part, count) for name, part in parts.items()})
        metrics["train/loss"] = torch.stack(list(metrics.values())).sum()
        return StepResult(loss=global_mean(total, count), metrics=metrics)

    def _losses(self, views: DetectionViews) -> dict[str, Tensor]:
        network, images = self.network, ImageList(views.images, list(views.sizes_hw))
        features = network.backbone(views.images)
        if isinstance(network, RetinaNet):
            levels = list(features.values())
            # RetinaNet has no background category: its labels begin with 0.
            targets = [{**target, "labels": target["labels"] - 1} for target in views.targets or []]
            outputs, anchors = network.head(levels), network.anchor_generator(images, levels)[0]
            losses = retinanet_loss(outputs["cls_logits"], outputs["bbox_regression"], anchors, targets)
            return {"loss_category": losses["classification"], "loss_box": losses["bbox_regression"]}
        proposals, first = network.rpn(images, features, views.targets)
        _, second = network.roi_heads(features, proposals, images.image_sizes, views.targets)
        named = {
            "loss_objectness": first["loss_objectness"],
            "loss_proposal_box": first["loss_rpn_box_reg"],
            "loss_category": second["loss_classifier"],
            "loss_box": second["loss_box_reg"],
        }
        return {**named, **({"loss_mask": second["loss_mask"]} if "loss_mask" in second else {})}

    @torch.no_grad()
    def detect(self, views: DetectionViews) -> list[Detections]:
        """At most 100 detections an image, in pixels of the source image; call it in eval mode."""
        network, images = self.network, ImageList(views.images, list(views.sizes_hw))
        features = network.backbone(views.images)
        if isinstance(network, RetinaNet):
            found = _retina_detections(network, images, list(features.values()))
        else:
            proposals, _ = network.rpn(images, features, None)
            found, _ = network.roi_heads(features, proposals, images.image_sizes, None)
        return [
            Detections(
                boxes_xyxy=item["boxes"].float() / scale.repeat(2),
                scores=item["scores"].float(),
                labels=item["labels"],
                masks=item["masks"][:, 0].float() if "masks" in item else None,
            )
            for item, scale in zip(found, views.scale_xy, strict=True)
        ]


def _retina_detections(network: Any, images: ImageList, levels: list[Tensor]) -> list[dict[str, Tensor]]:
    """RetinaNet's own steps after its backbone."""
    outputs = network.head(levels)
    anchors = network.anchor_generator(images, levels)
    cells = [level.shape[-2] * level.shape[-1] for level in levels]
    per_cell = outputs["cls_logits"].shape[1] // sum(cells)
    counts = [count * per_cell for count in cells]
    split = {name: list(value.float().split(counts, dim=1)) for name, value in outputs.items()}
    found = network.postprocess_detections(split, [list(a.split(counts)) for a in anchors], images.image_sizes)
    return [{**item, "labels": item["labels"] + 1} for item in found]


def _network(settings: DetectorConfig, trunk: Trunk, categories: int) -> nn.Module:
    smallest, ratios = settings.smallest_anchor, (0.5, 1.0, 2.0)
    if settings.kind == "retinanet":
        octave = tuple(2 ** (i / 3) for i in range(3))
        sizes = tuple(tuple(int(smallest * 2**level * step) for step in octave) for level in range(5))
        return RetinaNet(
            _Pyramid(trunk, ("C3", "C4", "C5"), settings.fpn_channels, retina=True),
            categories,
            anchor_generator=AnchorGenerator(sizes, (ratios,) * 5),
            score_thresh=settings.score_threshold,
            nms_thresh=settings.nms_threshold,
            detections_per_img=100,
        )
    regions: dict[str, Any] = {
        "rpn_post_nms_top_n_train": settings.proposals,
        "rpn_post_nms_top_n_test": settings.proposals,
        "box_batch_size_per_image": settings.region_batch,
        "box_score_thresh": settings.score_threshold,
        "box_nms_thresh": settings.nms_threshold,
        "box_detections_per_img": 100,
    }
    if settings.kind == "faster_rcnn_c4":
        head = _LastStage(trunk.body.layer4)
        width = trunk.channels[3]
        trunk.body.layer4, trunk.stages = nn.Identity(), STAGES[:3]
        return FasterRCNN(
            _C4(trunk),
            rpn_anchor_generator=AnchorGenerator((tuple(int(smallest * 2**i) for i in range(5)),), (ratios,)),
            box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
            box_head=head,
            box_predictor=FastRCNNPredictor(width, categories + 1),
            **regions,
        )
    sizes = tuple((int(smallest * 2**level),) for level in range(5))
    make = MaskRCNN if settings.kind == "mask_rcnn_fpn" else FasterRCNN
    return make(
        _Pyramid(trunk, STAGES, settings.fpn_channels, retina=False),
        categories + 1,
        rpn_anchor_generator=AnchorGenerator(sizes, (ratios,) * 5),
        **regions,
    )


def _use_global_statistics(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, GlobalBatchNorm2d):
            norm = GlobalBatchNorm2d(child.num_features, eps=child.eps, momentum=child.momentum, affine=child.affine)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            _use_global_statistics(child)
