"""No bytes of a dataset end a process: a damaged file is a reject of the build and a masked row of training."""

import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from orchestrator.datasets.build import build_dataset
from tests.places import ROOT
from tests.workloads.data.damaged import cut_png
from tests.workloads.data.images import encoded, make_folder, picture
from workloads.data.build.shards import BuildConfig
from workloads.data.build.sources import FolderSourceConfig
from workloads.data.loading import decode
from workloads.data.loading.decode import DecodeError, decode_batch, decode_image
from workloads.data.store.image_file import sound_jpeg_hw

FILES = int(os.environ.get("FUZZ_FILES", "1500"))
"""Damaged files that are decoded; a thousand take about a second."""


def test_damaged_files_do_not_end_the_process():
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.workloads.data.damaged", "0", str(FILES)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 + FILES / 10)
    assert process.returncode == 0, process.stderr[-2000:]
    decoded, refused = map(int, process.stdout.split())
    assert decoded + refused == FILES and min(decoded, refused) > FILES // 10


def test_a_damaged_png_is_a_reject_of_the_build(tmp_path):
    folder = make_folder(tmp_path / "images", classes=1, per_class=3)
    (folder / "class_0" / "cut.png").write_bytes(cut_png())
    build_dataset(BuildConfig(source=FolderSourceConfig(inputs=(str(folder),)), output=str(tmp_path / "shards")))
    (reject,) = pq.read_table(tmp_path / "shards" / "rejects.parquet").to_pylist()
    assert reject["path"] == "class_0/cut.png" and reject["reason"].startswith("undecodable: ")


def test_a_damaged_png_is_a_masked_row_of_training(decode_pool):
    canvas, _, _, valid = decode_batch([encoded(picture(0), "PNG"), cut_png()], decode_size=32, pool=decode_pool)
    assert valid.tolist() == [True, False] and not canvas[1].any()


@pytest.fixture
def decode_pool():
    with decode.ThreadPoolExecutor(2) as pool:
        yield pool


def grown(jpeg: bytes, side: int) -> bytes:
    """The same JPEG with another size in its frame's header."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + 2 * side.to_bytes(2, "big") + jpeg[place + 4 :]


def test_a_header_that_asks_for_too_much_memory_is_refused_before_it_is_allocated():
    jpeg = encoded(picture(0))
    with pytest.raises(DecodeError, match="too large: 65000x65000 pixels"):
        decode_image(grown(jpeg, 65000))
    png = bytearray(encoded(picture(0), "PNG"))
    png[16:24] = 2 * (60_000).to_bytes(4, "big")
    with pytest.raises(DecodeError, match=r"\w+"):
        decode_image(bytes(png))


def test_only_jpegs_of_sound_structure_go_to_torchvision():
    for more in ({}, {"progressive": True}, {"exif": b"Exif\0\0II*\0"}):
        jpeg = encoded(picture(0), "JPEG", **more)
        assert sound_jpeg_hw(jpeg) == (48, 64)
        assert sound_jpeg_hw(jpeg[:2] + b"\xff" + jpeg[2:]) == (48, 64)  # a fill byte is allowed before a marker
        assert sound_jpeg_hw(jpeg + b"trailing") == (48, 64)
        assert not any(sound_jpeg_hw(jpeg[:length]) for length in range(len(jpeg)))  # no end marker, or no frame
    assert sound_jpeg_hw(encoded(picture(0), "PNG")) is None
    assert sound_jpeg_hw(grown(encoded(picture(0)), 0)) is None


def test_damaged_exif_data_leaves_the_image_as_it_is_stored():
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(0), form, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
        assert tuple(decode_image(data).shape) == (3, 48, 64)
