"""Damaged image files. As a program it decodes many, in the process that a test watches: `python -m … FIRST COUNT`."""

import contextlib
import random
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from tests.workloads.data.images import encoded, picture


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def cut_png() -> bytes:
    """A PNG whose compressed data ends early in a file that is otherwise complete: libpng's error ends torchvision."""
    header = struct.pack(">IIBBBBB", 200, 200, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(600) for _ in range(200)))[:60]
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def samples() -> list[bytes]:
    """A small file of every kind that is decoded."""
    image, exif = picture(0, width=66, height=50), Image.Exif()
    exif[0x0112] = 6
    options = [
        {},
        {"progressive": True},
        {"quality": 30, "restart_marker_blocks": 2},
        {"exif": exif},
        {"subsampling": 0},
    ]
    files = [encoded(image, "JPEG", **more) for more in options]
    files += [encoded(image.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    files += [encoded(image.convert(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "1")]
    files += [encoded(Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60) * 20), "PNG"), cut_png()]
    files += [encoded(image, form) for form in ("GIF", "WEBP", "BMP", "PPM", "TIFF", "TGA", "ICO", "PCX", "SGI")]
    files += [encoded(image, "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_deflate", "packbits")]
    for form in ("AVIF", "JPEG2000"):
        if form in Image.SAVE:
            files.append(encoded(image, form))
    return files


def damage(data: bytes, seed: int) -> bytes:
    """Bytes flipped, cut, removed, inserted or repeated, headers and bodies alike."""
    rng, result = random.Random(seed), bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        place = rng.randrange(len(result))
        match rng.randrange(6):
            case 0:
                result[place] = rng.randrange(256)
            case 1:
                result[place % 700] = rng.choice([0, 1, 127, 128, 255])
            case 2:
                del result[max(8, place) :]
            case 3:
                del result[max(2, place) : place + rng.randrange(1, 64)]
            case 4:
                result[place:place] = rng.randbytes(rng.randrange(1, 16))
            case 5:
                other = rng.randrange(len(result))
                result[place : place + 200] = result[other : other + rng.randrange(1, 200)]
    return bytes(result)


def main(first: int, count: int) -> None:
    """Decode damaged files as a build and a training worker do; prints how many decoded and how many did not."""
    from workloads.data.loading.decode import DecodeError, decode_batch, decode_image
    from workloads.data.store.region_codec import RegionsError, decode_regions

    files, outcomes = samples(), {"decoded": 0, "refused": 0}
    pool = ThreadPoolExecutor(1)
    for number in range(first, first + count):
        data = damage(files[number % len(files)], number)
        sys.stderr.write(f"{number}\n")  # of the file that ended the process, if one does
        try:
            decode_image(data)
            outcomes["decoded"] += 1
        except DecodeError as error:
            assert str(error)
            outcomes["refused"] += 1
        decode_batch([data], decode_size=16, pool=pool, dct_scaling=True)
        with contextlib.suppress(RegionsError):
            decode_regions(data)
    sys.stdout.write(f"{outcomes['decoded']} {outcomes['refused']}\n")


if __name__ == "__main__":
    Image.init()
    main(int(sys.argv[1]), int(sys.argv[2]))
