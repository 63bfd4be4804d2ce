"""Defines a discovery: `DiscoverConfig`, and the `Job` that divides a dataset's images into parts and names each part's file.

A part is a range of consecutive images in the dataset's order. Its file is complete or absent, so any number of processes may
work on the parts, be killed and start again: in the end every image is there exactly once, which `finish` checks.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pyarrow.fs as pafs
import torch
from pydantic import Field, PositiveInt

from workloads.config import config, to_dict, without_unset_additions
from workloads.data.store.manifest import open_dataset
from workloads.discovery.baselines import CentreConfig, ClsAttentionConfig, FelzenszwalbConfig
from workloads.discovery.clustering import ClustersConfig
from workloads.discovery.lost import LostConfig
from workloads.discovery.pseudo_boxes import read_boxes
from workloads.discovery.tokencut import TokenCutConfig
from workloads.errors import ConfigError, DataError
from workloads.metrics.corloc import CorLocConfig
from workloads.models import trunks
from workloads.models.backbone import Trunk
from workloads.models.trunks import CheckpointTrunkConfig, TrunkConfig, VitTrunkConfig
from workloads.models.vit import VitTrunk
from workloads.storage.checkpoint import CheckpointError, read_meta
from workloads.storage.filesystems import read_bytes, resolve_uri

Method = Literal["lost", "tokencut", "cls_attention", "whole", "centre", "random", "felzenszwalb", "file", "detector"]
NEEDS_TRUNK: tuple[Method, ...] = ("lost", "tokencut", "cls_attention")

RECORD = "figures.json"
"""Name of the file that is written last: where it exists, the discovery is finished."""


@config
class MatchConfig:
    """Maps clusters to classes on training images, and measures AP50 by class of the first method's boxes with it."""

    boxes: str | None = None
    """Clustered boxes of the training images (`METHOD/boxes.parquet` of their discovery); null: no AP50 by class."""
    uri: str | None = None
    """Dataset of the training images, whose objects the clusters are matched to."""

    def __post_init__(self) -> None:
        if (self.boxes is None) != (self.uri is None):
            raise ConfigError("match.boxes: give match.boxes and match.uri together, or neither")


@config
class DiscoverConfig:
    """A discovery: which dataset is searched, by which methods, with whose features."""

    uri: str
    """Dataset made by `orchestrator data build`, a folder or s3:// address."""
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("lost",)
    """Methods that give each image a box; the first one's boxes are clustered, and its figures are the headline."""
    trunk: TrunkConfig | None = None
    """Network whose features lost, tokencut, cls_attention and the clusters use; null: none of these is asked for."""
    stride: Literal[8, 16, 32] = 16
    """Pixels between the cells of a ResNet's last map; below 32 by dilation. A transformer's cells are its patches."""
    long_side: PositiveInt | None = None
    """Longer side, pixels, to which images are shrunk while decoding; null: source resolution. Boxes are always in pixels of
    the source image. tokencut's memory grows with the fourth power of this; lost's stays bounded."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of random weights and random boxes."""
    lost: LostConfig = LostConfig()
    tokencut: TokenCutConfig = TokenCutConfig()
    cls_attention: ClsAttentionConfig = ClsAttentionConfig()
    centre: CentreConfig = CentreConfig()
    felzenszwalb: FelzenszwalbConfig = FelzenszwalbConfig()
    file: str | None = None
    """Boxes of another program for the method `file`: Parquet, COCO results JSON, or JSON of {image name: [x0, y0, x1, y1]}."""
    detector: str | None = None
    """Checkpoint of a fine-tuning run for the method `detector`: up to 100 boxes an image, of which the best counts for
    CorLoc."""
    clusters: ClustersConfig = ClustersConfig()
    match: MatchConfig = MatchConfig()
    corloc: CorLocConfig = CorLocConfig()
    batch_size: PositiveInt = 16
    """Images decoded at a time; those of one size go through the trunk together. Changes speed and memory, not boxes
    beyond rounding."""
    part_size: PositiveInt = 128
    """Images in one part, the most that a killed process has to repeat."""
    decode_threads: PositiveInt = 2
    """Threads that decode images."""
    limit: PositiveInt | None = None
    """Search only this many images, the first in the dataset's order; null: all."""
    gallery: Annotated[int, Field(ge=0)] = 12
    """Images drawn with their boxes; 0: no picture."""

    def __post_init__(self) -> None:
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods: name each one once (given: {', '.join(self.methods)})")
        if ("file" in self.methods) != (self.file is not None):
            raise ConfigError("file: give it together with the method file, or neither")
        if ("detector" in self.methods) != (self.detector is not None):
            raise ConfigError("detector: give it together with the method detector, or neither")
        if self.methods[0] == "detector" and self.clusters.count is not None:
            raise ConfigError("clusters.count: a detector's boxes are not clustered; put another method first")
        if self.uses_trunk and self.trunk is None:
            raise ConfigError(
                "trunk.kind: needed by these methods; one of checkpoint (of a run), vit, supervised, random"
            )

    @property
    def uses_trunk(self) -> bool:
        """Whether a method or the clusters need a network."""
        return self.clusters.count is not None or any(method in NEEDS_TRUNK for method in self.methods)


