"""`RowBuilder`: turns an image that a source lists into a row of a shard, or a `Reject`."""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import Tensor

from workloads.data.build.jpeg_scan import scan_ends_early
from workloads.data.build.region_masks import RegionColumnsConfig, compute_regions
from workloads.data.build.sources import OBJECTS_TYPE
from workloads.data.loading.decode import DecodeError, decode_image
from workloads.data.store.image_file import open_image
from workloads.data.store.region_codec import PREFIX, RegionsError, encode_regions, resize_regions

_SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_id", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.string()),
        ("objects", OBJECTS_TYPE),
    ]
)
_VALUE = {"_type": "Value"}
_FEATURES: dict[str, Any] = {
    "image": {"_type": "Image"},
    "image_id": {"dtype": "string", **_VALUE},
    "width": {"dtype": "int32", **_VALUE},
    "height": {"dtype": "int32", **_VALUE},
    "label": {"dtype": "string", **_VALUE},
    "objects": [
        {
            "bbox": {"feature": {"dtype": "float32", **_VALUE}, "_type": "Sequence"},
            "category": {"dtype": "string", **_VALUE},
            "crowd": {"dtype": "bool", **_VALUE},
            "difficult": {"dtype": "bool", **_VALUE},
        }
    ],
}


def stored_schema(regions: Iterable[str] = ()) -> pa.Schema:
    """A shard's columns, with those of `regions`, and their features in the metadata for Hugging Face's readers."""
    schema, features = _SCHEMA, dict(_FEATURES)
    for name in regions:
        schema = schema.append(pa.field(PREFIX + name, _SCHEMA.field("image").type))
        features[PREFIX + name] = {"_type": "Image"}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@dataclass(slots=True, kw_only=True)
class ImageStatistics:
    """Sums over images, of whole numbers, so that their order does not matter."""

    num_bytes: int = 0  # of encoded images
    samples: int = 0  # pixels that entered the sums, a grid of at most about 64x64 an image
    channel_sum: list[int] = field(default_factory=lambda: [0, 0, 0])
    channel_square_sum: list[int] = field(default_factory=lambda: [0, 0, 0])
    longer_sides: dict[str, int] = field(default_factory=dict)  # upper bound of the bin, pixels → images

    def add(self, other: "ImageStatistics") -> None:
        """Add the images of `other`."""
        self.num_bytes += other.num_bytes
        self.samples += other.samples
        self.channel_sum = [a + b for a, b in zip(self.channel_sum, other.channel_sum, strict=True)]
        squares = zip(self.channel_square_sum, other.channel_square_sum, strict=True)
        self.channel_square_sum = [a + b for a, b in squares]
        for side, count in other.longer_sides.items():
            self.longer_sides[side] = self.longer_sides.get(side, 0) + count

    def summary(self) -> dict[str, Any]:
        """The manifest's statistics: channel mean and standard deviation in [0, 1], and images by longer side, pixels."""
        means = [total / max(1, self.samples) for total in self.channel_sum]
        squares = [total / max(1, self.samples) for total in self.channel_square_sum]
        deviations = [max(0.0, square - mean * mean) ** 0.5 for mean, square in zip(means, squares, strict=True)]
        return {
            "channel_mean": [round(mean / 255, 6) for mean in means],
            "channel_std": [round(deviation / 255, 6) for deviation in deviations],
            "longer_sides": dict(sorted(self.longer_sides.items(), key=lambda item: int(item[0]))),
        }


class Reject(Exception):
    """The image is left out of the dataset; the message is the reason."""


