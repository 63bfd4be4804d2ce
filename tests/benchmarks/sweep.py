"""What a finished sweep's trials cost beside their training, and what an early stopper would have saved.

    python tests/benchmarks/sweep.py STORAGE SWEEP --json sweep.json [--first-step 20] [--reduction 2]

STORAGE is the `storage.path` of the sweep (a local folder), SWEEP its name. Times are read from the trials' own journals. For
the stopper, the recorded evaluations are replayed through Ray Tune's ASHA, one trial after the other in the order in which
they ran: each trial would have reported the same figures, since nothing in it depends on the others.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

RANK_BY = ("eval/sga", "eval/photometric/sga")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", type=Path)
    parser.add_argument("sweep")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--first-step", type=int, default=20)
    parser.add_argument("--reduction", type=float, default=2.0)
    options = parser.parse_args()
    trials = [read(path) for path in options.storage.glob(f"{options.sweep}-*/journal.jsonl")]
    # Those at full length, which are no part of the search, have more steps.
    steps = min(trial["steps"] for trial in trials)
    trials = sorted((trial for trial in trials if trial["steps"] == steps), key=lambda trial: trial["began"])
    result = {"trials": len(trials), "steps": steps, "cost": cost(trials)}
    result["asha"] = replay(trials, steps=steps, first_step=options.first_step, reduction=options.reduction)
    options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


def read(path: Path) -> dict[str, Any]:
    """One trial's times (seconds) and evaluations from its journal."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    stamped = [record for record in records if "time_ms" in record]
    metrics = [record for record in stamped if record["kind"] == "metrics"]
    startup = {k: v for r in metrics for k, v in r["metrics"].items() if k.startswith("startup/")}
    measured = {r["step"]: [r["metrics"][key] for key in RANK_BY] for r in metrics if RANK_BY[0] in r["metrics"]}
    return {
        "began": stamped[0]["time_ms"] / 1000,
        "ended": stamped[-1]["time_ms"] / 1000,
        "steps": max(record["step"] for record in metrics),
        "startup": startup,
        "scores": {step: statistics.mean(values) for step, values in sorted(measured.items())},
    }


def cost(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds between the end of a trial's training and the first step of the next, and their parts; medians."""
    later = list(itertools.pairwise(trials))
    between = [after["began"] - before["ended"] for before, after in later]
    first_step = [after["startup"]["startup/total_s"] for _, after in later]
    phases = sorted({key for _, after in later for key in after["startup"]})
    return {
        "first_trial_to_first_step_s": round(trials[0]["startup"]["startup/total_s"], 2),
        "per_later_trial_s": round(statistics.median(a + b for a, b in zip(between, first_step, strict=True)), 2),
        "per_later_trial_s_all": [round(a + b, 2) for a, b in zip(between, first_step, strict=True)],
        "between_trials_s": round(statistics.median(between), 2),
        "to_first_step_s": round(statistics.median(first_step), 2),
        "phases_s": {k: round(statistics.median(a["startup"].get(k, 0.0) for _, a in later), 3) for k in phases},
        "trial_s": round(statistics.median(trial["ended"] - trial["began"] for trial in trials), 1),
    }


def replay(trials: list[dict[str, Any]], *, steps: int, first_step: int, reduction: float) -> dict[str, Any]:
    """Steps that ASHA would have spent on the same trials, and whether the same one would have won."""
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="score",
        mode="max",
        max_t=steps,
        grace_period=first_step,
        reduction_factor=reduction,
    )
    spent, survivors = 0, {}
    for number, trial in enumerate(trials):
        stand_in: Any = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, stand_in)  # type: ignore[arg-type]
        for step, score in trial["scores"].items():
            last = step
            report = {"step": step, "score": score, "training_iteration": step}
            if step < steps and scheduler.on_trial_result(None, stand_in, report) == TrialScheduler.STOP:  # type: ignore[arg-type]
                break
        else:
            survivors[number] = trial["scores"][steps]
        spent += last
    everyone = {number: trial["scores"][steps] for number, trial in enumerate(trials)}
    best = max(everyone, key=lambda number: everyone[number])
    found = max(survivors, key=lambda number: survivors[number])
    return {
        "steps_without": steps * len(trials),
        "steps_with": spent,
        "saved": round(1 - spent / (steps * len(trials)), 3),
        "same_winner": found == best,
        "winner_score": round(everyone[best], 4),
        "winner_score_with": round(everyone[found], 4),
    }


if __name__ == "__main__":
    main()
