"""MLflow has every record once and the whole header, whatever dies in between."""

from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs
import pytest

from orchestrator.runs.records import ArtifactsRecord, MetricsRecord, TagsRecord
from orchestrator.tracking.header import DatasetUse, RunHeader
from orchestrator.tracking.parent_run import ParentRun
from orchestrator.tracking.sink import MlflowSink, _is_missing


def metrics(step: int, **values: float) -> MetricsRecord:
    return MetricsRecord(step=step, time_ms=1_000 + step, metrics=values)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one SQLite store for all tests here: making its tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


def make_sink(store: Path, claim: str, *, lr: str = "0.001") -> MlflowSink:
    header = RunHeader(
        name=f"run-{claim}",
        claim=claim,
        experiment="journal",
        params={"optimizer.lr": lr},
        tags={"run.claim": claim},
        datasets=[DatasetUse(context="training", uri="/data/shards", sha256="abc")],
        config_yaml="steps: 1\n",
    )
    return MlflowSink(
        header,
        uri=f"sqlite:///{store}/mlflow.db",
        artifact_root=(store / "mlartifacts").as_uri(),
        filesystem=arrow_fs.LocalFileSystem(),
        run_folder=str(store / "run"),
    )


def history(sink: MlflowSink, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in sink.client.get_metric_history(sink.open(), key)]


def test_mlflow_gets_each_key_and_step_once_over_several_attempts(store: Path) -> None:
    first = make_sink(store, "attempts")
    first.write([metrics(1, **{"train/loss": 2.0}), metrics(2, **{"train/loss": 1.5})])
    second = make_sink(store, "attempts")  # the run is continued from step 1 and replays its journal
    second.write(
        [metrics(1, **{"train/loss": 2.0}), metrics(2, **{"train/loss": 1.4}), metrics(3, **{"train/loss": 1.0})]
    )
    assert second.open() == first.open()
    assert history(second, "train/loss") == [(1, 2.0), (2, 1.5), (3, 1.0)]


def test_mlflow_gets_nothing_twice_when_an_acknowledgement_is_lost(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = make_sink(store, "lost")
    sink.open()
    real, calls = sink.client.log_batch, []

    def lossy(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(sink.client, "log_batch", lossy)
    records = [metrics(1, a=1.0), metrics(2, a=2.0)]
    with pytest.raises(ConnectionError):
        sink.write(records)
    sink.write([*records, metrics(3, a=float("nan"))])
    assert [step for step, _ in history(sink, "a")] == [1, 2, 3]


def test_artifacts_and_tags_reach_the_run(store: Path) -> None:
    place = store / "run" / "artifacts" / "step_1" / "heatmaps"
    place.mkdir(parents=True)
    (place / "plain.png").write_bytes(b"png")
    sink = make_sink(store, "files")
    sink.write([ArtifactsRecord(folder="artifacts/step_1"), TagsRecord(tags={"ray.job_id": "7"})])
    run = sink.client.get_run(sink.open())
    assert run.data.tags["ray.job_id"] == "7"
    assert [item.path for item in sink.client.list_artifacts(sink.open(), "heatmaps")] == ["heatmaps/plain.png"]
    assert [item.path for item in sink.client.list_artifacts(sink.open(), "config")] == ["config/experiment.yaml"]


HEADER_CALLS = ("log_batch", "log_inputs", "log_text", "set_tag")


@pytest.mark.parametrize("call", HEADER_CALLS)
def test_a_server_that_dies_while_the_header_is_logged_gets_the_rest_at_the_next_try(
    store: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    first = make_sink(store, f"header-{call}")
    first.connect()

    def dead(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server died")

    monkeypatch.setattr(first.client, call, dead)
    with pytest.raises(ConnectionError):
        first.open()
    second = make_sink(store, f"header-{call}")  # as the next command does
    run = second.client.get_run(second.open()) if second.connect() else None
    assert run is not None and run.data.params == {"optimizer.lr": "0.001"}
    assert [used.dataset.digest for used in run.inputs.dataset_inputs] == ["abc"]
    assert [item.path for item in second.client.list_artifacts(second.open(), "config")] == ["config/experiment.yaml"]
    assert run.data.tags["run.header"] == "complete"
    assert len(second.client.search_runs([second.connect()], f"tags.`run.claim` = 'header-{call}'")) == 1


def test_a_header_that_another_command_logged_stays(store: Path) -> None:
    """Where a run goes on elsewhere, `scaling.*` may differ; a parameter of MLflow cannot be changed."""
    first = make_sink(store, "again")
    run_id = first.open()
    first.client.delete_tag(run_id, "run.header")  # as versions without this tag left it
    second = make_sink(store, "again", lr="0.5")
    assert second.open() == run_id
    assert second.client.get_run(run_id).data.params == {"optimizer.lr": "0.001"}


def test_a_restart_uploads_no_artifacts_again_and_a_folder_that_is_gone_blocks_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        place = store / "run" / "artifacts" / f"step_{step}_again" / "report"
        place.mkdir(parents=True)
        (place / f"step_{step}.json").write_text("{}")
    records = [ArtifactsRecord(folder=f"artifacts/step_{n}_again") for n in (1, 2)]
    make_sink(store, "restart").write(records[:1])
    second = make_sink(store, "restart")
    second.open()
    uploads = []
    real = second.client.log_artifacts
    monkeypatch.setattr(second.client, "log_artifacts", lambda *a, **k: (uploads.append(a), real(*a, **k)))
    gone = ArtifactsRecord(folder="artifacts/gone")
    second.write([gone, *records, TagsRecord(tags={"after": "yes"})])
    assert len(uploads) == 1  # that of step 2 alone
    assert "artifacts/gone is gone" in caplog.text
    assert second.client.get_run(second.open()).data.tags["after"] == "yes"
    files = [item.path for item in second.client.list_artifacts(second.open(), "report")]
    assert files == ["report/step_1.json", "report/step_2.json"]


@pytest.mark.parametrize(
    ("message", "is_gone"),
    [
        ("When listing objects: AWS Error ACCESS_DENIED during ListObjectsV2 operation: HTTP status 403", False),
        ("AWS Error NETWORK_CONNECTION: curlCode: 6, Couldn't resolve host name", False),
        ("When reading: AWS Error NO_SUCH_KEY during GetObject operation: HTTP status 404", True),
    ],
)
def test_only_a_storage_that_answers_lets_an_artifact_folder_count_as_gone(message: str, is_gone: bool) -> None:
    assert _is_missing(OSError(message)) is is_gone
    assert _is_missing(FileNotFoundError("artifacts"))


def test_a_child_that_was_left_incomplete_is_completed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = make_sink(store, "parent")
    parent = ParentRun(sink)
    tags = {"mlflow.parentRunId": sink.open()}
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):

        def dead(*_: Any, **__: Any) -> None:
            raise ConnectionError("the server died")

        patch.setattr(sink.client, "log_batch", dead)
        parent.add_child(name="refused", params={"a": "1"}, tags=tags, status="FAILED")
    for _ in range(2):
        parent.add_child(name="refused", params={"a": "1"}, tags=tags, status="FAILED")
    (child,) = parent.children()
    assert child.data.params == {"a": "1"} and child.info.status == "FAILED"
