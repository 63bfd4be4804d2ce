"""JPEGs decoded by a GPU (nvJPEG) straight onto the batch's canvas there; what it cannot decode, the CPU does.

Same interface, sizes and canvas as `workloads.data.loading.decode`, and nearly the same pixels: nvJPEG rounds its transform otherwise than
libjpeg does.
"""

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torchvision  # noqa: F401 - registers torch.ops.image
from PIL import Image
from torch import Tensor

from workloads.data.loading.decode import EXIF_ORIENTATION, MAX_PIXELS, DecodeError, Encoded, decode_image, shrink
from workloads.errors import ConfigError

_RGB = 3  # torchvision.io.ImageReadMode.RGB
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_NVJPEGS_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive Huffman

DecodeJpegs = Callable[[list[Tensor]], list[Tensor]]
"""JPEGs, uint8 (n,) each, to RGB images on the device, uint8 (3, H, W) each; RuntimeError where one of them does not decode."""


def cuda_device() -> torch.device:
    """This process's GPU.

    Raises:
        ConfigError: there is none.
    """
    if not torch.cuda.is_available():
        raise ConfigError("data.decode_device: is cuda, but this process sees no CUDA device; use cpu")
    return torch.device("cuda", torch.cuda.current_device())


def nvjpeg(device: torch.device) -> DecodeJpegs:
    """The GPU's decoder."""

    def decode(jpegs: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = torch.ops.image.decode_jpegs_cuda(jpegs, _RGB, device)
        return found

    return decode


def decode_batch_on(
    device: torch.device,
    encoded: Sequence[Encoded | None],
    *,
    decode_size: int | None,
    pool: ThreadPoolExecutor,
    decode_jpegs: DecodeJpegs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decode a batch into one canvas on `device`; as `decode_batch`, whose other three tensors stay on the CPU too.

    Plain upright JPEGs go to `decode_jpegs` in one call. All else (PNG, WebP, EXIF-rotated, grey or CMYK JPEGs) is decoded on the
    CPU, and so are all when one of them is damaged, so that only that one is lost.
    """
    images: list[Tensor | None] = [None] * len(encoded)
    on_cpu = {i: data for i, data in enumerate(encoded) if data is not None}
    simple = {i: data for i, data in on_cpu.items() if is_plain_jpeg(data)}
    if simple:
        # A copy, because torch wants writable memory.
        jpegs = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in simple.values()]
        try:
            for i, there in zip(simple, decode_jpegs(jpegs), strict=True):
                images[i] = there
                del on_cpu[i]
        except RuntimeError:
            pass  # no partial results: the CPU finds out which one it was
    for i, here in zip(on_cpu, pool.map(_try_decode, on_cpu.values()), strict=True):
        images[i] = None if here is None else here.to(device)
    source = torch.tensor([[0, 0] if image is None else image.shape[1:] for image in images], dtype=torch.int64)
    shrunk = [image if image is None else shrink(image, decode_size) for image in images]
    content = torch.tensor([[0, 0] if image is None else image.shape[1:] for image in shrunk], dtype=torch.int64)
    source, content = source.reshape(-1, 2), content.reshape(-1, 2)
    height, width = (decode_size, decode_size) if decode_size else content.amax(0).clamp(min=1).tolist()
    canvas = torch.zeros((len(encoded), 3, height, width), dtype=torch.uint8, device=device)
    for row, image in zip(canvas, shrunk, strict=True):
        if image is not None:
            row[:, : image.shape[1], : image.shape[2]] = image
    return canvas, content, source, content[:, 0] > 0


def is_plain_jpeg(encoded: Encoded) -> bool:
    """Whether these bytes begin as a JPEG of three 8-bit components that needs no turning, of a size that may be decoded.

    Walks the segments' headers up to the frame's (ITU T.81, annex B); none of their bodies is read.
    """
    data = memoryview(encoded)  # type: ignore[arg-type]  # an array is a buffer too
    if bytes(data[:2]) != b"\xff\xd8":
        return False
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4])
        body = data[place + 4 : place + 2 + length]
        if len(body) < length - 2:
            return False
        if marker == 0xE1 and bytes(body[:4]) == b"Exif" and _is_turned(bytes(body)):
            return False  # which nvJPEG would leave as it is
        if marker == 0xEE and bytes(body[:5]) == b"Adobe" and bytes(body[11:12]) == b"\0":
            return False  # stored as RGB
        if marker in _START_OF_FRAME:
            precision, components = data[place + 4], data[place + 9]
            pixels = int.from_bytes(data[place + 5 : place + 7]) * int.from_bytes(data[place + 7 : place + 9])
            return marker in _NVJPEGS_FRAMES and precision == 8 and components == 3 and 0 < pixels <= MAX_PIXELS
        place += 2 + length
    return False


def _is_turned(segment: bytes) -> bool:
    tags = Image.Exif()
    try:
        tags.load(segment)
        return bool(tags.get(EXIF_ORIENTATION, 1) != 1)
    except (SyntaxError, ValueError, struct.error):
        return True


def _try_decode(encoded: Encoded) -> Tensor | None:
    try:
        return decode_image(encoded)
    except DecodeError:
        return None
