"""Sends progress from the worker to the driver's terminal, and stop requests from the driver to the worker.

Both go through Ray's key-value store. The worker's step only leaves its newest line in a slot; a thread publishes the slot
twice a second. That costs no extra actor, and nothing that a training step waits for.
"""

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType

from rich.console import Console

from orchestrator.ray_support.private import KeyValueStore
from orchestrator.tracking.status import format_line

_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The newest state of a run, as the worker publishes it."""

    step: int = 0
    total_steps: int | None = None
    """None: no step was done yet."""
    figures: Mapping[str, float] = field(default_factory=dict)
    warning: str = ""
    """The newest warning for the user."""


class ProgressPublisher:
    """The worker's side; progress is best effort, so errors in publishing are dropped."""

    def __init__(self, key: str) -> None:
        self._key, self._stop_key = f"progress/{key}", f"stop/{key}"
        self.stop_asked = False
        """Whether the driver asked the run to save and end."""
        self._newest = Progress()
        self._warning = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def put(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        """Leave the newest line; never blocks."""
        self._newest = Progress(step=step, total_steps=total_steps, figures=line)

    def warn(self, text: str) -> None:
        """Have the driver show `text` to the user; never blocks."""
        self._warning = text

    def close(self) -> None:
        """Publish the last line and stop."""
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        store = KeyValueStore()
        published = Progress()
        while True:
            stopping = self._stop.wait(_PERIOD_S)
            newest = replace(self._newest, warning=self._warning)
            if newest != published:
                with contextlib.suppress(Exception):
                    store.put(self._key, json.dumps(asdict(newest)))
                    published = newest
            with contextlib.suppress(Exception):
                self.stop_asked = self.stop_asked or store.exists(self._stop_key)
            if stopping:
                return


def ask_to_stop(key: str) -> None:
    """Ask the workers of the run `key` to save a checkpoint and end."""
    KeyValueStore().put(f"stop/{key}", "1")


def forget_stop(key: str) -> None:
    """Withdraw the stop request of an earlier command, and forget its progress and warnings, so that the run can go on."""
    store = KeyValueStore()
    store.delete(f"stop/{key}")
    store.delete(f"progress/{key}")


class ProgressWatcher:
    """The driver's side: a bar on a terminal, else a plain line every few seconds; warnings as they come."""

    def __init__(self, key: str, *, console: Console, plain_every_s: float = 10.0) -> None:
        self._key = f"progress/{key}"
        self._console = console
        self._plain_every_s = plain_every_s
        self._warned = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress-watch", daemon=True)

    def __enter__(self) -> "ProgressWatcher":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(3.0)

    def _watch(self) -> None:
        show = self._watch_bar if self._console.is_terminal else self._watch_plain
        with contextlib.suppress(Exception):  # a display must never end a run
            show()

    def _newest(self) -> Progress | None:
        import ray

        if not ray.is_initialized():
            return None
        text = KeyValueStore().get(self._key)
        if not text:
            return None
        newest = Progress(**json.loads(text))
        if newest.warning and newest.warning != self._warned:
            self._warned = newest.warning
            self._console.print(f"warning: {newest.warning}", highlight=False, soft_wrap=True)
        return newest if newest.total_steps is not None else None

    def _watch_bar(self) -> None:
        from rich import progress

        columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
        text = progress.TextColumn("{task.fields[line]}")
        with progress.Progress(
            progress.TextColumn("train"), *columns, text, console=self._console, refresh_per_second=2
        ) as bar:
            task = bar.add_task("train", total=None, line="starting workers …")
            stopping = False
            while not stopping:
                stopping = self._stop.wait(_PERIOD_S)
                newest = self._newest()
                if newest:
                    line = format_line(newest.figures)
                    bar.update(task, completed=newest.step, total=newest.total_steps, line=line)

    def _watch_plain(self) -> None:
        shown_step, shown_at = -1, float("-inf")
        stopping = False
        while not stopping:
            stopping = self._stop.wait(_PERIOD_S)
            newest = self._newest()
            if newest is None or newest.step == shown_step:
                continue
            if stopping or time.monotonic() - shown_at >= self._plain_every_s:
                shown_step, shown_at = newest.step, time.monotonic()
                line = f"step {newest.step}/{newest.total_steps}  {format_line(newest.figures)}"
                self._console.print(line, highlight=False, soft_wrap=True)
