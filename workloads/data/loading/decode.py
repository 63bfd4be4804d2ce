"""Decodes images on a pool of threads, upright and in RGB, into the canvas of a batch: `decode_batch`, `decode_image`.

torchvision's JPEG decoder and Pillow's decoders release the GIL, so threads suffice and nothing is copied between processes.
No bytes end the process: what is not a sound JPEG is decoded by Pillow, and any error makes the row an undecodable one.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401 - registers torch.ops.image
from PIL import Image
from torch import Tensor

from workloads.data.store.image_file import MAX_PIXELS, Encoded, open_image, orientation_of, sound_jpeg_hw, upright
from workloads.data.store.region_codec import RegionsError, decode_regions, resize_regions

_RGB = 3  # torchvision.io.ImageReadMode.RGB; the module's wrappers warn at every call, its operators do not


class DecodeError(Exception):
    """The bytes are no readable image; the message is the reason."""


def decode_image(encoded: Encoded) -> Tensor:
    """One image, uint8 (3, H, W), RGB, its EXIF orientation applied.

    Raises:
        DecodeError: not an image, damaged, or of more than `MAX_PIXELS`.
    """
    try:
        data = bytearray(encoded)  # a copy, because torch wants writable memory; small beside the decoding
        size = sound_jpeg_hw(data)
        if size is None:
            return decode_with_pillow(data)
        if size[0] * size[1] > MAX_PIXELS:
            raise DecodeError(f"too large: {size[1]}x{size[0]} pixels")
        image: Tensor = torch.ops.image.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), _RGB, True)
        return image
    except Exception as error:  # decoders raise a dozen kinds for damaged bytes, KeyError and struct.error among them
        raise _in_words(error) from None


def _in_words(error: Exception) -> DecodeError:
    if isinstance(error, DecodeError):
        return error
    return DecodeError(" ".join(str(error).split())[:200] or type(error).__name__)


def decode_with_pillow(data: bytearray) -> Tensor:
    """As `decode_image`, by Pillow alone; raises nearly any exception where the bytes are damaged."""
    with open_image(data) as image:
        orientation = orientation_of(image)
        pixels: Image.Image = image
        if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
            # Pillow clips 16-bit grey at 255 instead of scaling it.
            grey = np.asarray(image).astype(np.float64)
            scaled = grey / 257 if image.mode.startswith("I") else grey
            pixels = Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
        if pixels.mode != "RGB":
            pixels = pixels.convert("RGB")
        return torch.from_numpy(np.array(upright(pixels, orientation))).permute(2, 0, 1)


def decode_jpeg_scaled(encoded: Encoded, longer_side: int) -> tuple[Tensor, tuple[int, int]] | None:
    """A JPEG decoded at 1/2, 1/4 or 1/8 of its size, not below `longer_side`, and shrunk to that.

    libjpeg leaves the higher frequencies of each block out instead of decoding and averaging them: faster, with slightly
    other pixels.

    Returns:
        uint8 (3, H, W), RGB, upright, its longer side `longer_side` pixels, and the source's height and width; None where
        this is no faster: no JPEG, or too small.

    Raises:
        DecodeError: as `decode_image`.
    """
    data = memoryview(encoded)  # type: ignore[arg-type]  # an array is a buffer too
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    try:
        with open_image(data) as image:
            width, height = image.size
            target_h, target_w = shrunk_hw(height, width, longer_side)
            if min(width // target_w, height // target_h) < 2:
                return None
            orientation = orientation_of(image)
            drafted: Any = image.draft("RGB", (target_w, target_h))
            # The scaled image is a whole number of blocks; the source's extent in it may be a fraction.
            extent = drafted[1] if drafted is not None else None
            shrunk = image.convert("RGB").resize((target_w, target_h), Image.Resampling.BILINEAR, box=extent)
            pixels = torch.from_numpy(np.array(upright(shrunk, orientation))).permute(2, 0, 1)
        return pixels, (width, height) if orientation >= 5 else (height, width)
    except Exception as error:
        raise _in_words(error) from None


def decode_batch(
    encoded: Sequence[Encoded | None],
    *,
    decode_size: int | None,
    pool: ThreadPoolExecutor,
    pinned: bool = False,
    dct_scaling: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decode a batch into one canvas.

    With a `decode_size` s, an image whose longer side exceeds s is shrunk to it (antialiased, aspect kept; never
    enlarged) and stands at the top left of an s×s canvas, zeros elsewhere. Without one, images keep their resolution
    and the canvas is as large as the batch's largest height and width.

    With `pinned` the canvas is in page-locked memory, from which a GPU copies while it computes. With `dct_scaling` JPEGs
    that are at least twice as large as `decode_size` are decoded at a fraction of their size (`decode_jpeg_scaled`).

    Returns:
        images uint8 (B, 3, H, W); content_hw and source_hw int64 (B, 2), pixels; valid bool (B,), False where there
        were no bytes or they did not decode: such a row is all zeros.
    """
    content = np.zeros((len(encoded), 2), dtype=np.int64)
    source = np.zeros((len(encoded), 2), dtype=np.int64)
    if decode_size is not None:
        canvas = _canvas(len(encoded), decode_size, decode_size, pinned)
        rows = canvas.numpy()

        def work(i: int) -> None:
            decoded = _try_decode(encoded[i], decode_size, dct_scaling)
            if decoded is not None:
                image, source[i] = decoded
                content[i] = image.shape[1:]
                _place(image, rows[i])

        _for_each(pool, work, len(encoded))
    else:
        results = list(pool.map(lambda data: _try_decode(data, None), encoded))
        for i, decoded in enumerate(results):
            if decoded is not None:
                source[i] = content[i] = decoded[0].shape[1:]
        height, width = (max(1, int(side)) for side in content.max(axis=0, initial=0))
        canvas = _canvas(len(encoded), height, width, pinned)
        list(pool.map(_place, [decoded and decoded[0] for decoded in results], canvas.numpy()))
    return canvas, torch.from_numpy(content), torch.from_numpy(source), torch.from_numpy(content[:, 0] > 0)


