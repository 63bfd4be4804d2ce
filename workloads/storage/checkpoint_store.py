"""`CheckpointStore`: the newest checkpoints of one run in a storage folder, and the best by one metric."""

import math
import re

import pyarrow.fs as pafs
import torch

from workloads.errors import ConfigError
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
from workloads.storage.space import free_bytes, mebibytes

_NAME = re.compile(r"step_(\d{8,})")
_BEST = "best"


class CheckpointStore:
    """The checkpoints of one run, in a local folder or an object store.

    Args:
        keep: number of newest checkpoints that stay.
        best_metric: metric whose highest value marks the best checkpoint; a copy of it stays under `best/`. None: no copy.
    """

    def __init__(
        self, filesystem: pafs.FileSystem, folder: str, *, keep: int = 2, best_metric: str | None = None
    ) -> None:
        self.filesystem, self.folder = filesystem, folder.rstrip("/")
        self._keep, self._best_metric = keep, best_metric
        self._complete: tuple[CheckpointMeta, CheckpointMeta] | None = None  # asked for last, and as it was written

    def path_of(self, step: int) -> str:
        """The folder of the checkpoint of `step`."""
        return f"{self.folder}/step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps whose checkpoint has a `meta.json`, ascending."""
        return self._listed(self.folder)

    def check_space(self, num_bytes: int) -> None:
        """Compare the size of one checkpoint with the free space of a local disk.

        Raises:
            ConfigError: there is no room for one.
        """
        if self.free_bytes() is None:
            return
        complete = set(self.steps())
        for step in self._begun():
            if step not in complete:  # left unfinished by a process that was killed
                self.delete(step)
        free = self.free_bytes() or 0
        if free < num_bytes:
            raise ConfigError(
                f"{self.folder}: the disk has {mebibytes(free)} free, a checkpoint of this run needs "
                f"{mebibytes(num_bytes)}; free space there, or store the run elsewhere"
            )
        # While one is written, those that it replaces are still there.
        more = self._keep + 1 + (2 if self._best_metric is not None else 0) - len(self.steps())
        if free < more * num_bytes:
            log.warning(
                "%s: the disk has %s free, the run's checkpoints will need about %s; free space before it is full",
                self.folder,
                mebibytes(free),
                mebibytes(more * num_bytes),
            )

    def free_bytes(self) -> int | None:
        """Bytes free on the disk of the folder; None where that is not known, as for an object store."""
        return free_bytes(self.filesystem, self.folder)

    def write(self, snapshot: Snapshot) -> CheckpointMeta:
        """Write `snapshot`, then remove those older than the newest few; a reader sees all of it or none.

        Raises:
            OSError: only the unfinished folder is lost; the call can be repeated.
        """
        if self._complete is None or self._complete[0] is not snapshot.meta:  # else only the best copy has failed
            self._complete = None
            self._complete = (
                snapshot.meta,
                write_checkpoint(snapshot, self.path_of(snapshot.meta.step), self.filesystem),
            )
        meta = self._complete[1]
        stays = [step for step in self.steps() if step <= meta.step][-self._keep :]  # later ones were passed over
        for step in self._begun():
            if step < meta.step and step not in stays:  # older, or left unfinished by a process that was killed
                self.delete(step)
        self._keep_best(snapshot)
        return meta

    def delete(self, step: int) -> None:
        """Remove the checkpoint of `step`, its `meta.json` first."""
        delete_checkpoint(self.path_of(step), self.filesystem)

    def read(self, step: int, *, device: torch.device | str = "cpu") -> Restored:
        """Read the checkpoint of `step`.

        Raises:
            CheckpointError: missing or damaged.
        """
        return read_checkpoint(self.path_of(step), self.filesystem, device=device)

    def read_newest(self, *, device: torch.device | str = "cpu") -> Restored | None:
        """Read the newest checkpoint that is complete; None if there are no checkpoints.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                newest = self.read(step, device=device)
            except CheckpointError as error:
                log.warning("%s; falling back to the one before it", error)
                damaged.append(str(error))
                continue
            return Restored(meta=newest.meta, state=newest.state, passed_over=tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"{self.folder}: all {len(damaged)} checkpoints are damaged ({damaged[0]}); "
                "remove the folder to start this run from its beginning"
            )
        return None

    def best(self) -> tuple[int, str] | None:
        """Step and folder of the checkpoint with the highest `best_metric`; None if there is none."""
        steps = list(self._best_values())
        return (steps[-1], self._best_path(steps[-1])) if steps else None

    def _best_path(self, step: int) -> str:
        return f"{self.folder}/{_BEST}/step_{step:08d}"

    def _best_values(self) -> dict[int, float]:
        """Value of the metric by step of the copies under `best/`; a damaged `meta.json` counts as no copy."""
        values: dict[int, float] = {}
        for step in self._listed(f"{self.folder}/{_BEST}"):
            try:
                metrics = read_meta(self._best_path(step), self.filesystem).metrics
            except CheckpointError as error:
                log.warning("%s; it does not count as the best", error)
                continue
            values[step] = metrics.get(self._best_metric or "", -math.inf)
        return values

    def _keep_best(self, snapshot: Snapshot) -> None:
        if self._best_metric is None or self._best_metric not in snapshot.meta.metrics:
            return
        value = snapshot.meta.metrics[self._best_metric]
        if value > max(self._best_values().values(), default=-math.inf):
            before = self._begun(f"{self.folder}/{_BEST}")
            write_checkpoint(snapshot, self._best_path(snapshot.meta.step), self.filesystem)
            for step in before:
                if step != snapshot.meta.step:
                    delete_checkpoint(self._best_path(step), self.filesystem)

    def _begun(self, folder: str | None = None) -> list[int]:
        """Steps that have any file or folder of a checkpoint."""
        names = (name for name, _ in self._files(folder or self.folder))
        return sorted({int(named.group(1)) for named in map(_NAME.fullmatch, names) if named})

    def _listed(self, folder: str) -> list[int]:
        named = ((_NAME.fullmatch(name), rest) for name, rest in self._files(folder))
        return sorted(int(match.group(1)) for match, rest in named if match and rest == META)

    def _files(self, folder: str) -> list[tuple[str, str]]:
        """(first part, rest) of the path within `folder` of all that lies below it."""
        infos = self.filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True, recursive=True))
        parts = (info.path[len(folder) :].strip("/").partition("/") for info in infos)
        return [(name, rest) for name, _, rest in parts]
