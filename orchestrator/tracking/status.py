"""`run_status` reads from MLflow how far a run is (`orchestrator status RUN`), wherever it runs."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.tracking.addresses import run_address
from orchestrator.tracking.lookup import find_run, open_tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SCORES = ("eval/sga", "eval/gap_r", "eval/ap50", "eval/ap")
_SHOWN = ("train/loss", "train/images_per_s", "train/data_wait_share")


def run_status(run: str, *, tracking_uri: str | None) -> dict[str, str]:
    """Label → text of each line to show; lines without a value are left out.

    Args:
        run: MLflow run id, or run name.

    Raises:
        ConfigError: the run or the store does not exist.
    """
    client = open_tracking(tracking_uri)
    tracked = find_run(client, run)
    info, metrics, tags = tracked.info, tracked.data.metrics, tracked.data.tags
    total = int(tracked.data.params.get("steps", "0"))
    step, newest_ms = _newest(client, info.run_id, metrics)
    ended = (info.end_time or 0) / 1000
    lines = {
        "run": f"{info.run_name}  {info.run_id}",
        "status": info.status.lower(),
        "step": f"{step} of {total}" + (f" ({step / total:.0%})" if total else ""),
        "newest": format_line({key: metrics[key] for key in _SHOWN if key in metrics}),
        "reported": f"{_ago(time.time() - newest_ms / 1000)} ago" if newest_ms and not ended else "",
        "remaining": _remaining(info.status, step, total, metrics),
        "score": "  ".join(f"{key} {metrics[key]:.3f}" for key in _SCORES if key in metrics),
        "faults": tags.get("run.faults", ""),
        "job": tags.get("ray.submission_id", ""),
        "look": run_address(client.tracking_uri, info.experiment_id, info.run_id),
    }
    return {label: text for label, text in lines.items() if text}


def _newest(client: "MlflowClient", run_id: str, metrics: dict[str, float]) -> tuple[int, int]:
    """The newest step that has a loss, and its time in milliseconds since 1970."""
    if "train/loss" not in metrics:
        return 0, 0
    last = max(client.get_metric_history(run_id, "train/loss"), key=lambda point: point.step)
    return int(last.step), int(last.timestamp)


def _remaining(status: str, step: int, total: int, metrics: dict[str, float]) -> str:
    if status != "RUNNING" or "train/step_s" not in metrics:
        return ""
    return f"about {_ago((total - step) * metrics['train/step_s'])}, evaluations aside"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_line(line: Mapping[str, Any]) -> str:
    """One line of text with the loss, images/s and data-wait share in `line`; missing ones are left out."""
    short = {key.rpartition("/")[2]: value for key, value in line.items()}
    parts = []
    if "loss" in short:
        parts.append(f"loss {short['loss']:.3f}")
    if "images_per_s" in short:
        parts.append(f"{short['images_per_s']:.0f} images/s")
    if "data_wait_share" in short:
        parts.append(f"data wait {short['data_wait_share']:.0%}")
    return "  ".join(parts)
