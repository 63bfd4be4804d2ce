"""The loaders that `loader.py` compares: each one yields uint8 batches (64, 3, 224, 224), shuffled, without end.

All but `folder_pil` decode and resize with this project's own function, so that what is compared is the loading around it.
"""

import io
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH, SIDE, WORKERS = 64, 224, 2
Batches = Iterator[torch.Tensor]


def decode_one(data: Any) -> np.ndarray:
    """One image on its canvas, uint8 (3, 224, 224)."""
    from workloads.data.loading.decode import decode_image, shrink

    canvas = np.zeros((3, SIDE, SIDE), dtype=np.uint8)
    image = shrink(decode_image(data), SIDE)
    np.copyto(canvas[:, : image.shape[1], : image.shape[2]], image.numpy())
    return canvas


def shuffled(items: Iterator[Any], *, seed: int, buffer: int = 256) -> Iterator[Any]:
    """The usual shuffle buffer."""
    generator, held = random.Random(seed), []
    for item in items:
        held.append(item)
        if len(held) >= buffer:
            index = generator.randrange(len(held))
            held[index], held[-1] = held[-1], held[index]
            yield held.pop()
    generator.shuffle(held)
    yield from held


def limit_dct(folder: Path) -> Batches:
    """The limit with JPEG's DCT-scaled decoding."""
    return limit(folder, dct_scaling=True)


def limit(folder: Path, dct_scaling: bool = False) -> Batches:
    """The loader's own decode function, from memory, on as many threads."""
    from workloads.data.loading.decode import decode_batch
    from workloads.data.store.manifest import open_dataset
    from workloads.data.store.row_groups import RowGroupReader

    dataset = open_dataset(str(folder / "dataset"))
    reader = RowGroupReader(dataset)
    groups = [reader.read(group) for group in range(len(dataset.row_groups))]
    encoded = [bytes(group.encoded(row)) for group in groups for row in range(len(group.image_ids))]
    random.Random(0).shuffle(encoded)
    endless = itertools.cycle(encoded)
    with ThreadPoolExecutor(WORKERS) as pool, ThreadPoolExecutor(2) as batches:
        # Two batches at once, as the loader does: no thread waits for the last image of a batch.
        def make(data: list[bytes]) -> torch.Tensor:
            return decode_batch(data, decode_size=SIDE, pool=pool, dct_scaling=dct_scaling)[0]

        ahead = [batches.submit(make, list(itertools.islice(endless, BATCH))) for _ in range(3)]
        while True:
            ahead.append(batches.submit(make, list(itertools.islice(endless, BATCH))))
            yield ahead.pop(0).result()


def ours_dct(folder: Path) -> Batches:
    """This project's loader with DCT-scaled decoding."""
    return ours(folder, dct_scaling=True)


def ours(folder: Path, uri: str | None = None, start_step: int = 0, dct_scaling: bool = False) -> Batches:
    """This project's loader."""
    from workloads.data.loading.loaders import TrainLoader
    from workloads.data.loading.pipeline import DataConfig
    from workloads.data.loading.sample_plan import SamplePlan
    from workloads.data.store.manifest import open_dataset

    dataset = open_dataset(uri or str(folder / "dataset"))
    plan = SamplePlan(dataset.row_groups.rows, dataset_sha256=dataset.manifest.sha256, seed=0, global_batch_size=BATCH)
    reading = DataConfig(uri=dataset.uri, decode_size=SIDE, decode_threads=WORKERS, dct_scaling=dct_scaling)
    loader = TrainLoader(dataset, plan, reading)
    for batch in loader.iterate(start_step):
        yield batch.images


class _Parquet(torch.utils.data.IterableDataset):
    def __init__(self, files: list[str]) -> None:
        self.files = files

    def _encoded(self) -> Iterator[bytes]:
        import pyarrow.parquet as pq

        info = torch.utils.data.get_worker_info()
        groups = [(f, g) for f in self.files for g in range(pq.read_metadata(f).num_row_groups)]
        for epoch in itertools.count():
            random.Random(epoch).shuffle(groups)
            for file, group in groups[info.id :: info.num_workers]:
                table = pq.ParquetFile(file).read_row_group(group, columns=["image.bytes"])
                yield from (image["bytes"] for image in table["image"].to_pylist())

    def __iter__(self) -> Iterator[torch.Tensor]:
        for data in shuffled(self._encoded(), seed=0):
            yield torch.from_numpy(decode_one(data))


def _loader(dataset: Any, **options: Any) -> Batches:
    torch.multiprocessing.set_sharing_strategy("file_system")
    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, drop_last=True, **options))


