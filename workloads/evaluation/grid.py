"""Evaluates a model by grid accuracy on a held-out dataset (`GridEvaluation`): the same figures on any number of ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workloads.config import to_dict
from workloads.data.loading.loaders import EvalLoader
from workloads.data.loading.pipeline import DataConfig
from workloads.data.store.manifest import Dataset
from workloads.evaluation.artifacts import artifact_folder, write_report
from workloads.metrics import grid_accuracy
from workloads.metrics.grid_accuracy import SUITES, GridModel
from workloads.parallel.distributed import gather_rows
from workloads.parallel.runtime import Runtime
from workloads.reports.heatmaps import draw_heatmaps
from workloads.spec.factory import build_objective
from workloads.spec.pretrain import EvaluationConfig, PretrainConfig
from workloads.types import ImageBatch

_INITIAL_NETWORKS = 2  # untrained networks in `riga_initial`, which is kept for comparison with older figures only


class GridEvaluation:
    """Measures SGA, RIGA and GAP-R of a model on one dataset, and reports them; every rank runs it."""

    def __init__(self, run: PretrainConfig, evaluation: EvaluationConfig, dataset: Dataset, runtime: Runtime) -> None:
        self.run_settings, self.settings, self.dataset, self.runtime = run, evaluation, dataset, runtime

    def run(self, model: torch.nn.Module, *, step: int, final: bool) -> dict[str, float]:
        """Measure `model` and report its figures at `step`, with tables and heatmaps as artifacts.

        Args:
            final: measure RIGA and GAP-R too, which costs the same again for each untrained network.
        """
        protocol = self.settings.protocol
        model.eval()
        untrained = self._untrained() if final else []
        initial = self._untrained(calibrated=False)[:_INITIAL_NETWORKS] if final else []
        mine = grid_accuracy.measure(model, untrained, lambda: self._batches(), protocol, initial=initial)  # type: ignore[arg-type]
        tables = grid_accuracy.merge([_gathered(mine)])
        figures = grid_accuracy.summarize(tables, protocol)
        folder: Path | None = None
        if self.runtime.rank == 0:
            with artifact_folder() as folder:
                self._write_artifacts(folder, model, tables, figures, step)  # type: ignore[arg-type]
        headline = grid_accuracy.headline_figures(figures)
        self.runtime.report(headline, step=step, artifacts=folder)
        return headline

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
        protocol = self.settings.protocol
        record = {
            "figures": figures,
            "protocol": to_dict(protocol),
            "protocol_sha256": grid_accuracy.protocol_hash(protocol),
            "dataset_manifest_sha256": self.dataset.manifest.sha256,
        }
        arrays = {f"{suite}/{name}": column for suite, table in tables.items() for name, column in table.items()}
        write_report(folder, "grid_accuracy", step, record, arrays)
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
