"""Discovery: a dataset's images in parts, each part's boxes in a file of its own, then one table, its figures and pictures.

A part is a run of images in the dataset's order. Whoever works on it writes its file whole or not at all, so any number of
processes may work, be killed and begin again: at the end every image is there exactly once, which is checked.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from workloads.checkpoint import read_meta
from workloads.config import ConfigError, config, to_dict
from workloads.data.filesystems import put_bytes, read_bytes, resolve_uri
from workloads.data.manifest import open_dataset
from workloads.data.reader import DataConfig, EvalLoader
from workloads.data.views import crop_boxes
from workloads.discovery import baselines
from workloads.discovery.baselines import CentreConfig, ClsAttentionConfig, FelzenszwalbConfig
from workloads.discovery.clustering import ClustersConfig
from workloads.discovery.components import FeaturesError
from workloads.discovery.features import PatchExtractor, PatchFeatures, cells_to_pixels, same_size_groups
from workloads.discovery.lost import LostConfig, lost
from workloads.discovery.pseudo_boxes import read_boxes
from workloads.discovery.tokencut import TokenCutConfig, tokencut
from workloads.metrics.corloc import CorLocConfig
from workloads.models.backbone import BackboneConfig, Trunk, imagenet_normalized
from workloads.models.vit import VitConfig, VitTrunk
from workloads.spec import load_model
from workloads.types import ImageBatch

Method = Literal["lost", "tokencut", "cls_attention", "whole", "centre", "random", "felzenszwalb", "file"]
NEEDS_TRUNK: tuple[Method, ...] = ("lost", "tokencut", "cls_attention")

RECORD = "figures.json"
"""Written last: with it, a discovery is finished."""


@config
class ResnetTrunkConfig:
    """A ResNet without this project's training: random, or torchvision's ImageNet weights."""

    kind: Literal["resnet"] = "resnet"
    """Which trunk."""
    backbone: BackboneConfig = BackboneConfig()


@config
class VitTrunkConfig:
    """A vision transformer: random, timm's weights, or a local file such as DINO's."""

    kind: Literal["vit"] = "vit"
    """Which trunk."""
    vit: VitConfig = VitConfig()


@config
class CheckpointTrunkConfig:
    """The trunk of a run of this project."""

    kind: Literal["checkpoint"] = "checkpoint"
    """Which trunk."""
    uri: str
    """A checkpoint's folder (RUN/checkpoints/step_…)."""


@config
class DiscoverConfig:
    """What is looked for where, and how."""

    uri: str
    """Dataset made by `orchestrator data build`, a folder or s3:// address."""
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("lost",)
    """Ways to find one box an image; the first one's are clustered, and its figures are the headline."""
    trunk: Annotated[ResnetTrunkConfig | VitTrunkConfig | CheckpointTrunkConfig, Field(discriminator="kind")] = (
        VitTrunkConfig()
    )
    stride: Literal[8, 16, 32] = 16
    """Pixels between the cells of a ResNet's last map; less than 32 by dilation. A transformer has its patch's."""
    long_side: PositiveInt | None = None
    """Longer side, pixels, to which images are shrunk while decoding; null: as they are. Boxes are of the source image."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of random weights and random boxes."""
    lost: LostConfig = LostConfig()
    tokencut: TokenCutConfig = TokenCutConfig()
    cls_attention: ClsAttentionConfig = ClsAttentionConfig()
    centre: CentreConfig = CentreConfig()
    felzenszwalb: FelzenszwalbConfig = FelzenszwalbConfig()
    file: str | None = None
    """Boxes that another program found, for the method `file`: Parquet, COCO results JSON, or a pickle of LOST's."""
    clusters: ClustersConfig = ClustersConfig()
    corloc: CorLocConfig = CorLocConfig()
    batch_size: PositiveInt = 16
    """Images decoded at a time; those of one size go through the trunk together. Changes speed and memory, not boxes."""
    part_size: PositiveInt = 128
    """Images in one part, which is what a killed process has to do again."""
    decode_threads: PositiveInt = 2
    """Threads that decode images."""
    limit: PositiveInt | None = None
    """Only this many images, the first in the dataset's order."""
    gallery: Annotated[int, Field(ge=0)] = 12
    """Images shown with their boxes; 0: no picture."""

    def __post_init__(self) -> None:
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods: each one once, given {list(self.methods)}")
        if ("file" in self.methods) != (self.file is not None):
            raise ConfigError("file: goes together with the method file")
        if "cls_attention" in self.methods and self.trunk.kind == "resnet":
            raise ConfigError("methods: cls_attention needs a transformer; choose trunk.kind=vit")

    @property
    def uses_trunk(self) -> bool:
        """Whether any method, or the clusters, need a network."""
        return self.clusters.count is not None or any(method in NEEDS_TRUNK for method in self.methods)