@dataclass(frozen=True, slots=True)
class BuiltRow:
    """A row of a shard, and the figures of its image for the manifest."""

    row: dict[str, Any]
    digest: bytes  # SHA-256 of the source's bytes
    size: int  # bytes of the encoded image
    statistics: ImageStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBuilder:
    """Builds rows from the images that a source lists."""

    read: Callable[[str], bytes]
    """Reads the bytes of a location."""
    read_regions: Callable[[str], bytes] | None
    """Reads the bytes of the source's column of masks at a location; None: there is none."""
    excluded: frozenset[str]
    """Paths that hold the same bytes as an image elsewhere."""
    short_side: int | None
    """Images are shrunk to this shorter side, pixels, and encoded as JPEG; None: their bytes are stored unchanged."""
    quality: int
    """Quality of that JPEG, 1 to 100."""
    max_pixels: int
    """Images of more pixels are rejected."""
    regions: RegionColumnsConfig

    def __call__(self, row: Mapping[str, Any]) -> BuiltRow:
        """Build the row of the image that `row` (of `LISTING_SCHEMA`) lists.

        Raises:
            Reject: the image is left out.
        """
        if row["path"] in self.excluded:
            raise Reject("duplicate")
        try:
            data = self.read(row["location"])
        except OSError as error:
            raise Reject(f"unreadable: {type(error).__name__}") from None
        if not data:
            raise Reject("empty file")
        digest = hashlib.sha256(data).digest()
        _check_header(data, self.max_pixels)
        try:
            image = decode_image(data)
        except DecodeError as error:
            raise Reject(f"undecodable: {error}") from None
        if scan_ends_early(data, image):
            raise Reject("undecodable: the JPEG's image data ends early")
        height, width = image.shape[1:]
        scale = 1.0
        if self.short_side is not None and min(height, width) > self.short_side:
            scale = self.short_side / min(height, width)
            data, (height, width) = _encode_smaller(image, self.short_side, self.quality)
        stored = {
            "image": {"bytes": data, "path": row["path"]},
            "image_id": row["image_id"],
            "width": width,
            "height": height,
            "label": row["label"],
            "objects": _scaled(row["objects"], scale),
        }
        if self.regions.columns:
            stored |= self._region_columns(row, image, (height, width))
        statistics = _statistics(image, (height, width), len(data))
        return BuiltRow(row=stored, digest=digest, size=len(data), statistics=statistics)

    def _region_columns(self, row: Mapping[str, Any], image: Tensor, stored_hw: tuple[int, int]) -> dict[str, Any]:
        try:
            column = None if self.read_regions is None else functools.partial(self.read_regions, row["location"])
            regions = compute_regions(image, row["path"], self.regions, column)
        except (OSError, RegionsError) as error:
            raise Reject(f"regions: {error}") from None
        return {
            PREFIX + name: None
            if ids is None
            else {"bytes": encode_regions(resize_regions(ids, stored_hw)), "path": None}
            for name, ids in regions.items()
        }


def _statistics(image: Tensor, stored_hw: tuple[int, int], num_bytes: int) -> ImageStatistics:
    stride = max(1, min(image.shape[1:]) // 64)
    samples = image[:, ::stride, ::stride].numpy().astype(np.int64).reshape(3, -1)
    longer_side = str(1 << (max(stored_hw) - 1).bit_length())
    return ImageStatistics(
        num_bytes=num_bytes,
        samples=samples.shape[1],
        channel_sum=samples.sum(axis=1).tolist(),
        channel_square_sum=(samples**2).sum(axis=1).tolist(),
        longer_sides={longer_side: 1},
    )


def _check_header(data: bytes, max_pixels: int) -> None:
    """Check the size in an image's header before memory for it is allocated.

    Raises:
        Reject: not an image, or one of more than `max_pixels`.
    """
    try:
        with open_image(data) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise Reject("too large: a decompression bomb") from None
    except Exception:  # damaged bytes raise nearly any kind
        raise Reject("not an image") from None
    if width * height > max_pixels:
        raise Reject(f"too large: {width}x{height} pixels")


def _encode_smaller(image: Tensor, short_side: int, quality: int) -> tuple[bytes, tuple[int, int]]:
    height, width = image.shape[1:]
    scale = short_side / min(height, width)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    encoded = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=quality)
    return encoded.getvalue(), (size[1], size[0])


def _scaled(objects: list[dict[str, Any]] | None, scale: float) -> list[dict[str, Any]] | None:
    if objects is None or scale == 1.0:
        return objects
    return [{**item, "bbox": [scale * side for side in item["bbox"]]} for item in objects]
