"""The experiment files of the package: each says in its opening comment what it is, how it is run, how long it takes, and its score."""

import shlex
from pathlib import Path

import pytest

from orchestrator.experiments.load import EXPERIMENTS, list_experiments, load_experiment, load_sweep

FILES = sorted(EXPERIMENTS.glob("*/*.yaml"), key=lambda path: path.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_comment_gives_a_command_that_works_a_time_and_a_score(path: Path) -> None:
    what, command, time, score = list_experiments()[path.stem].splitlines()
    assert what.endswith(".") and time.startswith("Time: ") and score.startswith("Score: ")
    words = shlex.split(command.removeprefix("Command: ").partition(" (")[0])
    if words[0] == "make":
        return
    assert words[0] == "orchestrator" and words[2] == path.stem
    load = load_sweep if words[1] == "sweep" else load_experiment
    assert load(words[2], words[3:]).name == path.stem