def torch_parquet(folder: Path) -> Batches:
    """torch's DataLoader over the same Parquet files."""
    return _loader(_Parquet(sorted(str(path) for path in (folder / "dataset").glob("shard-*.parquet"))))


def webdataset(folder: Path) -> Batches:
    """WebDataset over tar files."""
    import webdataset as wds

    files = sorted(str(path) for path in (folder / "tar").glob("*.tar"))
    samples = (
        wds.WebDataset(files, shardshuffle=100, resampled=True, nodesplitter=wds.split_by_node)
        .shuffle(256)
        .map(lambda sample: torch.from_numpy(decode_one(sample["jpg"])))
    )
    return _loader(samples)


def streaming(folder: Path) -> Batches:
    """MosaicML Streaming over MDS shards."""
    from streaming import StreamingDataset

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(decode_one(super().__getitem__(index)["image"]))

    def endless() -> Batches:
        dataset = Images(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
        while True:
            yield from _loader(dataset)

    return endless()


class _Folder(torch.utils.data.Dataset):
    def __init__(self, paths: list[Path], draft: bool) -> None:
        self.paths, self.draft = paths, draft

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            if self.draft:
                image.draft("RGB", tuple(max(1, SIDE * side // max(image.size)) for side in image.size))
            rgb = image.convert("RGB")
            rgb.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=None)
        canvas = np.zeros((3, SIDE, SIDE), dtype=np.uint8)
        canvas[:, : rgb.height, : rgb.width] = np.asarray(rgb).transpose(2, 0, 1)
        return torch.from_numpy(canvas)


def folder_pil(folder: Path, draft: bool = False) -> Batches:
    """torch's DataLoader over files, decoded by Pillow."""
    paths = sorted(path for path in (folder / "images").rglob("*.jpg"))
    while True:
        yield from _loader(_Folder(paths, draft), shuffle=True)


def folder_pil_dct(folder: Path) -> Batches:
    """The same with Pillow's DCT-scaled decoding."""
    return folder_pil(folder, draft=True)


def ray_data(folder: Path) -> Batches:
    """Ray Data over the same Parquet files."""
    import ray.data

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False

    def decode(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"image": np.stack([decode_one(image["bytes"]) for image in batch["image"]])}

    while True:
        files = sorted(str(path) for path in (folder / "dataset").glob("shard-*.parquet"))
        data = ray.data.read_parquet(files, columns=["image"])
        data = data.map_batches(decode, batch_size=BATCH)
        for batch in data.iter_batches(batch_size=BATCH, prefetch_batches=2, local_shuffle_buffer_size=256):
            yield torch.from_numpy(batch["image"])


LOADERS: dict[str, Callable[[Path], Batches]] = {
    "limit": limit,
    "ours": ours,
    "torch_parquet": torch_parquet,
    "webdataset": webdataset,
    "streaming": streaming,
    "folder_pil": folder_pil,
    "ray_data": ray_data,
    "limit_dct": limit_dct,
    "ours_dct": ours_dct,
    "folder_pil_dct": folder_pil_dct,
}
PEERS = ("torch_parquet", "webdataset", "streaming", "folder_pil", "ray_data")


def dct_error(folder: Path) -> float:
    """Mean absolute difference of DCT-scaled decoding to full decoding, in 1/255, over the pixels of up to 256 images."""
    from workloads.data.loading.decode import decode_batch

    paths = sorted((folder / "images").rglob("*.jpg"))[:256]
    encoded = [path.read_bytes() for path in paths]
    with ThreadPoolExecutor(WORKERS) as pool:
        full, content, *_ = decode_batch(encoded, decode_size=SIDE, pool=pool)
        scaled, *_ = decode_batch(encoded, decode_size=SIDE, pool=pool, dct_scaling=True)
    difference = (full.int() - scaled.int()).abs().sum()
    return float(difference / (3 * content.prod(1).sum()))


def write_peer_formats(folder: Path) -> None:
    """Write the images of a folder as tar and MDS shards, in a shuffled order, bytes as they are."""
    import tarfile

    from streaming import MDSWriter

    paths = sorted((folder / "images").rglob("*.jpg"))
    random.Random(0).shuffle(paths)
    (folder / "tar").mkdir()
    size = -(-len(paths) // 8)
    for number in range(8):
        with tarfile.open(folder / "tar" / f"{number:03d}.tar", "w") as tar:
            for index, path in enumerate(paths[number * size : (number + 1) * size]):
                data = path.read_bytes()
                entry = tarfile.TarInfo(f"{number:03d}_{index:06d}.jpg")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    with MDSWriter(out=str(folder / "mds"), columns={"image": "bytes"}, size_limit="32mb") as writer:
        for path in paths:
            writer.write({"image": path.read_bytes()})