def make_trunk(settings: DiscoverConfig) -> Trunk | VitTrunk:
    """The trunk, in eval mode; random weights are those of the seed.

    Raises:
        ConfigError: weights that cannot be had. CheckpointError: no checkpoint, or a damaged one.
    """
    state = torch.get_rng_state()
    torch.manual_seed(settings.seed)
    try:
        match settings.trunk:
            case ResnetTrunkConfig():
                return Trunk(settings.trunk.backbone).eval()
            case VitTrunkConfig():
                return VitTrunk(settings.trunk.vit).eval()
            case CheckpointTrunkConfig():
                model, _ = load_model(Path(settings.trunk.uri))
                trunk = getattr(model, "trunk", None)
                if not isinstance(trunk, (Trunk, VitTrunk)):
                    raise ConfigError(f"trunk.uri: {settings.trunk.uri} holds no trunk")
                return trunk.eval()
    finally:
        torch.set_rng_state(state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One discovery and its place in the storage."""

    settings: DiscoverConfig
    output: str  # folder or s3:// address
    identity: str  # hash of what decides the boxes: settings, data, weights
    manifest_sha256: str
    num_images: int
    num_parts: int

    @property
    def state(self) -> tuple[pafs.FileSystem, str]:
        """Where the parts' files are kept until all are there."""
        filesystem, root = resolve_uri(self.output)
        return filesystem, f"{root}/_parts/{self.identity[:16]}"

    def part_path(self, part: int) -> str:
        """The file of one part."""
        return f"{self.state[1]}/part-{part:06d}.parquet"

    def images_in(self, part: int) -> int:
        """How many images a part has: as `EvalLoader` shares them out, the last one fewer."""
        each = -(-self.num_images // self.num_parts)
        return max(0, min(each, self.num_images - part * each))

    def missing(self) -> list[int]:
        """Parts that nobody has finished."""
        filesystem, folder = self.state
        selector = pafs.FileSelector(folder, allow_not_found=True)
        there = {info.path.rpartition("/")[2] for info in filesystem.get_file_info(selector)}
        return [part for part in range(self.num_parts) if f"part-{part:06d}.parquet" not in there]


def prepare(settings: DiscoverConfig, output: str) -> Job:
    """Check what can be checked before work starts, and name the work.

    Raises:
        DataError: no dataset, or no boxes in `file`. ConfigError: no weights, or an output that holds something else.
    """
    dataset = open_dataset(settings.uri)
    if settings.file is not None:
        read_boxes(settings.file)
    count = min(dataset.num_images, settings.limit or dataset.num_images)
    # How work is cut into pieces, and where it is done, decides no box.
    decides = {
        k: v for k, v in to_dict(settings).items() if k not in ("uri", "batch_size", "decode_threads", "gallery")
    }
    key = {**decides, "data": dataset.manifest.sha256, "weights": _weights_digest(settings)}
    identity = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    job = Job(
        settings=settings,
        output=output,
        identity=identity,
        manifest_sha256=dataset.manifest.sha256,
        num_images=count,
        num_parts=-(-count // settings.part_size),
    )
    earlier = finished_record(output)
    if earlier is not None and earlier["identity"] != identity:
        raise ConfigError(f"output: {output} holds another discovery; give another output")
    return job


def finished_record(output: str) -> dict[str, Any] | None:
    """What a finished discovery at `output` found out, or None."""
    filesystem, root = resolve_uri(output)
    try:
        return json.loads(read_bytes(filesystem, f"{root}/{RECORD}", attempts=2))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _weights_digest(settings: DiscoverConfig) -> str:
    files = [settings.file] if settings.file is not None else []
    match settings.trunk:
        case CheckpointTrunkConfig(uri=uri) if settings.uses_trunk:
            return read_meta(uri).state_sha256 + _digest(files)
        case VitTrunkConfig(vit=vit) if settings.uses_trunk and vit.weights not in ("none", "timm"):
            files.append(vit.weights)
    return _digest(files)


def _digest(files: list[str]) -> str:
    found = hashlib.sha256()
    for file in files:
        try:
            found.update(read_bytes(*resolve_uri(file)))
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from None
    return found.hexdigest()


PART_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("image_id", pa.string()),
        ("method", pa.string()),
        ("decoded", pa.bool_()),
        *[(side, pa.float32()) for side in ("x0", "y0", "x1", "y1")],  # null where there is no box
        ("score", pa.float32()),
        ("feature", pa.list_(pa.float32())),
    ]
)


class PartWorker:
    """One process's networks; works on any number of parts, one after the other."""

    def __init__(self, job: Job, *, device: torch.device | str = "cpu") -> None:
        self._job, self._settings, self._device = job, job.settings, torch.device(device)
        self._dataset = open_dataset(job.settings.uri)
        self._extractor: PatchExtractor | None = None
        if job.settings.uses_trunk:
            trunk = make_trunk(job.settings)
            self._extractor = PatchExtractor(trunk, stride=job.settings.stride).eval().to(self._device)
        self._given = read_boxes(job.settings.file).best() if job.settings.file is not None else {}

    def run(self, part: int, *, tick: Callable[[int], None] | None = None) -> int:
        """Find the boxes of one part and write its file; returns its number of images. Safe to repeat.

        Raises:
            DataError: a shard cannot be read. FeaturesError: an image's features are not finite, which names the image.
        """
        rows: list[dict[str, Any]] = []
        images = 0
        for batch in self._batches(part):
            rows += self._found(batch)
            here = sum(1 for image_id in batch.image_ids if image_id)
            images += here
            if tick is not None:
                tick(here)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=PART_SCHEMA), sink, compression="zstd")
        put_bytes(self._job.state[0], self._job.part_path(part), sink.getvalue().to_pybytes())
        return images

    def _batches(self, part: int) -> Iterator[ImageBatch]:
        loader = EvalLoader(
            self._dataset,
            reading(self._settings),
            batch_size=self._settings.batch_size,
            rank=part,
            world_size=self._job.num_parts,
            limit=self._job.num_images,
        )
        for batch in loader:
            yield batch.to(self._device)

    @torch.no_grad()
    def _found(self, batch: ImageBatch) -> list[dict[str, Any]]:
        boxes = {method: torch.zeros(len(batch.image_ids), 4, dtype=torch.float64) for method in self._settings.methods}
        scores = {method: torch.ones(len(batch.image_ids)) for method in self._settings.methods}
        for method in self._settings.methods:
            if method not in NEEDS_TRUNK:
                boxes[method] = self._without_trunk(method, batch)
        if any(method in NEEDS_TRUNK for method in self._settings.methods):
            self._with_trunk(batch, boxes, scores)
        features = self._features(batch, boxes[self._settings.methods[0]])
        return _part_rows(batch, self._settings.methods, boxes, scores, features)

    def _with_trunk(self, batch: ImageBatch, boxes: dict[Method, Tensor], scores: dict[Method, Tensor]) -> None:
        assert self._extractor is not None
        for group in same_size_groups(batch, self._extractor.cell):
            patches = self._extractor(group.images)
            rows = group.rows.cpu()
            for method in self._settings.methods:
                if method in NEEDS_TRUNK:
                    try:
                        found = find(method, patches, self._settings)
                    except FeaturesError as error:
                        names = ", ".join(batch.image_ids[i] for i in rows.tolist())
                        raise FeaturesError(f"{method}: {error}; among the images {names}") from None
                    in_pixels = cells_to_pixels(
                        found.boxes_xyxy,
                        self._extractor.cell,
                        batch.content_hw[group.rows],
                        batch.source_hw[group.rows],
                    )
                    boxes[method][rows], scores[method][rows] = in_pixels.cpu(), found.scores.cpu()

    def _without_trunk(self, method: Method, batch: ImageBatch) -> Tensor:
        source = batch.source_hw.cpu()
        match method:
            case "whole":
                return baselines.whole_image(source)
            case "centre":
                return baselines.centre_box(source, self._settings.centre.side)
            case "random":
                return baselines.random_box(batch.image_ids, source, seed=self._settings.seed)
            case "felzenszwalb":
                return self._regions(batch)
        missing = np.full(4, np.nan)
        return torch.from_numpy(np.stack([self._given.get(image_id, missing) for image_id in batch.image_ids]))

    def _regions(self, batch: ImageBatch) -> Tensor:
        found = torch.zeros(len(batch.image_ids), 4, dtype=torch.float64)
        for i in batch.valid.nonzero().flatten().tolist():
            height, width = batch.content_hw[i].tolist()
            pixels = batch.images[i, :, :height, :width].cpu().numpy()
            shares = torch.from_numpy(baselines.felzenszwalb_box(pixels, self._settings.felzenszwalb))
            found[i] = shares * batch.source_hw[i].cpu().flip(0).repeat(2)
        return found

    def _features(self, batch: ImageBatch, boxes: Tensor) -> np.ndarray | None:
        """float32 (B, D) of the boxes' crops, or None where no clusters are wanted."""
        if self._settings.clusters.count is None:
            return None
        assert self._extractor is not None
        scale = (batch.content_hw.double() / batch.source_hw.clamp(min=1)).flip(1).repeat(1, 2).cpu()
        on_canvas = (boxes * scale).nan_to_num()
        on_canvas[:, 2:] = torch.maximum(on_canvas[:, 2:], on_canvas[:, :2] + 1)
        crops = crop_boxes(batch.images, on_canvas.to(self._device), self._settings.clusters.crop_size)
        return self._extractor.describe(imagenet_normalized(crops)).cpu().numpy()