def trunk_of(settings: DiscoverConfig) -> Trunk | VitTrunk:
    """The configured trunk, in eval mode on the CPU; random weights are those of `seed`.

    Raises:
        ConfigError: the weights cannot be read, or the trunk is a ResNet and cls_attention is among the methods.
    """
    if settings.trunk is None:
        raise ConfigError("trunk.kind: needed by these methods; one of checkpoint (of a run), vit, supervised, random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        trunk = trunks.load(settings.trunk).eval()
    if "cls_attention" in settings.methods and not isinstance(trunk, VitTrunk):
        raise ConfigError("methods: cls_attention needs a transformer, and trunk is a ResNet; use trunk.kind=vit")
    return trunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One discovery: its settings, its output and its parts."""

    settings: DiscoverConfig
    output: str  # folder or s3:// address
    identity: str  # SHA-256 of all that decides the boxes: settings, data, weights
    manifest_sha256: str
    num_images: int
    num_parts: int

    @property
    def state(self) -> tuple[pafs.FileSystem, str]:
        """The file system and folder of the parts' files until all are complete."""
        filesystem, root = resolve_uri(self.output)
        return filesystem, f"{root}/_parts/{self.identity[:16]}"

    def part_path(self, part: int) -> str:
        """The file of one part."""
        return f"{self.state[1]}/part-{part:06d}.parquet"

    def images_in(self, part: int) -> int:
        """Number of images in a part, as `EvalLoader` divides them: the last part may have fewer."""
        each = -(-self.num_images // self.num_parts)
        return max(0, min(each, self.num_images - part * each))

    def missing(self) -> list[int]:
        """Numbers of the parts without a file."""
        filesystem, folder = self.state
        selector = pafs.FileSelector(folder, allow_not_found=True)
        there = {info.path.rpartition("/")[2] for info in filesystem.get_file_info(selector)}
        return [part for part in range(self.num_parts) if f"part-{part:06d}.parquet" not in there]


def prepare(settings: DiscoverConfig, output: str) -> Job:
    """Check all of a request that can be checked before work starts, weights included, and describe the work.

    Raises:
        DataError: there is no dataset, or no boxes in `file`.
        ConfigError: the weights cannot be used, or `output` holds another discovery.
    """
    dataset = open_dataset(settings.uri)
    for file in (settings.file, settings.match.boxes):
        if file is not None:
            read_boxes(file)
    if settings.match.uri is not None:
        open_dataset(settings.match.uri)
    count = min(dataset.num_images, settings.limit or dataset.num_images)
    # How work is divided, and where it is done, decides no box.
    settled = to_dict(without_unset_additions(settings))
    decides = {k: v for k, v in settled.items() if k not in ("uri", "batch_size", "decode_threads", "gallery")}
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
    if earlier is None and settings.uses_trunk:
        trunk_of(settings)  # weights that do not load are refused here, not by each worker
    return job


def finished_record(output: str) -> dict[str, Any] | None:
    """The record (`RECORD`) of a finished discovery at `output`, or None."""
    filesystem, root = resolve_uri(output)
    try:
        return json.loads(read_bytes(filesystem, f"{root}/{RECORD}", attempts=2))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _weights_digest(settings: DiscoverConfig) -> str:
    files = [file for file in (settings.file, settings.match.boxes) if file is not None]
    checkpoints = [settings.detector] if settings.detector is not None else []
    match settings.trunk:
        case CheckpointTrunkConfig(uri=uri) if settings.uses_trunk:
            checkpoints.append(uri)
        case VitTrunkConfig(vit=vit) if settings.uses_trunk and vit.weights not in ("none", "timm"):
            files.append(vit.weights)
    return " ".join([*map(_state_digest, checkpoints), _digest(files)])


def _state_digest(checkpoint: str) -> str:
    try:
        filesystem, folder = resolve_uri(checkpoint)
        return read_meta(folder, filesystem).state_sha256
    except (CheckpointError, DataError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _digest(files: list[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(read_bytes(*resolve_uri(file)))
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from None
    return digest.hexdigest()
