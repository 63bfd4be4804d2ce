"""Joins the parts of a discovery (`finish`): one table, files of boxes, figures where objects are known, and pictures."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from workloads.config import to_yaml
from workloads.data.store.annotations import Annotations, read_annotations
from workloads.data.store.manifest import open_dataset
from workloads.data.store.objects import AGNOSTIC, Objects
from workloads.discovery.clustering import cluster, cluster_names
from workloads.discovery.pseudo_boxes import BoxTable, read_boxes, write_coco_results, write_parquet
from workloads.errors import RunFailedError
from workloads.loops.discovery.job import RECORD, DiscoverConfig, Job, Method
from workloads.loops.discovery.pictures import draw_pictures
from workloads.metrics.average_precision import DetectionTable, Truth, average_precision
from workloads.metrics.corloc import CorLocConfig, Hits, corloc_figures, corloc_gain, corloc_hits
from workloads.metrics.figures import under, with_interval
from workloads.metrics.matched_precision import fit_match, matched_precision
from workloads.storage.filesystems import atomic_write, read_bytes, resolve_uri

_AP_RESAMPLES = 500  # of AP50's interval; CorLoc's are cheaper, so there are more (`corloc.bootstrap`)

_log = logging.getLogger(__name__)


class DiscoveryError(RunFailedError):
    """A discovery cannot be completed; the message says which part is missing or damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoveryResult:
    """Boxes and figures of a finished discovery."""

    boxes: Mapping[Method, BoxTable]
    figures: Mapping[str, float]  # by tracking key
    undecodable: tuple[str, ...]  # ids of images that did not decode


def finish(job: Job, pictures: Path, *, timings: Mapping[str, float] | None = None) -> DiscoveryResult:
    """Join the parts and write to the job's output: `METHOD/boxes.parquet`, `METHOD/boxes.json`, `figures.json`, `discovery.yaml`.

    Args:
        pictures: local folder to which `gallery/*.png` is written.
        timings: figures about the work on the parts, recorded with the others.

    Raises:
        DiscoveryError: an image is missing or there twice.
    """
    dataset, settings = open_dataset(job.settings.uri), job.settings
    table = read_parts(job)
    boxes = {method: _boxes_of(table, method) for method in settings.methods}
    first = settings.methods[0]
    if settings.clusters.count is not None:
        boxes[first] = boxes[first].with_categories(_clusters_of(table, first, settings))
    undecodable = tuple(sorted(set(table.filter(pc.invert(table["decoded"]))["image_id"].to_pylist())))
    for name in undecodable:
        _log.warning("%s does not decode and has no box", name)
    searched = set(table["image_id"].to_pylist())
    truth = {name: item for name, item in read_annotations(dataset).items() if name in searched}
    hits, figures = measure(boxes, truth, settings)
    classes = _by_class(boxes[first], truth, settings)
    if "mean" in classes.get("ap50", {}):
        figures["eval/matched_ap50"] = classes["ap50"]["mean"]
    figures |= timings or {}
    figures |= {"discover/images": float(job.num_images), "discover/undecodable": float(len(undecodable))}
    if settings.gallery:
        draw_pictures(settings, dataset, boxes, truth, hits, pictures / "gallery")
    record = {
        "identity": job.identity,
        "figures": figures,
        "dataset_manifest_sha256": dataset.manifest.sha256,
        "undecodable": undecodable,
        **({"classes": classes} if classes else {}),
    }
    _write(job, boxes, record)
    return DiscoveryResult(boxes=boxes, figures=figures, undecodable=undecodable)


def _write(job: Job, boxes: Mapping[Method, BoxTable], record: Mapping[str, Any]) -> None:
    """Write the output's files, the record last, and remove the parts."""
    root = job.output.rstrip("/")
    for method, table in boxes.items():
        write_parquet(table, f"{root}/{method}/boxes.parquet")
        write_coco_results(table, f"{root}/{method}/boxes.json")
    _put_text(to_yaml(job.settings), f"{root}/discovery.yaml")
    _put_text(json.dumps(record, indent=1) + "\n", f"{root}/{RECORD}")
    filesystem, parts = job.state
    filesystem.delete_dir(parts)


def _put_text(text: str, uri: str) -> None:
    with atomic_write(*resolve_uri(uri)) as file:
        file.write(text.encode())


def read_parts(job: Job) -> pa.Table:
    """Rows of all parts in the dataset's order, with every image exactly once for each method.

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
    boxes: Mapping[Method, BoxTable], truth: Mapping[str, Annotations], settings: DiscoverConfig
) -> tuple[dict[Method, Hits], dict[str, float]]:
    """Hits of each method, and figures by tracking key; no figure where no image has an object.

    `eval/METHOD/corloc` with its interval, `eval/METHOD/ap50` …, `eval/METHOD/gain_over_centre` paired; the first method's also
    as `eval/corloc` ….
    """
    hits = {method: corloc_hits(table.best(), truth, settings.corloc) for method, table in boxes.items()}
    figures: dict[str, float] = {}
    for method, mine in hits.items():
        if not len(mine.hit):
            continue
        own = corloc_figures(mine, settings.corloc) | agnostic_precision(boxes[method], truth, settings.corloc)
        if method != "centre" and "centre" in hits:
            gain, low, high = corloc_gain(mine, hits["centre"], settings.corloc)
            own |= with_interval("gain_over_centre", gain, (low, high))
        figures |= under(f"eval/{method}", own)
        if method == settings.methods[0]:
            figures |= under("eval", own)
    return hits, {name: value for name, value in figures.items() if np.isfinite(value)}


def _by_class(boxes: BoxTable, truth: Mapping[str, Annotations], settings: DiscoverConfig) -> dict[str, dict[str, Any]]:
    """The match of clusters to classes, and AP50 of each class; empty where `match` is not configured."""
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
    names = {"ap": "ap", "ap50": "ap50", "ap50_low": "ap50_low", "ap50_high": "ap50_high", "ar": "ar100"}
    return {ours: figures[theirs] for theirs, ours in names.items()}


def _as_objects(truth: Annotations) -> Objects:
    return Objects(
        size_hw=truth.size_hw,
        boxes_xyxy=truth.boxes_xyxy,
        categories=(AGNOSTIC,) * len(truth.boxes_xyxy),
        crowd=truth.crowd,
        difficult=truth.difficult,
    )
