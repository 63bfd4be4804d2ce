"""How fast images reach the trainer, against the decoder's own limit and against other loaders.

    python tests/benchmarks/loader.py --json loader.json

Everything is measured in one run on the same images, each loader in a process of its own, repetitions interleaved, medians
reported. Peers are installed into an environment of their own below build/. Leave the machine alone meanwhile.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SHARED = ROOT.parent / "shared" / "data"
REQUIREMENTS = (
    "webdataset",
    "mosaicml-streaming",
    "braceexpand",
    "xxhash",
    "zstd",
    "Brotli",
    "python-snappy",
    "cramjam",
    "catalogue",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring, for one loader and repetition")
    parser.add_argument("--sets", default="caltech101,coco", help="names with commas; '': the plan's figures alone")
    parser.add_argument("--loaders", default=None, help="names with commas; default: all")
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--no-plan", action="store_true")
    parser.add_argument("--work", type=Path, help="folder for the image sets, kept")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker[0]](*options.worker[1:])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure(options, options.work or Path(temporary))
    text = json.dumps(figures, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    from tests.benchmarks.loader_peers import LOADERS

    python = peers_python()
    names = options.loaders.split(",") if options.loaders else list(LOADERS)
    figures: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor(), "load": os.getloadavg()[0]},
        "image_sets": {},
    }
    for name in [name for name in options.sets.split(",") if name]:
        prepare(work / name, name, python)
        figures["image_sets"][name] = measure_set(work / name, names, options, python)
    if not options.no_plan:
        figures["plan"] = {f"{10**e:.0e} images": worker(python, "plan", str(10**e)) for e in (4, 6, 8, 9)}
    return figures


def measure_set(folder: Path, names: list[str], options: argparse.Namespace, python: Path) -> dict[str, Any]:
    from tests.benchmarks.loader_peers import PEERS

    rates: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(options.repetitions):
        for name in names[repetition:] + names[:repetition]:  # each loader comes at another place each time
            rate = worker(python, "rate", name, str(folder), str(options.seconds))
            rates[name].append(rate["images_per_s"])
            print(f"{folder.name} {name}: {rate}", file=sys.stderr)
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    result: dict[str, Any] = {"images_per_s": medians, "repetitions": rates}
    if "ours" in medians and "limit" in medians:
        result["ratio_to_limit"] = round(medians["ours"] / medians["limit"], 3)
    peers = {name: rate for name, rate in medians.items() if name in PEERS}
    if "ours" in medians and peers:
        result["best_peer"] = max(peers, key=peers.__getitem__)
        result["ratio_to_best_peer"] = round(medians["ours"] / max(peers.values()), 3)
    if "ours_dct" in medians and "limit_dct" in medians:
        result["dct_scaling"] = {
            "ratio_to_limit": round(medians["ours_dct"] / medians["limit_dct"], 3),
            "mean_absolute_error_of_255": worker(python, "dct_error", str(folder))["error"],
        }
    result["first_batch_s"] = {
        where: min(worker(python, "first_batch", str(folder), step)["seconds"] for _ in range(options.repetitions))
        for where, step in (("at the start", "0"), ("deep inside", "1000003"))
    }
    result["memory"] = worker(python, "memory", str(folder))
    if not options.no_s3:
        result["s3"] = measure_s3(folder, options, python, medians.get("ours"))
    return result


def measure_s3(folder: Path, options: argparse.Namespace, python: Path, local: float | None) -> dict[str, Any]:
    """The same dataset from the S3 peer on loopback, which shares the cores."""
    from orchestrator.storage import object_store
    from tests.s3_peer import run_s3_peer

    with tempfile.TemporaryDirectory() as swift, run_s3_peer(Path(swift)) as peer:
        os.environ.update(peer.environment())
        s3 = object_store.client()
        s3.create_bucket(Bucket="bench")
        for path in sorted((folder / "dataset").iterdir()):
            s3.upload_file(str(path), "bench", f"{folder.name}/{path.name}")
        uri = f"s3://bench/{folder.name}"
        rates = [
            worker(python, "rate", "ours", str(folder), str(options.seconds), uri)["images_per_s"]
            for _ in range(options.repetitions)
        ]
        first = min(worker(python, "first_batch", str(folder), "0", uri)["seconds"] for _ in range(options.repetitions))
    median = statistics.median(rates)
    ratio = round(median / local, 3) if local else None
    return {"images_per_s": round(median, 1), "ratio_to_local": ratio, "first_batch_s": first}


def prepare(folder: Path, name: str, python: Path) -> None:
    """The image set in every loader's own format."""
    from orchestrator.datasets.build import build_dataset
    from workloads.data.build.shards import BuildConfig
    from workloads.data.build.sources import FolderSourceConfig

    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    sources = {
        "caltech101": [SHARED / "caltech101" / "images"],
        "coco": [SHARED / "coco" / "train2017", SHARED / "coco" / "val2017"],
    }
    found = [path for source in sources[name] if source.is_dir() for path in sorted(source.rglob("*.jpg"))]
    if found:
        for index, path in enumerate(found):
            shutil.copyfile(path, folder / "images" / f"{index:06d}.jpg")
    else:
        make_images(folder / "images", *{"caltech101": (2000, 300, 200), "coco": (256, 640, 480)}[name])
    source = FolderSourceConfig(inputs=(str(folder / "images"),))
    build_dataset(BuildConfig(source=source, output=str(folder / "dataset"), rows_per_shard=1024))
    worker(python, "formats", str(folder))
    (folder / "ready").touch()


