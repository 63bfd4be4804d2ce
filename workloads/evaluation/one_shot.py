"""One-shot detection and a retrieval gallery of a pretraining run's checkpoint, beside what learns nothing."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from workloads.config import config, config_hash, to_dict
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.data.store.objects import Objects, read_objects
from workloads.errors import ConfigError, DataError
from workloads.metrics.grid_accuracy import GridModel
from workloads.metrics.one_shot import OneShotConfig, Query, TrunkMatcher, measure, summarize
from workloads.metrics.retrieval import Region, gallery_queries, most_similar
from workloads.models.backbone import Trunk
from workloads.models.trunks import SupervisedTrunkConfig, load_resnet
from workloads.parallel.runtime import Runtime, new_folder
from workloads.reports.gallery import draw_gallery
from workloads.spec.factory import build_objective
from workloads.spec.loading import load_model
from workloads.spec.pretrain import PretrainConfig
from workloads.storage.checkpoint import read_meta
from workloads.types import ImageBatch


@config
class OneShotRunConfig:
    """What is measured of a checkpoint, and beside it."""

    uri: str
    """Dataset with objects, a folder or s3:// address with a manifest.json."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images per batch; changes speed and memory, not figures."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only this many images, the first in the dataset's order."""
    supervised: SupervisedTrunkConfig | None = None
    """A supervised trunk that is measured beside; null: none."""
    gallery: Annotated[int, Field(ge=0)] = 6
    """Queries of the gallery, each of another category; 0 for no gallery."""
    top: Annotated[int, Field(ge=1)] = 6
    """Regions shown for each query of the gallery."""
    protocol: OneShotConfig = OneShotConfig()


def one_shot(checkpoint: Path, settings: OneShotRunConfig, runtime: Runtime) -> dict[str, float]:
    """Measure a checkpoint's one-shot detection and report it at the checkpoint's step, with a table and a gallery.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        ConfigError: its networks cannot be compared so, or a supervised trunk is asked for that is not there.
        DataError: no dataset there, or one in which nothing can be looked for.
    """
    objective, run = load_model(checkpoint, device=runtime.device)
    return one_shot_of(objective, run, settings, runtime, step=read_meta(str(checkpoint)).step)


def one_shot_of(
    objective: Any, run: PretrainConfig, settings: OneShotRunConfig, runtime: Runtime, *, step: int
) -> dict[str, float]:
    """As `one_shot`, of networks in memory."""
    protocol, dataset = settings.protocol, open_dataset(settings.uri)
    objects = dict(list(read_objects(dataset).items())[: settings.limit])
    models = {"model": grid_model(objective, protocol)}
    if settings.supervised is not None:
        trunk = load_resnet(settings.supervised).to(runtime.device).eval()
        models["supervised"] = TrunkMatcher(trunk, protocol.stage)
    models |= _untrained(run, protocol, runtime.device)
    batches = _passes(dataset, settings, runtime)
    table = measure(models, batches, objects, protocol)
    if not len(table.target):
        raise DataError(
            f"{settings.uri}: no two of its images hold an object of one category; give a dataset with boxes"
        )
    figures = summarize(table, protocol)
    if "supervised" in table.ap50:
        other = summarize(table, protocol, model="supervised")
        figures |= {
            key.replace("one_shot/", "one_shot/supervised_"): value
            for key, value in other.items()
            if key.removesuffix("_low").removesuffix("_high").endswith(("/ap50", "/pointing"))
        }
    folder = new_folder()
    _write_table(folder, table, objects, figures, settings, dataset, step)
    if settings.gallery:
        queries = gallery_queries(objects, protocol, settings.gallery)
        found = most_similar(models["model"], batches, objects, queries, protocol, top=settings.top)
        shown = [region.is_same for regions in found for region in regions]
        figures["eval/one_shot/retrieval_precision"] = float(np.mean(shown))
        _write_gallery(folder, list(zip(queries, found, strict=True)), objects, batches(), figures, step)
    runtime.report(figures, step=step, artifacts=folder)
    return figures


def grid_model(objective: Any, protocol: OneShotConfig) -> Any:
    """What of an objective embeds cells and crops: its own pyramid and projector, or its trunk.

    Raises:
        ConfigError: its trunk is no ResNet.
    """
    if hasattr(objective, "embed_grid"):
        return objective
    if not isinstance(objective.trunk, Trunk):
        raise ConfigError("one-shot detection needs a pyramid or the stages of a ResNet, which a ViT lacks")
    return TrunkMatcher(objective.trunk, protocol.stage)


def _untrained(run: PretrainConfig, protocol: OneShotConfig, device: torch.device) -> dict[str, GridModel]:
    networks: dict[str, GridModel] = {}
    state = torch.get_rng_state()
    for i in range(protocol.untrained_networks):
        torch.manual_seed(protocol.seed + i)
        fresh: Any = build_objective(run, seed=0).eval().to(device)
        networks[f"untrained_{i}"] = grid_model(fresh, protocol)
    torch.set_rng_state(state)
    return networks


def _passes(dataset: Dataset, settings: OneShotRunConfig, runtime: Runtime) -> Callable[[], Iterable[ImageBatch]]:
    def one_pass() -> Iterator[ImageBatch]:
        # Queries come from the source resolution, whatever the training reads.
        reading = DataConfig(uri=dataset.uri, decode_size=None)
        for batch in EvalLoader(dataset, reading, batch_size=settings.batch_size, limit=settings.limit):
            yield batch.to(runtime.device)

    return one_pass


def _write_table(
    folder: Path,
    table: Any,
    objects: Mapping[str, Objects],
    figures: Mapping[str, float],
    settings: OneShotRunConfig,
    dataset: Dataset,
    step: int,
) -> None:
    (folder / "report").mkdir(parents=True)
    record = {
        "step": step,
        "figures": dict(figures),
        "protocol": to_dict(settings.protocol),
        "protocol_sha256": config_hash(settings.protocol),
        "dataset_manifest_sha256": dataset.manifest.sha256,
    }
    (folder / "report" / f"one_shot_step_{step:07d}.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    columns: dict[str, np.ndarray] = {"target": table.target}
    columns |= {f"ap50/{name}": values for name, values in table.ap50.items()}
    columns |= {f"pointing/{name}": values for name, values in table.pointing.items()}
    np.savez_compressed(folder / "report" / f"one_shot_step_{step:07d}.npz", **columns)  # type: ignore[arg-type]


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
                found = [rank, names[region.image], boxes[1], f"{region.similarity:.4f}", int(region.is_same)]
                writer.writerow([query.category, names[query.image], boxes[0], *found])
