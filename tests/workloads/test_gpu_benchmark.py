"""`tests/benchmarks/gpu.py` at toy size on the CPU: as many steps as are asked for, overrides anywhere, JSON on standard output."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.gpu import main


def test_figures_of_two_models(coco: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["views.view_size=32", "objective.projector_hidden=16", "data.decode_size=48"]
    main(["--models", "compare_ntxent", small[0], "--steps", "1", "global_batch_size=4", *small[1:]])
    file = tmp_path / "figures.json"
    sharded = [
        "--data",
        coco["train"],
        "global_batch_size=4",
        "data.lanes=4",
        "views.full_size=64",
        "views.crop_size=16",
    ]
    main(["--models", "compare_anchor", "--steps", "1", "--json", str(file), *sharded, "data.decode_size=64"])
    printed = capsys.readouterr().out
    ready, read = (json.loads(text) for text in (printed[: -len(file.read_text())], file.read_text()))
    for result, name in ((ready, "compare_ntxent"), (read, "compare_anchor")):
        figures = result["models"][name]
        assert figures.keys() == {"images_per_s", "share_of_limit", "syncs_per_step", "peak_gib"}
        assert figures["images_per_s"] > 0 and figures["share_of_limit"] > 0 and figures["peak_gib"] > 0


def test_an_argument_that_is_no_override_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--models", "compare_ntxent", "--step", "1", "--batches=3"])
    assert "unrecognized arguments: --batches=3" in capsys.readouterr().err
