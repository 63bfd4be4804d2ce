"""A JPEG whose image data is cut before its end marker is found out; a complete one never is, grey corners included."""

import glob
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.datasets.build import build_dataset
from tests.places import SHARED_DATA
from tests.workloads.data.images import encoded, make_folder, picture, quarters
from workloads.data.build.jpeg_scan import scan_ends_early
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.data.loading.decode import decode_image, decode_with_pillow


def cut(jpeg: bytes, share: float) -> bytes:
    """The JPEG with only a share of its image data, and an end marker."""
    scan = jpeg.index(b"\xff\xda") + 14
    return jpeg[: scan + int(share * (len(jpeg) - 2 - scan))] + b"\xff\xd9"


def ends_early(jpeg: bytes) -> bool:
    return scan_ends_early(jpeg, decode_image(jpeg))


def rough(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(-30, 30, size=(height, width, 3))
    pixels = np.asarray(picture(5, width=width, height=height)).astype(int) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"quality": 20}, {"restart_marker_blocks": 3}], ids=str)
def test_a_cut_scan_is_found(share, options):
    for image in (rough(203, 155), rough(160, 160).convert("L")):
        jpeg = encoded(image, "JPEG", **options)
        assert not ends_early(jpeg)
        assert ends_early(cut(jpeg, share))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_corner_where_the_scan_ends_follows_the_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert ends_early(cut(encoded(rough(203, 155), "JPEG", exif=exif), 0.7))


def test_grey_images_are_complete():
    for image in (quarters(), Image.new("RGB", (70, 50), (128, 128, 128)), Image.new("L", (33, 17), 128)):
        for options in ({}, {"progressive": True}, {"restart_marker_blocks": 1}):
            jpeg = encoded(image, "JPEG", **options)
            assert not ends_early(jpeg) and not ends_early(jpeg + jpeg)  # a thumbnail or a second image may follow


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no real images beside the checkout")
def test_real_images_are_complete():
    for path in sorted(glob.glob(f"{SHARED_DATA}/**/*.jpg", recursive=True))[::60]:
        assert not ends_early(Path(path).read_bytes()), path


def test_a_cut_scan_is_a_reject_of_the_build(tmp_path):
    folder = make_folder(tmp_path / "images", classes=1, per_class=2)
    (folder / "class_0" / "cut.jpg").write_bytes(cut(encoded(rough(203, 155)), 0.5))
    build_dataset(BuildConfig(source=FolderSourceConfig(inputs=(str(folder),)), output=str(tmp_path / "shards")))
    (reject,) = pq.read_table(tmp_path / "shards" / "rejects.parquet").to_pylist()
    assert (reject["path"], reject["reason"]) == ("class_0/cut.jpg", "undecodable: the JPEG's image data ends early")


def test_an_orientation_in_xmp_alone_ends_no_build() -> None:
    """Pillow's `getexif` takes it, torchvision's decoder does not; such an image is upright as stored, for both."""
    pixels = np.asarray(rough(160, 96)).copy()
    pixels[:8, :8] = pixels[-8:, -8:] = 128  # a corner that looks like the end of a cut scan
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    jpeg = encoded(Image.fromarray(pixels), "JPEG", quality=95, subsampling=0, xmp=xmp)
    assert Image.open(io.BytesIO(jpeg)).getexif().get(0x0112) == 6
    assert decode_image(jpeg).shape[1:] == (96, 160)
    assert not ends_early(jpeg)
    assert decode_with_pillow(bytearray(jpeg)).shape[1:] == (96, 160)
