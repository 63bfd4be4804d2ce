"""Measures one-shot detection of a pretraining run's checkpoint beside its baselines (`one_shot`), and draws a retrieval gallery."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from workloads.config import config, config_hash, to_dict
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.data.store.objects import Objects, read_objects
from workloads.errors import ConfigError, DataError
from workloads.evaluation.artifacts import artifact_folder, write_report
from workloads.metrics.grid_accuracy import GridModel
from workloads.metrics.one_shot import OneShotConfig, OneShotTable, Query, TrunkMatcher, measure, summarize
from workloads.metrics.retrieval import Region, gallery_queries, most_similar
from workloads.models.backbone import Trunk
from workloads.models.trunks import SupervisedTrunkConfig, load_resnet
from workloads.parallel.runtime import Runtime
from workloads.reports.gallery import draw_gallery
from workloads.spec.factory import AnyObjective, build_objective
from workloads.spec.loading import load_model
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import read_meta
from workloads.types import ImageBatch


@config
class OneShotRunConfig:
    """A measurement of one-shot detection: the dataset, the models beside the checkpoint's, and the gallery."""

    uri: str
    """Dataset with objects, a folder or s3:// address with a manifest.json."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images per batch; changes speed and memory, not figures."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only this many images, the first in the dataset's order; null: all."""
    supervised: SupervisedTrunkConfig | None = None
    """A supervised trunk that is measured on the same queries; null: none."""
    gallery: Annotated[int, Field(ge=0)] = 6
    """Queries in the gallery, each of another category; 0: no gallery."""
    top: Annotated[int, Field(ge=1)] = 6
    """Regions shown for each query of the gallery."""
    protocol: OneShotConfig = OneShotConfig()


def one_shot(checkpoint: Path, settings: OneShotRunConfig, runtime: Runtime) -> dict[str, float]:
    """Measure a checkpoint's one-shot detection and report it at the checkpoint's step, with a table and a gallery.

    Rank 0 does all of it and gets the figures; other ranks get none.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: the model's trunk is no ResNet, or the supervised weights cannot be read.
        DataError: there is no dataset, or no two of its images hold an object of one category.
    """
    step = read_meta(str(checkpoint)).step
    if runtime.rank != 0:
        runtime.report({}, step=step)
        return {}
    objective, run = load_model(checkpoint, device=runtime.device)
    with artifact_folder() as folder:
        figures = _measured(objective, run, settings, runtime.device, folder, step)
    runtime.report(figures, step=step, artifacts=folder)
    return figures


def _measured(
    objective: AnyObjective,
    run: PretrainConfig,
    settings: OneShotRunConfig,
    device: torch.device,
    folder: Path,
    step: int,
) -> dict[str, float]:
    """The figures; table and gallery are written to `folder`."""
    protocol, dataset = settings.protocol, open_dataset(settings.uri)
    objects = dict(list(read_objects(dataset).items())[: settings.limit])
    models = {"model": grid_model(objective, protocol)}
    if settings.supervised is not None:
        models["supervised"] = TrunkMatcher(load_resnet(settings.supervised).to(device).eval(), protocol.stage)
    models |= _untrained(run, protocol, device)
    batches = _passes(dataset, settings, device)
    table = measure(models, batches, objects, protocol)
    if not len(table.target):
        raise DataError(
            f"{settings.uri}: no two of its images hold an object of one category; give a dataset with boxes"
        )
    figures = summarize(table, protocol)
    rows: list[tuple[Query, list[Region]]] = []
    if settings.gallery:
        queries = gallery_queries(objects, protocol, settings.gallery)
        regions = most_similar(models["model"], batches, objects, queries, protocol, top=settings.top)
        rows = list(zip(queries, regions, strict=True))
        shown = [region.is_same for _, row in rows for region in row]
        figures["eval/one_shot/retrieval_precision"] = float(np.mean(shown))
    _write_table(folder, table, figures, settings, dataset, step)
    if rows:
        _write_gallery(folder, rows, objects, batches(), figures, step)
    return figures


def grid_model(objective: AnyObjective, protocol: OneShotConfig) -> GridModel:
    """The part of an objective that embeds cells and crops: its pyramid and projector, or else its trunk.

    Raises:
        ConfigError: the trunk is no ResNet.
    """
    if isinstance(objective, GridModel):
        return objective
    if not isinstance(objective.trunk, Trunk):
        raise ConfigError("one-shot detection needs a pyramid or the stages of a ResNet, which a ViT lacks")
    return TrunkMatcher(objective.trunk, protocol.stage)


def _untrained(run: PretrainConfig, protocol: OneShotConfig, device: torch.device) -> dict[str, GridModel]:
    networks: dict[str, GridModel] = {}
    state = torch.get_rng_state()
    for i in range(protocol.untrained_networks):
        torch.manual_seed(protocol.seed + i)
        networks[f"untrained_{i}"] = grid_model(build_objective(run, seed=0).eval().to(device), protocol)
    torch.set_rng_state(state)
    return networks


def _passes(dataset: Dataset, settings: OneShotRunConfig, device: torch.device) -> Callable[[], Iterable[ImageBatch]]:
    def one_pass() -> Iterator[ImageBatch]:
        # Queries come from the source resolution, whatever the training reads.
        reading = DataConfig(uri=dataset.uri, decode_size=None)
        for batch in EvalLoader(dataset, reading, batch_size=settings.batch_size, limit=settings.limit):
            yield batch.to(device)

    return one_pass


def _write_table(
    folder: Path,
    table: OneShotTable,
    figures: Mapping[str, float],
    settings: OneShotRunConfig,
    dataset: Dataset,
    step: int,
) -> None:
    record = {
        "figures": dict(figures),
        "protocol": to_dict(settings.protocol),
        "protocol_sha256": config_hash(settings.protocol),
        "dataset_manifest_sha256": dataset.manifest.sha256,
    }
    columns: dict[str, np.ndarray] = {"target": table.target}
    columns |= {f"ap50/{name}": values for name, values in table.ap50.items()}
    columns |= {f"pointing/{name}": values for name, values in table.pointing.items()}
    write_report(folder, "one_shot", step, record, columns)


def _write_gallery(
    folder: Path,
    rows: list[tuple[Query, list[Region]]],
    objects: Mapping[str, Objects],
    batches: Iterable[ImageBatch],
    figures: Mapping[str, float],
    step: int,
) -> None:
    names = list(objects)
    needed = {query.image for query, _ in rows} | {region.image for _, regions in rows for region in regions}
    images: dict[int, np.ndarray] = {}
    for batch in batches:
        for row, place in enumerate(batch.positions.tolist()):
            if place in needed:
                height, width = batch.content_hw[row].tolist()
                images[place] = batch.images[row, :, :height, :width].permute(1, 2, 0).cpu().numpy()
    title = f"most similar regions, step {step}:  {100 * figures['eval/one_shot/retrieval_precision']:.0f} % of the query's category"
    draw_gallery(rows, images, folder / "gallery" / f"step_{step:07d}.png", title=title)
    with (folder / "gallery" / f"step_{step:07d}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "category",
                "query_image_id",
                "query_box_xyxy",
                "rank",
                "image_id",
                "box_xyxy",
                "similarity",
                "same_category",
            ]
        )
        for query, regions in rows:
            for rank, region in enumerate(regions, start=1):
                boxes = [" ".join(f"{side:.1f}" for side in box) for box in (query.box_xyxy, region.box_xyxy)]
                match = [rank, names[region.image], boxes[1], f"{region.similarity:.4f}", int(region.is_same)]
                writer.writerow([query.category, names[query.image], boxes[0], *match])
