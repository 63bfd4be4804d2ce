"""Averages the metrics of training steps between two log lines, and stops at a loss that is not finite."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workloads.data.loading.loaders import TrainLoader
from workloads.errors import RunFailedError
from workloads.parallel.distributed import sum_over_ranks
from workloads.types import ImageBatch


class NonFiniteLossError(RunFailedError):
    """The loss became NaN or infinite; the message names the step, the images and the last good checkpoint."""


@dataclass(slots=True)
class Meter:
    """Sums of the metrics since the last record; only `check` and `flush` wait for the device."""

    loader: TrainLoader
    remedy: str
    steps: int = 0
    timed_steps: int = 0
    rate: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    recent: collections.deque[tuple[str, ...]] = field(default_factory=collections.deque)
    started: float = 0.0
    waited: float = 0.0
    held: float = 0.0
    bad_rows: int = 0
    bad_rows_before: int = 0
    shown: dict[str, float] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget the sums and start measuring images/s again."""
        self.steps, self.sums = 0, {}
        self.recent.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start measuring images/s again."""
        self.timed_steps, self.held = 0, 0.0
        self.started, self.waited = time.perf_counter(), self.loader.wait_seconds

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Count the block's time as time for which a checkpoint blocked the steps."""
        began = time.perf_counter()
        yield
        self.held += time.perf_counter() - began

    def add(self, batch: ImageBatch, metrics: dict[str, Tensor], rate: float) -> None:
        """Add the metrics of one update, made from `batch` at the learning rate `rate`."""
        self.steps += 1
        self.timed_steps += 1
        self.rate = rate
        self.recent.append(batch.image_ids)
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def count_bad_rows(self) -> None:
        """Sum the rows that did not decode on any rank since the run began; every rank calls it."""
        # On the host, so that the device is not waited for.
        here = torch.tensor([self.loader.bad_rows], dtype=torch.float64)
        self.bad_rows = self.bad_rows_before + int(sum_over_ranks(here))

    def window(self) -> dict[str, Tensor]:
        """The sums since the last record, for a checkpoint: the first record of a resumed run covers the steps before it too."""
        return {**self.sums, "steps": torch.tensor(self.steps), "bad_rows": torch.tensor(self.bad_rows)}

    def resume(self, window: Mapping[str, Tensor]) -> None:
        """Continue from the `window` of a checkpoint."""
        self.restart()
        self.steps, self.bad_rows_before = int(window["steps"]), int(window["bad_rows"])
        self.sums = {name: value.clone() for name, value in window.items() if name not in ("steps", "bad_rows")}

    def check(self, step: int, saved: str) -> None:
        """Wait for the device and check that the loss is finite.

        Raises:
            NonFiniteLossError: on every rank alike, since the summed loss is the global batch's.
        """
        loss = float(self.sums["train/loss"]) / self.steps
        if not math.isfinite(loss):
            images = [image for batch in self.recent for image in batch if image]
            shown = ", ".join(images[:8]) + (f" and {len(images) - 8} more" if len(images) > 8 else "")
            raise NonFiniteLossError(
                f"the loss is {loss} within the {self.steps} steps up to step {step} "
                f"(this worker's images: {shown}); {saved}; {self.remedy}"
            )

    def flush(self, global_batch_size: int) -> dict[str, float]:
        """The means since the last record, by tracking key; starts the next record."""
        names = list(self.sums)
        values = torch.stack([self.sums[name] for name in names]).tolist()
        record = {name: value / self.steps for name, value in zip(names, values, strict=True)}
        seconds = time.perf_counter() - self.started
        if self.timed_steps:
            record["train/step_s"] = seconds / self.timed_steps
        record["train/images_per_s"] = self.timed_steps * global_batch_size / seconds
        record["train/data_wait_share"] = (self.loader.wait_seconds - self.waited) / seconds
        record["train/checkpoint_share"] = self.held / seconds
        self.held = 0.0
        record["train/lr"] = self.rate
        record["train/bad_rows"] = float(self.bad_rows)
        self.shown = record
        self.restart()
        return record

    def line(self) -> dict[str, float]:
        """Figures for a progress bar: those of the last record, so that the device is not waited for."""
        names = ("train/loss", "train/images_per_s", "train/data_wait_share")
        return {name.removeprefix("train/"): self.shown[name] for name in names if name in self.shown}