def reading(settings: DiscoverConfig) -> DataConfig:
    """How images are read for discovery."""
    return DataConfig(uri=settings.uri, decode_size=settings.long_side, decode_threads=settings.decode_threads)


def find(method: Method, patches: PatchFeatures, settings: DiscoverConfig) -> Any:
    """The regions that a method of `NEEDS_TRUNK` finds in patch features."""
    if method == "lost":
        return lost(patches.features, patches.grid_hw, settings.lost)
    if method == "tokencut":
        return tokencut(patches.features, patches.grid_hw, settings.tokencut)
    if patches.cls_attention is None:
        raise ConfigError("methods: cls_attention needs a transformer's trunk")
    return baselines.cls_attention(patches.cls_attention, patches.grid_hw, settings.cls_attention)


def _part_rows(
    batch: ImageBatch,
    methods: tuple[Method, ...],
    boxes: Mapping[Method, Tensor],
    scores: Mapping[Method, Tensor],
    features: np.ndarray | None,
) -> list[dict[str, Any]]:
    rows = []
    for i, (image_id, valid) in enumerate(zip(batch.image_ids, batch.valid.tolist(), strict=True)):
        if not image_id:  # padding
            continue
        for method in methods:
            box = boxes[method][i].tolist()
            has_box = valid and not any(math.isnan(side) for side in box)
            sides = dict(zip(("x0", "y0", "x1", "y1"), box if has_box else [None] * 4, strict=True))
            has_feature = has_box and features is not None and method == methods[0]
            rows.append(
                {
                    "position": int(batch.positions[i]),
                    "image_id": image_id,
                    "method": method,
                    "decoded": valid,
                    **sides,
                    "score": float(scores[method][i]) if has_box else None,
                    "feature": features[i].tolist() if has_feature and features is not None else None,
                }
            )
    return rows
