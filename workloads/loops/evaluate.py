"""Evaluation of the frozen grid-accuracy suites over a dataset, exact over any number of ranks."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from workloads.checkpoint import read_meta
from workloads.config import config_hash, to_dict
from workloads.data.manifest import Dataset, open_dataset
from workloads.data.reader import DataConfig, EvalLoader
from workloads.distributed import gather_rows
from workloads.metrics import grid_accuracy
from workloads.metrics.grid_accuracy import SUITES, GridModel
from workloads.reports.heatmaps import draw_heatmaps
from workloads.runtime import Runtime, new_folder
from workloads.spec import EvaluationConfig, PretrainConfig, build_objective, load_model
from workloads.types import ImageBatch


class GridEvaluation:
    """SGA, RIGA and GAP-R of a model on one dataset, reported through the runtime by every rank alike."""

    def __init__(self, run: PretrainConfig, evaluation: EvaluationConfig, dataset: Dataset, runtime: Runtime) -> None:
        self.run_settings, self.settings, self.dataset, self.runtime = run, evaluation, dataset, runtime

    @classmethod
    def of(cls, run: PretrainConfig, runtime: Runtime) -> "GridEvaluation | None":
        """The evaluation that `run` asks for, or None.

        Raises:
            DataError: no dataset there.
        """
        if run.evaluation.uri is None:
            return None
        return cls(run, run.evaluation, open_dataset(run.evaluation.uri), runtime)

    def run(self, model: torch.nn.Module, *, step: int, untrained: bool) -> dict[str, float]:
        """Measure `model` and report its figures at `step`, with tables and heatmaps as artifacts.

        Args:
            untrained: whether RIGA, and so GAP-R, are measured too; they cost as much again for each untrained network.
        """
        protocol = self.settings.protocol
        model.eval()
        networks = self._untrained() if untrained else []
        mine = grid_accuracy.measure(model, networks, lambda: self._batches(), protocol)  # type: ignore[arg-type]
        tables = grid_accuracy.merge([_gathered(mine)])
        figures = grid_accuracy.summarize(tables, protocol)
        folder = None
        if self.runtime.rank == 0:
            folder = new_folder()
            self._write_artifacts(folder, model, tables, figures, step)  # type: ignore[arg-type]
        self.runtime.report(figures, step=step, artifacts=folder)
        return figures

    def _untrained(self) -> list[GridModel]:
        """Networks of the run's architecture and other seeds, in eval mode with BatchNorm's initial statistics (mean 0, variance 1)."""
        networks: list[GridModel] = []
        state = torch.get_rng_state()
        for i in range(self.settings.protocol.untrained_networks):
            torch.manual_seed(self.settings.protocol.seed + i)
            networks.append(build_objective(self.run_settings, seed=0).eval().to(self.runtime.device))
        torch.set_rng_state(state)
        return networks

    def _batches(self) -> Iterator[ImageBatch]:
        # Queries come from the source resolution, whatever the training reads.
        settings = self.settings
        reading = DataConfig(uri=settings.uri or self.dataset.uri, decode_size=None)
        loader = EvalLoader(
            self.dataset,
            reading,
            batch_size=settings.batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            limit=settings.limit,
        )
        for batch in loader:
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
        reading = DataConfig(uri=self.settings.uri or self.dataset.uri, decode_size=None)
        batches = iter(EvalLoader(self.dataset, reading, batch_size=min(count, self.dataset.num_images), limit=count))
        batch = next(batches)
        batches.close()  # type: ignore[attr-defined]
        return batch.to(self.runtime.device)


def _title(figures: dict[str, float], suite: str, step: int) -> str:
    prefix = "eval/" if suite == "plain" else f"eval/{suite}/"
    named = (("SGA", "sga"), ("pixel", "pixel"), ("chance", "chance"))
    return f"{suite}, step {step}:  " + "   ".join(f"{name} {100 * figures[prefix + key]:.1f} %" for name, key in named)


def _gathered(tables: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """The tables of all ranks, joined; every rank gets the same."""
    return {
        suite: {name: gather_rows(torch.from_numpy(column)).numpy() for name, column in table.items()}
        for suite, table in tables.items()
    }


def evaluate(
    checkpoint: Path,
    *,
    uri: str,
    config: EvaluationConfig,
    runtime: Runtime,
) -> dict[str, float]:
    """Measure a checkpoint on the dataset at `uri`, RIGA and GAP-R included, and report it at the checkpoint's step.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        DataError: no dataset there.
    """
    dataset = open_dataset(uri)
    model, run = load_model(checkpoint, device=runtime.device)
    return GridEvaluation(run, config, dataset, runtime).run(
        model, step=read_meta(str(checkpoint)).step, untrained=True
    )
