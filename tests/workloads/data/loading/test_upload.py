"""Batches arrive on the device as the loader made them."""

import pytest
import torch

from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.loading.upload import Upload
from workloads.data.store.manifest import Dataset


def test_an_upload_to_the_cpu_is_the_batch(dataset: Dataset):
    batch = next(iter(EvalLoader(dataset, DataConfig(uri=dataset.uri, decode_size=32), batch_size=4)))
    moved = Upload(torch.device("cpu"))(batch)
    assert moved.images is batch.images and moved.image_ids == batch.image_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_uploaded_batches_are_complete_while_the_gpu_is_busy(dataset: Dataset):
    config = DataConfig(uri=dataset.uri, decode_size=32)
    device = torch.device("cuda", torch.cuda.current_device())
    upload, busy = Upload(device), torch.randn(2048, 2048, device=device)
    for batch in EvalLoader(dataset, config, batch_size=4):
        moved = upload(batch)
        for _ in range(20):
            busy = busy @ busy / busy.norm()
        total = moved.images.sum()
        del moved
        assert int(total) == int(batch.images.sum())