def make_images(folder: Path, count: int, width: int, height: int) -> None:
    """Textured JPEGs of about the bytes a pixel that photographs have."""
    import numpy as np
    from PIL import Image

    for index in range(count):
        generator = np.random.default_rng(index)
        layers = [
            np.asarray(Image.fromarray(generator.integers(0, 255, (side, side, 3), np.uint8)).resize((width, height)))
            for side in (4, 16, 64)
        ]
        pixels = np.mean(layers, axis=0) + generator.normal(0, 6, (height, width, 3))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / f"{index:06d}.jpg", quality=90)


def peers_python() -> Path:
    """An environment with the peers, which sees this one's packages too, so that all decode with the same libraries."""
    home = Path(os.environ.get("TEST_PEERS") or ROOT / "build" / "peers") / "loaders"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        site = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        (Path(site) / "main.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        # Streaming asks for the clients of every cloud; none is needed to read local shards.
        subprocess.run([*pip, "--no-deps", *REQUIREMENTS], check=True)
        subprocess.run([*pip, "transformers"], check=True)
        (home / "ready").touch()
    return python


def worker(python: Path, *arguments: str) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [str(python), str(Path(__file__)), "--worker", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rate(name: str, folder: str, seconds: str, uri: str = "") -> dict[str, float]:
    """Images a second between the first batch and the last."""
    from tests.benchmarks.loader_peers import BATCH, LOADERS, SIDE, ours

    batches = ours(Path(folder), uri) if uri else LOADERS[name](Path(folder))
    for _ in range(5):  # workers are up, what was prefetched while they came up is used
        shape = tuple(next(batches).shape)
    assert shape == (BATCH, 3, SIDE, SIDE), shape
    started, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < float(seconds):
        images += len(next(batches))
    _finish({"images_per_s": round(images / elapsed, 1), "images": images})
    raise AssertionError("unreachable")


def _finish(figures: dict[str, float]) -> None:
    # Some peers' workers do not end by themselves.
    print(json.dumps(figures), flush=True)
    os._exit(0)


def first_batch(folder: str, step: str, uri: str = "") -> dict[str, float]:
    """From an opened dataset to the first batch, imports done."""
    from tests.benchmarks.loader_peers import BATCH, SIDE
    from workloads.data.loading.loaders import TrainLoader
    from workloads.data.loading.pipeline import DataConfig
    from workloads.data.loading.sample_plan import SamplePlan
    from workloads.data.store.manifest import open_dataset

    dataset = open_dataset(uri or f"{folder}/dataset")
    started = time.perf_counter()
    plan = SamplePlan(dataset.row_groups.rows, dataset_sha256=dataset.manifest.sha256, seed=0, global_batch_size=BATCH)
    loader = TrainLoader(dataset, plan, DataConfig(uri=dataset.uri, decode_size=SIDE))
    next(loader.iterate(int(step)))
    return {"seconds": round(time.perf_counter() - started, 3)}


def memory(folder: str) -> dict[str, Any]:
    """Resident memory, MiB, at the end of each of ten epochs, and the most and least within the last."""
    import itertools

    from tests.benchmarks.loader_peers import BATCH, ours

    images = json.loads((Path(folder) / "dataset" / "manifest.json").read_text())["num_images"]
    steps = images // BATCH
    batches, after, within = ours(Path(folder)), [], []
    for epoch in range(10):
        for _ in itertools.islice(batches, steps):
            if epoch == 9:
                within.append(_resident_mib())
        after.append(_resident_mib())
    return {"after_epoch_mib": after, "last_epoch_least_mib": min(within), "last_epoch_most_mib": max(within)}


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def plan(images: str) -> dict[str, float]:
    """Start-up and seeks of the plan, from the row-group index on disk; 125 images a row group."""
    import hashlib

    import numpy as np

    groups = max(1, int(images) // 125)
    with tempfile.TemporaryDirectory() as folder:
        _write_index(Path(folder), groups)
        before = _resident_mib()
        started, busy = time.perf_counter(), time.process_time()
        from tests.benchmarks.process_memory import peak_mib
        from workloads.data.loading.sample_plan import SamplePlan
        from workloads.data.store.manifest import RowGroups

        data = (Path(folder) / "row_groups.parquet").read_bytes()
        hashlib.sha256(data).hexdigest()
        index = RowGroups.from_parquet(data, num_shards=-(-groups // 1024))
        del data
        made = SamplePlan(index.rows, dataset_sha256="0" * 64, seed=0, global_batch_size=64)
        made.share(0, 0, 0, 1)
        start_s, start_cpu_s = time.perf_counter() - started, time.process_time() - busy
    seeks = []
    for epoch, place in enumerate(np.random.default_rng(0).integers(0, made.steps_per_epoch, 50).tolist()):
        started = time.perf_counter()
        made.share(epoch * 7, place, 0, 1)
        made.open_groups(epoch * 7, place, 0, 1)
        seeks.append(1000 * (time.perf_counter() - started))
    return {
        "row_groups": groups,
        "start_s": round(start_s, 3),
        "start_cpu_s": round(start_cpu_s, 3),
        "seek_median_ms": round(statistics.median(seeks), 2),
        "seek_worst_ms": round(max(seeks), 2),
        "peak_mib": round(peak_mib(), 1),
        "of_it_before_mib": before,
    }


def _write_index(folder: Path, groups: int) -> None:
    """In a process of its own, so that its memory is not counted."""
    script = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[3])\n"
        "import pyarrow.parquet as pq\n"
        "from workloads.data.store.manifest import RowGroups\n"
        "n = int(sys.argv[2]); rows = np.random.default_rng(0).integers(100, 151, n, dtype=np.int32)\n"
        "length = rows.astype(np.int64) * 8000 + 37; shard = (np.arange(n) // 1024).astype(np.int32)\n"
        "offset = np.cumsum(length) - length; offset -= offset[(np.arange(n) // 1024) * 1024] - 4\n"
        "index = RowGroups(shard=shard, offset=offset, length=length, rows=rows, first=np.zeros(1, np.int64))\n"
        "pq.write_table(index.to_table(), sys.argv[1] + '/row_groups.parquet', compression='zstd')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder), str(groups), str(ROOT)], check=True)


def formats(folder: str) -> dict[str, str]:
    """Write the peers' formats."""
    from tests.benchmarks.loader_peers import write_peer_formats

    write_peer_formats(Path(folder))
    return {}


def pixel_error(folder: str) -> dict[str, float]:
    """What DCT-scaled decoding changes."""
    from tests.benchmarks.loader_peers import dct_error

    return {"error": round(dct_error(Path(folder)), 3)}


WORKERS = {
    "dct_error": pixel_error,
    "rate": rate,
    "first_batch": first_batch,
    "memory": memory,
    "plan": plan,
    "formats": formats,
}

if __name__ == "__main__":
    main()
