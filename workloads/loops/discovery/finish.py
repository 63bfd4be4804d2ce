"""The end of a discovery: the parts in one table, boxes as files, figures where objects are known, pictures."""

import collections
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from workloads.config import to_yaml
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.annotations import Annotations, read_annotations
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.data.store.objects import AGNOSTIC, Objects
from workloads.discovery.clustering import cluster, cluster_names
from workloads.discovery.pseudo_boxes import BoxTable, read_boxes, write_coco_results, write_parquet
from workloads.errors import RunFailedError
from workloads.loops.discovery.job import RECORD, DiscoverConfig, Job, Method, finished_record, prepare
from workloads.loops.discovery.worker import PartWorker
from workloads.metrics.average_precision import DetectionTable, Truth, average_precision
from workloads.metrics.corloc import CorLocConfig, Hits, corloc_figures, corloc_gain, corloc_hits
from workloads.metrics.matched_precision import fit_match, matched_precision
from workloads.parallel.distributed import wait_for_all
from workloads.parallel.runtime import Runtime, new_folder
from workloads.reports.discoveries import Panel, draw_clusters, draw_discoveries
from workloads.storage.filesystems import atomic_write, read_bytes, resolve_uri

_AP_RESAMPLES = 500  # of AP50's interval; CorLoc's are cheaper and more
_PICTURE_SIDE = 320  # pixels
_CLUSTERS_SHOWN, _CROPS_SHOWN = 24, 10
_FULL: list[np.ndarray] = [np.zeros((1, 1, 3), dtype=np.uint8)] * _CROPS_SHOWN  # of a category that is not shown

_log = logging.getLogger(__name__)


