"""The checkpoints of one run in a storage folder: newest, best, and a bounded number of them."""

import math
import re

import pyarrow.fs as pafs
import torch

from workloads.storage.checkpoint import (
    META,
    CheckpointError,
    CheckpointMeta,
    Restored,
    Snapshot,
    delete_checkpoint,
    log,
    read_checkpoint,
    read_meta,
    write_checkpoint,
)

_NAME = re.compile(r"step_(\d{8,})")
_BEST = "best"


class CheckpointStore:
    """The checkpoints of one run, in a local folder or an object store: the newest few, and the best by one metric.

    Args:
        keep: how many of the newest stay.
        best_metric: a copy of the checkpoint that has the highest value of it stays under `best/`; none: no such copy.
    """

    def __init__(
        self, filesystem: pafs.FileSystem, folder: str, *, keep: int = 2, best_metric: str | None = None
    ) -> None:
        self.filesystem, self.folder = filesystem, folder.rstrip("/")
        self._keep, self._best_metric = keep, best_metric

    def path_of(self, step: int) -> str:
        """Where the checkpoint of `step` lies."""
        return f"{self.folder}/step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole as far as its `meta.json` says, ascending."""
        return self._listed(self.folder)

    def write(self, snapshot: Snapshot) -> CheckpointMeta:
        """Write `snapshot`, then drop what is older than the newest few; a reader sees it whole or not at all.

        Raises:
            OSError: nothing is lost but the unfinished folder; it can be tried again.
        """
        meta = write_checkpoint(snapshot, self.path_of(snapshot.meta.step), self.filesystem)
        self._keep_best(snapshot)
        stays = [step for step in self.steps() if step <= meta.step][-self._keep :]  # later ones were passed over
        for step in self._begun():
            if step < meta.step and step not in stays:  # older, or left unfinished by a process that was killed
                self.delete(step)
        return meta

    def delete(self, step: int) -> None:
        """Remove the checkpoint of `step`, its `meta.json` first."""
        delete_checkpoint(self.path_of(step), self.filesystem)

    def read(self, step: int, *, device: torch.device | str = "cpu") -> Restored:
        """The checkpoint of `step`.

        Raises:
            CheckpointError: missing or damaged.
        """
        return read_checkpoint(self.path_of(step), self.filesystem, device=device)

    def read_newest(self, *, device: torch.device | str = "cpu") -> Restored | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = self.read(step, device=device)
            except CheckpointError as error:
                log.warning("%s; falling back to the one before it", error)
                damaged.append(str(error))
                continue
            return Restored(meta=found.meta, state=found.state, passed_over=tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"{self.folder}: all {len(damaged)} checkpoints are damaged ({damaged[0]}); "
                "remove the folder to start this run from its beginning"
            )
        return None

    def best(self) -> tuple[int, str] | None:
        """Step and place of the checkpoint with the highest `best_metric`, or None."""
        steps = self._listed(f"{self.folder}/{_BEST}")
        return (steps[-1], f"{self.folder}/{_BEST}/step_{steps[-1]:08d}") if steps else None

    def _begun(self) -> list[int]:
        """Steps that have anything of a checkpoint."""
        paths = self.filesystem.get_file_info(pafs.FileSelector(self.folder, recursive=True))
        places = (info.path[len(self.folder) :].strip("/").split("/")[0] for info in paths)
        return sorted({int(named.group(1)) for named in map(_NAME.fullmatch, places) if named})

    def _listed(self, folder: str) -> list[int]:
        selector = pafs.FileSelector(folder, allow_not_found=True, recursive=True)
        steps = []
        for info in self.filesystem.get_file_info(selector):
            place = info.path[len(folder) :].strip("/").split("/")
            named = _NAME.fullmatch(place[0])
            if named and len(place) == 2 and place[1] == META:
                steps.append(int(named.group(1)))
        return sorted(steps)

    def _keep_best(self, snapshot: Snapshot) -> None:
        if self._best_metric is None or self._best_metric not in snapshot.meta.metrics:
            return
        place = f"{self.folder}/{_BEST}"
        before = self._listed(place)
        known = [read_meta(f"{place}/step_{step:08d}", self.filesystem).metrics for step in before]
        value = snapshot.meta.metrics[self._best_metric]
        if value > max((metrics.get(self._best_metric, -math.inf) for metrics in known), default=-math.inf):
            write_checkpoint(snapshot, f"{place}/step_{snapshot.meta.step:08d}", self.filesystem)
            for step in before:
                if step != snapshot.meta.step:
                    delete_checkpoint(f"{place}/step_{step:08d}", self.filesystem)
