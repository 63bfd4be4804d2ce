"""The GPU's decoding: its canvas is the CPU's, whatever the decoder gets and refuses. nvJPEG itself needs a GPU."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from tests.workloads.data.images import encoded, picture
from tests.workloads.data.loading.test_decode import exif
from workloads.data.loading.decode import decode_batch
from workloads.data.loading.decode_cuda import decode_batch_on, is_plain_jpeg, nvjpeg
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.loading.upload import Upload
from workloads.data.store.manifest import Dataset
from workloads.errors import ConfigError

POOL = ThreadPoolExecutor(2)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Recorder:
    """torchvision's CPU decoder in nvJPEG's place: no turning, and nothing at all where one image is damaged."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def __call__(self, jpegs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.taken.append(len(jpegs))
        return [torch.ops.image.decode_jpeg(jpeg, 3, False) for jpeg in jpegs]


def progressive(image: Image.Image) -> bytes:
    return encoded(image, "JPEG", progressive=True)


GIVEN = [
    encoded(picture(0, width=64, height=48), "JPEG"),
    None,
    encoded(picture(1, width=30, height=20), "PNG"),
    progressive(picture(2, width=40, height=80)),
    encoded(picture(3, width=64, height=48), "JPEG", exif=exif(6)),
    encoded(picture(4, width=64, height=48), "JPEG", exif=exif(1)),
    encoded(picture(5, width=33, height=31).convert("L"), "JPEG"),
    encoded(picture(6, width=33, height=31).convert("CMYK"), "JPEG"),
]


@pytest.mark.parametrize("decode_size", [32, None])
def test_the_canvas_is_the_cpus_and_only_what_the_gpu_can_do_goes_there(decode_size):
    decoder = Recorder()
    given = [data and np.frombuffer(data, dtype=np.uint8) for data in GIVEN]  # as the reader hands them over
    there = decode_batch_on(CPU, given, decode_size=decode_size, pool=POOL, decode_jpegs=decoder)
    here = decode_batch(GIVEN, decode_size=decode_size, pool=POOL)
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))
    assert decoder.taken == [3]  # the plain one, the progressive one, the one that says it is upright


def test_a_damaged_one_is_the_only_one_lost():
    given = [*GIVEN, GIVEN[0][:600], b"no image"]
    there = decode_batch_on(CPU, given, decode_size=32, pool=POOL, decode_jpegs=Recorder())
    here = decode_batch(given, decode_size=32, pool=POOL)
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))
    assert there[3].tolist() == [True, False] + [True] * 6 + [False, False]


def test_nothing_at_all():
    for decode_size, side in ((16, 16), (None, 1)):
        canvas, content, source, valid = decode_batch_on(
            CPU, [None, b""], decode_size=decode_size, pool=POOL, decode_jpegs=Recorder()
        )
        assert canvas.shape == (2, 3, side, side) and not canvas.any() and not valid.any()
        assert content.tolist() == source.tolist() == [[0, 0], [0, 0]]


def test_every_cut_of_a_jpeg_is_looked_at_without_an_error():
    data = encoded(picture(0), "JPEG", exif=exif(3))
    assert not any(is_plain_jpeg(data[:length]) for length in range(len(data)))
    plain = encoded(picture(0), "JPEG")
    found = [is_plain_jpeg(plain[:length]) for length in range(len(plain))]
    assert found == sorted(found) and found[-1]
    assert is_plain_jpeg(plain[:2] + b"\xff" + plain[2:])  # fill bytes are allowed before a marker


def test_it_is_refused_where_there_is_no_gpu(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"data\.dct_scaling: only the CPU"):
        EvalLoader(dataset, DataConfig(uri="x", decode_device="cuda", dct_scaling=True), batch_size=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"data\.decode_device: is cuda, but this process sees no CUDA device; use cpu"
    ):
        EvalLoader(dataset, DataConfig(uri="x", decode_device="cuda"), batch_size=4)


def test_an_upload_to_the_cpu_is_the_batch(dataset: Dataset):
    batch = next(iter(EvalLoader(dataset, DataConfig(uri=dataset.uri, decode_size=32), batch_size=4)))
    moved = Upload(CPU)(batch)
    assert moved.images is batch.images and moved.image_ids == batch.image_ids


@needs_gpu
def test_nvjpegs_pixels_are_nearly_libjpegs():
    device = torch.device("cuda", torch.cuda.current_device())
    there = decode_batch_on(device, GIVEN, decode_size=32, pool=POOL, decode_jpegs=nvjpeg(device))
    here = decode_batch(GIVEN, decode_size=32, pool=POOL)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there[1:], here[1:], strict=True))
    assert (there[0].cpu().int() - here[0].int()).abs().float().mean() < 2


@needs_gpu
@pytest.mark.parametrize("decode_device", ["cpu", "cuda"])
def test_uploaded_batches_are_whole_while_the_gpu_is_busy(dataset: Dataset, decode_device: str):
    config = DataConfig(uri=dataset.uri, decode_size=32, decode_device=decode_device)
    device = torch.device("cuda", torch.cuda.current_device())
    upload, busy = Upload(device), torch.randn(2048, 2048, device=device)
    for batch in EvalLoader(dataset, config, batch_size=4):
        moved = upload(batch)
        for _ in range(20):
            busy = busy @ busy / busy.norm()
        total = moved.images.sum()
        del moved
        assert int(total) == int(batch.images.sum())
