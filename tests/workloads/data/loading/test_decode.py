"""Every kind of image comes out right side up, in RGB, at the top left of its canvas."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from tests.workloads.data.images import COLOURS, encoded, picture, quarters
from workloads.data.loading.decode import DecodeError, decode_batch, decode_image

POOL = ThreadPoolExecutor(2)


def corners(image: torch.Tensor) -> list[tuple[int, ...]]:
    """Colours in the middles of the four quarters."""
    height, width = image.shape[1:]
    places = [
        (height // 4, width // 4),
        (height // 4, -width // 4),
        (-height // 4, width // 4),
        (-height // 4, -width // 4),
    ]
    return [tuple(image[:, y, x].tolist()) for y, x in places]


def assert_upright(image: torch.Tensor, tolerance: int = 12) -> None:
    assert image.dtype == torch.uint8
    assert tuple(image.shape) == (3, 40, 80)
    np.testing.assert_allclose(corners(image), list(COLOURS.values()), atol=tolerance)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


TURNED = {  # what a camera stores so that this orientation turns it back
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(form, orientation):
    stored = quarters().transpose(TURNED[orientation])
    assert_upright(decode_image(encoded(stored, form, exif=exif(orientation))))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_formats(form):
    assert_upright(decode_image(encoded(quarters(), form)))


def test_palette_alpha_and_cmyk():
    assert_upright(decode_image(encoded(quarters().convert("P", palette=Image.Palette.ADAPTIVE), "PNG")))
    assert_upright(decode_image(encoded(quarters().convert("RGBA"), "PNG")))
    assert_upright(decode_image(encoded(quarters().convert("CMYK"), "JPEG")), tolerance=25)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(form):
    ramp = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    image = decode_image(encoded(Image.fromarray(ramp), form))
    assert tuple(image.shape) == (3, 32, 64)
    for channel in image:
        np.testing.assert_allclose(channel.numpy(), ramp / 257, atol=1)


def test_grey_jpeg_becomes_three_equal_channels():
    image = decode_image(encoded(quarters().convert("L")))
    assert torch.equal(image[0], image[1])
    assert image.shape[0] == 3


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(quarters())[:400], encoded(quarters(), "PNG")[:100]])
def test_what_does_not_decode_says_why(data):
    with pytest.raises(DecodeError, match=r"\w+"):
        decode_image(data)


@pytest.mark.parametrize("decode_size", [32, 64, None])
def test_batch_canvas(decode_size):
    images = [picture(0, width=64, height=48), picture(1, width=30, height=20), picture(2, width=40, height=80)]
    data = [encoded(image, "PNG") for image in images]
    canvas, content, source, valid = decode_batch(
        [data[0], None, data[1], b"broken", data[2]], decode_size=decode_size, pool=POOL
    )
    assert valid.tolist() == [True, False, True, False, True]
    assert source.tolist() == [[48, 64], [0, 0], [20, 30], [0, 0], [80, 40]]
    expected = {
        32: [[24, 32], [0, 0], [20, 30], [0, 0], [32, 16]],
        64: [[48, 64], [0, 0], [20, 30], [0, 0], [64, 32]],
        None: [[48, 64], [0, 0], [20, 30], [0, 0], [80, 40]],
    }[decode_size]
    assert content.tolist() == expected
    assert tuple(canvas.shape[2:]) == ((decode_size, decode_size) if decode_size else (80, 64))
    for row, (height, width) in enumerate(expected):
        outside = canvas[row].clone()
        outside[:, :height, :width] = 0
        assert not outside.any()
    np.testing.assert_array_equal(canvas[2, :, :20, :30].permute(1, 2, 0).numpy(), np.asarray(images[1]))


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    canvas, *_ = decode_batch([encoded(Image.fromarray(stripes), "PNG")], decode_size=16, pool=POOL)
    assert canvas.float().std() < 16
    assert 120 < canvas.float().mean() < 135


def test_shrinking_is_like_pillows():
    image = picture(3, width=200, height=150)
    canvas, *_ = decode_batch([encoded(image, "PNG")], decode_size=100, pool=POOL)
    expected = np.asarray(image.resize((100, 75), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(canvas[0, :, :75, :].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_nothing_and_all_broken():
    assert decode_batch([], decode_size=16, pool=POOL)[0].shape == (0, 3, 16, 16)
    canvas, _, _, valid = decode_batch([None, b"x"], decode_size=None, pool=POOL)
    assert canvas.shape == (2, 3, 1, 1)
    assert not valid.any()


def test_decoding_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_batch([encoded(quarters())], decode_size=32, pool=POOL)


def photograph(height: int, width: int) -> Image.Image:
    """Something smooth with edges, as photographs are."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin(x / 23.0 + c) * np.cos(y / 31.0) + 20 * (x > y) for c in range(3)]
    return Image.fromarray(np.clip(np.stack(waves, -1), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("hw", [(480, 640), (641, 479), (500, 500), (2000, 90)])
def test_dct_scaled_decoding_gives_nearly_the_same_and_the_same_sizes(orientation, mode, hw):
    data = encoded(photograph(*hw).convert(mode), "JPEG", exif=exif(orientation))
    full = decode_batch([data], decode_size=100, pool=POOL)
    scaled = decode_batch([data], decode_size=100, pool=POOL, dct_scaling=True)
    assert all(torch.equal(a, b) for a, b in zip(full[1:], scaled[1:], strict=True))
    assert (full[0].int() - scaled[0].int()).abs().float().mean() < 1.5
    assert not torch.equal(full[0], scaled[0])  # it was really done


def test_dct_scaled_decoding_leaves_what_it_cannot_quicken_as_it_is():
    small, png = encoded(photograph(150, 190), "JPEG"), encoded(photograph(480, 640), "PNG")
    given = [small, png, small[:200], b"x", None]
    full = decode_batch(given, decode_size=100, pool=POOL)
    scaled = decode_batch(given, decode_size=100, pool=POOL, dct_scaling=True)
    assert all(torch.equal(a, b) for a, b in zip(full, scaled, strict=True))
    cut = encoded(photograph(480, 640), "JPEG")[:-3000]
    assert not decode_batch([cut], decode_size=100, pool=POOL, dct_scaling=True)[3].any()