def decode_regions_batch(
    encoded: Sequence[bytes | None],
    *,
    content_hw: Tensor,
    canvas_hw: tuple[int, int],
    pool: ThreadPoolExecutor,
    pinned: bool = False,
) -> tuple[Tensor, int]:
    """Decode region masks, at the size of their images, into a canvas like theirs.

    Args:
        content_hw: int64 (B, 2), from `decode_batch`; an image that did not decode has no regions.

    Returns:
        int32 (B, H, W), 0 where there is no region or no readable mask; and the highest number in it.
    """
    canvas = torch.zeros((len(encoded), *canvas_hw), dtype=torch.int32, pin_memory=pinned)
    rows, sizes = canvas.numpy(), content_hw.tolist()

    def work(i: int) -> int:
        data, (height, width) = encoded[i], sizes[i]
        if data is None or height == 0:
            return 0
        try:
            ids = resize_regions(decode_regions(data), (height, width))
        except RegionsError:
            return 0
        rows[i, :height, :width] = ids
        return int(ids.max(initial=0))

    return canvas, max(pool.map(work, range(len(encoded))), default=0)


def _canvas(count: int, height: int, width: int, pinned: bool) -> Tensor:
    if pinned:
        return torch.zeros((count, 3, height, width), dtype=torch.uint8, pin_memory=True)
    # numpy's zeros come from the system already cleared; torch clears its own.
    return torch.from_numpy(np.zeros((count, 3, height, width), dtype=np.uint8))


def _for_each(pool: ThreadPoolExecutor, work: Callable[[int], None], count: int) -> None:
    # A few images a task: handing over a small image costs a tenth of decoding it.
    chunk = 4 if count >= 32 else 1
    starts = range(0, count, chunk)

    def some(start: int) -> None:
        for i in range(start, min(start + chunk, count)):
            work(i)

    list(pool.map(some, starts))


def _place(image: Tensor | None, canvas: np.ndarray) -> None:
    if image is None:
        return
    # numpy copies on this thread alone; torch would start its own pool in each thread of this one.
    np.copyto(canvas[:, : image.shape[1], : image.shape[2]], image.numpy())


def _try_decode(
    encoded: Encoded | None, decode_size: int | None, dct_scaling: bool = False
) -> tuple[Tensor, tuple[int, int]] | None:
    if encoded is None:
        return None
    try:
        if dct_scaling and decode_size is not None:
            scaled = decode_jpeg_scaled(encoded, decode_size)
            if scaled is not None:
                return scaled
        image = decode_image(encoded)
    except DecodeError:
        return None
    height, width = image.shape[1:]
    return shrink(image, decode_size), (height, width)


def shrunk_hw(height: int, width: int, longer_side: int | None) -> tuple[int, int]:
    """The size, pixels, with a longer side of at most `longer_side` and the same aspect; never larger than before."""
    if longer_side is None or max(height, width) <= longer_side:
        return height, width
    scale = longer_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def shrink(image: Tensor, longer_side: int | None) -> Tensor:
    """Shrink `image`, uint8 (3, H, W), to a longer side of at most `longer_side` pixels, antialiased bilinear."""
    size = shrunk_hw(image.shape[1], image.shape[2], longer_side)
    if size == tuple(image.shape[1:]):
        return image
    # Decoders give packed RGB. With the strides of channels_last, torch resizes it without a copy.
    packed = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(packed, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