class DiscoveryError(RunFailedError):
    """A discovery cannot be completed; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryResult:
    """What a discovery found."""

    boxes: Mapping[Method, BoxTable]
    figures: Mapping[str, float]  # under their tracking keys
    undecodable: tuple[str, ...]


def discover(settings: DiscoverConfig, runtime: Runtime, output: str) -> dict[str, float]:
    """Find boxes in a dataset on this process, or on all of torchrun's, and report the figures; returns them.

    Begun again after a kill it goes on with the parts that are missing; finished, it only says its figures again.

    Raises:
        DataError: no dataset, or a shard that cannot be read. ConfigError: weights that cannot be had, or another
            discovery at `output`.
    """
    job = prepare(settings, output)
    earlier = finished_record(output)
    if earlier is not None:
        return dict(earlier["figures"])
    missing = job.missing()
    began, done = time.perf_counter(), 0
    if missing:
        worker = PartWorker(job, device=runtime.device)
        for part in missing[runtime.rank :: runtime.world_size]:
            done += worker.run(part)
            speed = done / (time.perf_counter() - began)
            runtime.progress({"images/s": speed}, step=10 * (part + 1), total_steps=10 * job.num_parts)
    wait_for_all()
    figures: dict[str, float] = {}
    if runtime.rank == 0:
        folder = new_folder()
        figures = dict(finish(job, folder).figures)
        runtime.report(figures, step=0, artifacts=folder)
    return figures


def finish(job: Job, pictures: Path, *, timings: Mapping[str, float] | None = None) -> DiscoveryResult:
    """Join the parts and write to the job's output: `METHOD/boxes.parquet`, `METHOD/boxes.json`, `figures.json`, `discovery.yaml`.

    Args:
        pictures: local folder that gets `gallery/*.png`.
        timings: more figures, of how the parts were done.

    Raises:
        DiscoveryError: an image is missing or there twice.
    """
    dataset = open_dataset(job.settings.uri)
    table = read_parts(job)
    found = {method: _boxes_of(table, method) for method in job.settings.methods}
    if job.settings.clusters.count is not None:
        first = job.settings.methods[0]
        found[first] = found[first].with_categories(_clusters_of(table, first, job.settings))
    undecodable = tuple(sorted(set(table.filter(pc.invert(table["decoded"]))["image_id"].to_pylist())))
    for name in undecodable:
        _log.warning("%s does not decode and has no box", name)
    looked_at = set(table["image_id"].to_pylist())
    truth = {name: item for name, item in read_annotations(dataset).items() if name in looked_at}
    hits, figures = measure(found, truth, job.settings)
    classes = _by_class(found[job.settings.methods[0]], truth, job.settings)
    if "mean" in classes.get("ap50", {}):
        figures["eval/matched_ap50"] = classes["ap50"]["mean"]
    figures |= timings or {}
    figures |= {"discover/images": float(job.num_images), "discover/undecodable": float(len(undecodable))}
    root = job.output.rstrip("/")
    for method, boxes in found.items():
        write_parquet(boxes, f"{root}/{method}/boxes.parquet")
        write_coco_results(boxes, f"{root}/{method}/boxes.json")
    if job.settings.gallery:
        _draw(job.settings, dataset, found, truth, hits, pictures / "gallery")
    _put_text(to_yaml(job.settings), f"{root}/discovery.yaml")
    record = {
        "identity": job.identity,
        "figures": figures,
        "dataset_manifest_sha256": dataset.manifest.sha256,
        "undecodable": undecodable,
        **({"classes": classes} if classes else {}),
    }
    _put_text(json.dumps(record, indent=1) + "\n", f"{root}/{RECORD}")
    filesystem, parts = job.state
    filesystem.delete_dir(parts)
    return DiscoveryResult(boxes=found, figures=figures, undecodable=undecodable)


def _put_text(text: str, uri: str) -> None:
    with atomic_write(*resolve_uri(uri)) as file:
        file.write(text.encode())


def read_parts(job: Job) -> pa.Table:
    """All parts' rows in the dataset's order, every image exactly once a method.

    Raises:
        DiscoveryError: parts are missing, damaged, or not of this dataset.
    """
    if missing := job.missing():
        raise DiscoveryError(
            f"{len(missing)} of {job.num_parts} parts are missing, the first is {missing[0]}; run again"
        )
    filesystem = job.state[0]
    tables = []
    for part in range(job.num_parts):
        path = job.part_path(part)
        try:
            tables.append(pq.read_table(pa.BufferReader(read_bytes(filesystem, path))))
        except (OSError, pa.ArrowException) as error:
            raise DiscoveryError(f"{path}: is damaged ({error}); remove it and run again") from None
    table = pa.concat_tables(tables).sort_by("position")
    for method in job.settings.methods:
        places = _rows_of(table, method)["position"].to_numpy()
        # A detector has several rows an image, all of them from one part's file.
        if not np.array_equal(np.unique(places) if method == "detector" else places, np.arange(job.num_images)):
            raise DiscoveryError(
                f"{method}: {len(places)} rows of {len(np.unique(places))} images, expected each of {job.num_images} once"
            )
    return table


def _rows_of(table: pa.Table, method: Method) -> pa.Table:
    return table.filter(pc.equal(table["method"], method))


def _boxes_of(table: pa.Table, method: Method) -> BoxTable:
    rows = _rows_of(table, method)
    rows = rows.filter(pc.is_valid(rows["x0"]))
    return BoxTable(
        image_ids=tuple(rows["image_id"].to_pylist()),
        boxes_xyxy=np.stack([rows[side].to_numpy().astype(np.float64) for side in ("x0", "y0", "x1", "y1")], axis=1),
        scores=rows["score"].to_numpy().astype(np.float64),
        categories=tuple(rows["category"].to_pylist()),
    )


def _clusters_of(table: pa.Table, method: Method, settings: DiscoverConfig) -> list[str]:
    rows = _rows_of(table, method)
    rows = rows.filter(pc.is_valid(rows["x0"]))
    features = np.array(rows["feature"].to_pylist(), dtype=np.float64)
    return cluster_names(cluster(features.reshape(len(rows), -1), settings.clusters))


def measure(
    found: Mapping[Method, BoxTable], truth: Mapping[str, Annotations], settings: DiscoverConfig
) -> tuple[dict[Method, Hits], dict[str, float]]:
    """Hits, and figures under their tracking keys; none where no image has an object.

    `eval/METHOD/corloc` with its interval, `eval/METHOD/ap50` …, `eval/METHOD/gain_over_centre` paired; the first method's also
    as `eval/corloc` ….
    """
    hits = {method: corloc_hits(boxes.best(), truth, settings.corloc) for method, boxes in found.items()}
    figures: dict[str, float] = {}
    for method, mine in hits.items():
        if not len(mine.hit):
            continue
        own = corloc_figures(mine, settings.corloc) | agnostic_precision(found[method], truth, settings.corloc)
        if method != "centre" and "centre" in hits:
            names = ("gain_over_centre", "gain_over_centre_low", "gain_over_centre_high")
            own |= dict(zip(names, corloc_gain(mine, hits["centre"], settings.corloc), strict=True))
        figures |= {f"eval/{method}/{name}": value for name, value in own.items()}
        if method == settings.methods[0]:
            figures |= {f"eval/{name}": value for name, value in own.items()}
    return hits, {name: value for name, value in figures.items() if np.isfinite(value)}


def _by_class(boxes: BoxTable, truth: Mapping[str, Annotations], settings: DiscoverConfig) -> dict[str, dict[str, Any]]:
    """The match of clusters to classes, and AP50 of each class; nothing where no match is asked for."""
    if settings.match.boxes is None or settings.match.uri is None:
        return {}
    match = fit_match(
        read_boxes(settings.match.boxes), read_annotations(open_dataset(settings.match.uri)), settings.corloc
    )
    ap50 = matched_precision(boxes, truth, match)
    return {"match": match, "ap50": {name: value for name, value in ap50.items() if np.isfinite(value)}}


def agnostic_precision(boxes: BoxTable, truth: Mapping[str, Annotations], settings: CorLocConfig) -> dict[str, float]:
    """Class-agnostic `ap`, `ap50` with its interval, and `ar100` (pycocotools), every object being of one category."""
    ids = sorted(truth)
    place = {image_id: i for i, image_id in enumerate(ids)}
    rows = [row for row, image_id in enumerate(boxes.image_ids) if image_id in place]
    table = DetectionTable(
        image=np.array([place[boxes.image_ids[row]] for row in rows], dtype=np.int64),
        boxes_xyxy=boxes.boxes_xyxy[rows],
        scores=boxes.scores[rows],
        labels=np.ones(len(rows), dtype=np.int64),
    )
    objects = [_as_objects(truth[image_id]) for image_id in ids]
    figures = average_precision(
        table, Truth(objects=objects, labels={AGNOSTIC: 1}), resamples=_AP_RESAMPLES, seed=settings.seed
    )
    kept = {"ap": "ap", "ap50": "ap50", "ap50_low": "ap50_low", "ap50_high": "ap50_high", "ar": "ar100"}
    return {ours: figures[theirs] for theirs, ours in kept.items()}


def _as_objects(truth: Annotations) -> Objects:
    return Objects(
        size_hw=truth.size_hw,
        boxes_xyxy=truth.boxes_xyxy,
        categories=(AGNOSTIC,) * len(truth.boxes_xyxy),
        crowd=truth.crowd,
        difficult=truth.difficult,
    )


def _draw(
    settings: DiscoverConfig,
    dataset: Dataset,
    found: Mapping[Method, BoxTable],
    truth: Mapping[str, Annotations],
    hits: Mapping[Method, Hits],
    folder: Path,
) -> None:
    best = {method: boxes.best() for method, boxes in found.items()}
    iou = {m: dict(zip(mine.image_ids, mine.best_iou.tolist(), strict=True)) for m, mine in hits.items()}
    # Boxes that lie the same in every image would only hide the others; their IoU is still told.
    drawn = [m for m in best if m not in ("whole", "centre", "random")] or list(best)
    panels = []
    for image_id, pixels, scale in _pictures(settings, dataset, settings.gallery):
        panels.append(
            Panel(
                pixels=pixels,
                title=image_id,
                objects=settings.corloc.counted(truth[image_id]) * scale,
                boxes={m: best[m][image_id] * scale for m in drawn if image_id in best[m]},
                iou={m: values[image_id] for m, values in iou.items() if image_id in values},
            )
        )
    draw_discoveries(panels, folder / "boxes.png", threshold=settings.corloc.iou)
    if settings.clusters.count is not None:
        first = found[settings.methods[0]]
        draw_clusters(_cluster_crops(settings, dataset, first), folder / "clusters.png")


def _pictures(settings: DiscoverConfig, dataset: Dataset, limit: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Id, pixels uint8 (h, w, 3) shrunk for a picture, and scale of boxes (4,) of the first images that decode."""
    small = DataConfig(uri=settings.uri, decode_size=_PICTURE_SIDE)
    limit = min(limit, settings.limit or limit)
    for batch in EvalLoader(dataset, small, batch_size=16, limit=limit):
        for i in batch.valid.nonzero().flatten().tolist():
            height, width = batch.content_hw[i].tolist()
            scale = (batch.content_hw[i] / batch.source_hw[i]).flip(0).repeat(2).numpy()
            yield batch.image_ids[i], batch.images[i, :, :height, :width].permute(1, 2, 0).numpy(), scale


def _cluster_crops(
    settings: DiscoverConfig, dataset: Dataset, boxes: BoxTable
) -> dict[str, tuple[int, list[np.ndarray]]]:
    """Category → how many boxes it has, and pixels of its first ones, the largest categories first."""
    counts = collections.Counter(boxes.categories)
    wanted: dict[str, list[np.ndarray]] = {name: [] for name, _ in counts.most_common(_CLUSTERS_SHOWN)}
    rows = {image_id: row for row, image_id in enumerate(boxes.image_ids)}
    for image_id, pixels, scale in _pictures(settings, dataset, dataset.num_images):
        row = rows.get(image_id)
        if row is None or len(crops := wanted.get(boxes.categories[row], _FULL)) >= _CROPS_SHOWN:
            continue
        x0, y0, x1, y1 = np.rint(boxes.boxes_xyxy[row] * scale).astype(int).tolist()
        crops.append(pixels[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)])
        if all(len(crops) >= min(_CROPS_SHOWN, counts[name]) for name, crops in wanted.items()):
            break
    return {name: (counts[name], crops) for name, crops in wanted.items()}
