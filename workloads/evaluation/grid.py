"""Evaluation by the frozen protocols, exact over any number of ranks: grid accuracy, and what frozen features know."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from workloads.config import config_hash, to_dict
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.manifest import Dataset, open_dataset
from workloads.errors import ConfigError
from workloads.evaluation.representation import RepresentationEvaluation
from workloads.metrics import grid_accuracy
from workloads.metrics.grid_accuracy import SUITES, GridModel
from workloads.objectives.anchor_ntxent import AnchorNTXentConfig
from workloads.parallel.distributed import gather_rows
from workloads.parallel.runtime import Runtime, new_folder
from workloads.reports.heatmaps import draw_heatmaps
from workloads.spec.factory import build_objective
from workloads.spec.loading import load_model
from workloads.spec.pretrain import EvaluationConfig, PretrainConfig
from workloads.storage.checkpoint import read_meta
from workloads.types import ImageBatch

_INITIAL_NETWORKS = 2  # untrained networks in `riga_initial`, which is kept for comparison with older figures only


class GridEvaluation:
    """SGA, RIGA and GAP-R of a model on one dataset, reported through the runtime by every rank alike."""

    def __init__(self, run: PretrainConfig, evaluation: EvaluationConfig, dataset: Dataset, runtime: Runtime) -> None:
        self.run_settings, self.settings, self.dataset, self.runtime = run, evaluation, dataset, runtime

    def run(self, model: torch.nn.Module, *, step: int, final: bool) -> dict[str, float]:
        """Measure `model` and report its figures at `step`, with tables and heatmaps as artifacts.

        Args:
            final: whether RIGA, and so GAP-R, are measured too; they cost as much again for each untrained network.
        """
        protocol = self.settings.protocol
        model.eval()
        untrained = self._untrained() if final else []
        initial = self._untrained(calibrated=False)[:_INITIAL_NETWORKS] if final else []
        mine = grid_accuracy.measure(model, untrained, lambda: self._batches(), protocol, initial=initial)  # type: ignore[arg-type]
        tables = grid_accuracy.merge([_gathered(mine)])
        figures = grid_accuracy.summarize(tables, protocol)
        folder = None
        if self.runtime.rank == 0:
            folder = new_folder()
            self._write_artifacts(folder, model, tables, figures, step)  # type: ignore[arg-type]
        self.runtime.report(grid_accuracy.headline_figures(figures), step=step, artifacts=folder)
        return figures

    def _untrained(self, *, calibrated: bool = True) -> list[GridModel]:
        """Networks of the run's architecture and other seeds, in eval mode.

        Args:
            calibrated: BatchNorm has the statistics of the first evaluation images; else its initial ones (mean 0, variance 1).
        """
        networks: list[GridModel] = []
        state = torch.get_rng_state()
        for i in range(self.settings.protocol.untrained_networks):
            torch.manual_seed(self.settings.protocol.seed + i)
            network: Any = build_objective(self.run_settings, seed=0).eval().to(self.runtime.device)
            if calibrated:
                grid_accuracy.calibrate(network, self._calibration_batches(), self.settings.protocol)
            networks.append(network)
        torch.set_rng_state(state)
        return networks

    def _batches(self) -> Iterator[ImageBatch]:
        """This rank's share of the evaluation images."""
        return self._read(
            batch_size=self.settings.batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            limit=self.settings.limit,
        )

    def _calibration_batches(self) -> Iterator[ImageBatch]:
        """The first images of the dataset, the same on every rank."""
        images = self.settings.protocol.statistics_images
        return self._read(batch_size=grid_accuracy.CALIBRATION_BATCH, limit=min(images, self.settings.limit or images))

    def _read(self, **share: Any) -> Iterator[ImageBatch]:
        # Queries come from the source resolution, whatever the training reads.
        reading = DataConfig(uri=self.settings.uri or self.dataset.uri, decode_size=None)
        for batch in EvalLoader(self.dataset, reading, **share):
            yield batch.to(self.runtime.device)

    def _write_artifacts(
        self,
        folder: Path,
        model: GridModel,
        tables: dict[str, dict[str, np.ndarray]],
        figures: dict[str, float],
        step: int,
    ) -> None:
        report = folder / "report"
        report.mkdir(parents=True)
        protocol = self.settings.protocol
        record = {
            "step": step,
            "figures": figures,
            "protocol": to_dict(protocol),
            "protocol_sha256": config_hash(protocol),
            "dataset_manifest_sha256": self.dataset.manifest.sha256,
        }
        (report / f"grid_accuracy_step_{step:07d}.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        arrays = {f"{suite}/{name}": column for suite, table in tables.items() for name, column in table.items()}
        np.savez_compressed(report / f"grid_accuracy_step_{step:07d}.npz", **arrays)  # type: ignore[arg-type]
        if self.settings.heatmaps == 0:
            return
        batch = self._first_images(self.settings.heatmaps)
        (folder / "heatmaps").mkdir()
        for suite in SUITES:
            with torch.no_grad():
                views = grid_accuracy.frozen_views(batch, protocol, suite)
                maps = grid_accuracy.similarity_maps(model, views, protocol)
            target = folder / "heatmaps" / f"{suite}_step_{step:07d}.png"
            draw_heatmaps(views, maps, target, title=_title(figures, suite, step))

    def _first_images(self, count: int) -> ImageBatch:
        batches = self._read(batch_size=min(count, self.dataset.num_images), limit=count)
        batch = next(batches)
        batches.close()  # type: ignore[attr-defined]
        return batch


def _title(figures: dict[str, float], suite: str, step: int) -> str:
    prefix = "eval/" if suite == "plain" else f"eval/{suite}/"
    named = (("SGA", "sga"), ("strict", "sga_strict"), ("pixel", "pixel"), ("chance", "chance"))
    return f"{suite}, step {step}:  " + "   ".join(f"{name} {100 * figures[prefix + key]:.1f} %" for name, key in named)


def _gathered(tables: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """The tables of all ranks, joined; every rank gets the same."""
    return {
        suite: {name: gather_rows(torch.from_numpy(column)).numpy() for name, column in table.items()}
        for suite, table in tables.items()
    }


Evaluation: TypeAlias = GridEvaluation | RepresentationEvaluation


def evaluations_of(run: PretrainConfig, runtime: Runtime) -> list[Evaluation]:
    """What `run` asks to be measured.

    Raises:
        ConfigError: nothing can be told apart there.
        DataError: no dataset there.
    """
    wanted, found = run.evaluation, list[Evaluation]()
    if wanted.uri is not None:
        found.append(GridEvaluation(run, wanted, open_dataset(wanted.uri), runtime))
    if wanted.representation is not None:
        found.append(RepresentationEvaluation(wanted, wanted.representation, runtime))
    return found


def evaluate(
    checkpoint: Path,
    *,
    config: EvaluationConfig,
    runtime: Runtime,
) -> dict[str, float]:
    """Measure a checkpoint by all that `config` asks for, RIGA, GAP-R and the linear probe included, and report it at its step.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        ConfigError: its objective has no pyramid to measure, or nothing is asked for.
        DataError: no dataset there.
    """
    model, trained = load_model(checkpoint, device=runtime.device)
    run = replace(trained, evaluation=config)
    check_measurable(run)
    evaluations = evaluations_of(run, runtime)
    if not evaluations:
        raise ConfigError("evaluation.uri: name a dataset to evaluate on, or evaluation.representation.train_uri")
    step = read_meta(str(checkpoint)).step
    figures: dict[str, float] = {}
    for evaluation in evaluations:
        figures |= evaluation.run(model, step=step, final=True)
    return figures


def check_measurable(run: PretrainConfig) -> None:
    """See that grid accuracy is asked only of what has a pyramid, and of levels that it trains.

    Raises:
        ConfigError: names the key and what to do.
    """
    if run.evaluation.uri is None:
        return
    if not isinstance(run.objective, AnchorNTXentConfig):
        raise ConfigError(
            f"evaluation.uri: {run.objective.kind} trains no pyramid, so there is no SGA; leave it out, and train a pyramid "
            "on the frozen trunk afterwards (experiment grid_probe)"
        )
    missing = set(run.evaluation.protocol.levels) - set(run.objective.levels)
    if missing:
        raise ConfigError(
            f"evaluation.protocol.levels: {', '.join(sorted(missing))} is not trained; add it to objective.levels"
        )
