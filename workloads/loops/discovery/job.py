"""Discovery: a dataset's images in parts, each part's boxes in a file of its own, then one table, its figures and pictures.

A part is a run of images in the dataset's order. Whoever works on it writes its file whole or not at all, so any number of
processes may work, be killed and begin again: at the end every image is there exactly once, which is checked.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pyarrow.fs as pafs
import torch
from pydantic import Field, PositiveInt

from workloads.config import config, to_dict
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
"""Written last: with it, a discovery is finished."""


@config
class MatchConfig:
    """Which clusters stand for which classes: fitted on training images, used for the first method's boxes here."""

    boxes: str | None = None
    """Clustered boxes of the training images (`METHOD/boxes.parquet` of their discovery); null: no match, no AP50 by class."""
    uri: str | None = None
    """The training images' dataset, whose objects the clusters are matched to."""

    def __post_init__(self) -> None:
        if (self.boxes is None) != (self.uri is None):
            raise ConfigError("match.boxes: goes together with match.uri")


@config
class DiscoverConfig:
    """What is looked for where, and how."""

    uri: str
    """Dataset made by `orchestrator data build`, a folder or s3:// address."""
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("lost",)
    """Ways to find one box an image; the first one's are clustered, and its figures are the headline."""
    trunk: TrunkConfig | None = None
    """Needed by lost, tokencut, cls_attention and the clusters."""
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
    detector: str | None = None
    """Checkpoint of a fine-tuning run, for the method `detector`: up to 100 boxes an image, of which the best counts for
    CorLoc."""
    clusters: ClustersConfig = ClustersConfig()
    match: MatchConfig = MatchConfig()
    corloc: CorLocConfig = CorLocConfig()
    batch_size: PositiveInt = 16
    """Images decoded at a time; those of one size go through the trunk together. Changes speed and memory, not boxes
    beyond rounding."""
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
        if ("detector" in self.methods) != (self.detector is not None):
            raise ConfigError("detector: goes together with the method detector")
        if self.methods[0] == "detector" and self.clusters.count is not None:
            raise ConfigError("clusters.count: a detector's boxes are not clustered; choose another first method")
        if self.uses_trunk and self.trunk is None:
            raise ConfigError("trunk.kind: say whose features: checkpoint (of a run), vit, supervised, or random")

    @property
    def uses_trunk(self) -> bool:
        """Whether any method, or the clusters, need a network."""
        return self.clusters.count is not None or any(method in NEEDS_TRUNK for method in self.methods)


def trunk_of(settings: DiscoverConfig) -> Trunk | VitTrunk:
    """The trunk, in eval mode; random weights are those of the seed.

    Raises:
        ConfigError: weights that cannot be had, or a ResNet where CLS attention is asked for.
    """
    if settings.trunk is None:
        raise ConfigError("trunk.kind: say whose features are to be looked at")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        trunk = trunks.load(settings.trunk).eval()
    if "cls_attention" in settings.methods and not isinstance(trunk, VitTrunk):
        raise ConfigError("methods: cls_attention needs a transformer, and this trunk is a ResNet")
    return trunk


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
    for file in (settings.file, settings.match.boxes):
        if file is not None:
            read_boxes(file)
    if settings.match.uri is not None:
        open_dataset(settings.match.uri)
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
    found = hashlib.sha256()
    for file in files:
        try:
            found.update(read_bytes(*resolve_uri(file)))
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from None
    return found.hexdigest()
