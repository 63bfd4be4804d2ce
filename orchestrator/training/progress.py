"""How far a run is, from the worker's step to the driver's terminal; and the driver's word to stop, the other way.

The worker's step only leaves its newest line in a slot; a thread publishes the slot through Ray's own key-value store
twice a second. That costs no extra actor, and nothing that a training step waits for.
"""

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from orchestrator.ray_support.private import KeyValueStore
from orchestrator.tracking.status import format_line

_PERIOD_S = 0.5


class ProgressPublisher:
    """The worker's side; progress is best effort, so what goes wrong in publishing is dropped."""

    def __init__(self, key: str) -> None:
        self._key, self._stop_key = f"progress/{key}", f"stop/{key}"
        self.stop_asked = False
        """Whether the driver wants the run to save and end."""
        self._line: dict[str, Any] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def put(self, line: Mapping[str, float], *, step: int, total_steps: int) -> None:
        """Leave the newest line; never blocks."""
        self._line = {"step": step, "total_steps": total_steps, **line}

    def close(self) -> None:
        """Publish the last line and stop."""
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        store = KeyValueStore()
        while True:
            stopping = self._stop.wait(_PERIOD_S)
            line, self._line = self._line, None
            if line is not None:
                with contextlib.suppress(Exception):
                    store.put(self._key, json.dumps(line))
            with contextlib.suppress(Exception):
                self.stop_asked = self.stop_asked or store.exists(self._stop_key)
            if stopping:
                return


def ask_to_stop(key: str) -> None:
    """The driver's word to the run `key`: save a checkpoint and end."""
    KeyValueStore().put(f"stop/{key}", "1")


def forget_stop(key: str) -> None:
    """Take the word back, so that the run can go on."""
    KeyValueStore().delete(f"stop/{key}")


class ProgressWatcher:
    """The driver's side: a bar on a terminal, else a plain line now and then."""

    def __init__(self, key: str, *, console: Any, plain_every_s: float = 10.0) -> None:
        self._key = f"progress/{key}"
        self._console = console
        self._plain_every_s = plain_every_s
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

    def _newest(self) -> dict[str, Any] | None:
        import ray

        if not ray.is_initialized():
            return None
        text = KeyValueStore().get(self._key)
        return json.loads(text) if text else None

    def _watch_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
        with Progress(TextColumn("train"), *columns, console=self._console, refresh_per_second=2) as bar:
            task = bar.add_task("train", total=None, line="starting workers …")
            stopping = False
            while not stopping:
                stopping = self._stop.wait(_PERIOD_S)
                newest = self._newest()
                if newest:
                    bar.update(task, completed=newest["step"], total=newest["total_steps"], line=format_line(newest))

    def _watch_plain(self) -> None:
        shown_step, shown_at = -1, float("-inf")
        stopping = False
        while not stopping:
            stopping = self._stop.wait(_PERIOD_S)
            newest = self._newest()
            if newest is None or newest["step"] == shown_step:
                continue
            if stopping or time.monotonic() - shown_at >= self._plain_every_s:
                shown_step, shown_at = newest["step"], time.monotonic()
                line = f"step {newest['step']}/{newest['total_steps']}  {format_line(newest)}"
                self._console.print(line, highlight=False, soft_wrap=True)
