"""The journal delivers everything once, whatever the sink does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs
import pytest
from pyarrow.fs import LocalFileSystem

from orchestrator.ray_support.node_load import by_node
from orchestrator.runs.delivery import JournalDrain
from orchestrator.runs.journal import Journal, JournalReader, Record
from orchestrator.runs.journal_archive import JournalArchive
from orchestrator.tracking.header import RunHeader
from orchestrator.tracking.sink import MlflowSink
from orchestrator.training.journal_callback import records_of


def metrics(step: int, **values: float) -> Record:
    return {"kind": "metrics", "step": step, "time_ms": 1_000 + step, "metrics": dict(values)}


def test_reads_whole_lines_only_and_survives_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    reader = JournalReader(path)
    assert reader.read() == []
    Journal(path).append(metrics(1, a=1.0))
    with path.open("ab") as file:
        file.write(b'{"kind": "met')  # a process was killed here
    assert reader.read() == [metrics(1, a=1.0)]
    Journal(path).append(metrics(2, a=2.0))
    assert reader.read() == [metrics(2, a=2.0)]


class FlakySink:
    """Fails `failures` times, then takes everything."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.taken: list[Record] = []

    def write(self, records: Sequence[Record]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("server is away")
        self.taken += records


def test_a_failing_sink_gets_everything_in_order(tmp_path: Path) -> None:
    journal, sink = Journal(tmp_path / "journal.jsonl"), FlakySink(failures=3)
    drain = JournalDrain(journal.path, sink, poll_s=0.01, first_retry_s=0.01)
    drain.start()
    for step in range(50):
        journal.append(metrics(step, a=float(step)))
    assert drain.close(timeout_s=5) == 0
    assert [record["step"] for record in sink.taken] == list(range(50))


def test_a_dead_sink_does_not_hold_the_end_of_a_run_for_ever(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    drain = JournalDrain(journal.path, FlakySink(failures=10**6), poll_s=0.01, first_retry_s=0.01)
    drain.start()
    journal.append(metrics(1, a=1.0))
    assert drain.close(timeout_s=0.3) == 1
    assert isinstance(drain.last_error, ConnectionError)
    assert len(JournalReader(journal.path).read()) == 1


def test_a_report_becomes_metrics_and_artifacts() -> None:
    report = {"step": 3, "time_ms": 7, "artifacts": "artifacts/step_3", "train/loss": 1.5}
    assert records_of(report) == [
        {"kind": "metrics", "step": 3, "time_ms": 7, "metrics": {"train/loss": 1.5}},
        {"kind": "artifacts", "step": 3, "time_ms": 7, "folder": "artifacts/step_3"},
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one SQLite store for all tests here: making its tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow")


def make_sink(store: Path, claim: str) -> MlflowSink:
    header = RunHeader(
        name=f"run-{claim}",
        claim=claim,
        experiment="journal",
        params={"optimizer.lr": "0.001"},
        tags={"run.claim": claim},
        datasets=[("training", "shards", "abc", "local")],
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
    return [(point.step, point.value) for point in sink._client.get_metric_history(sink.open(), key)]


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
    real, calls = sink._client.log_batch, []

    def lossy(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(sink._client, "log_batch", lossy)
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
    sink.write([{"kind": "artifacts", "folder": "artifacts/step_1"}, {"kind": "tags", "tags": {"ray.job_id": "7"}}])
    run = sink._client.get_run(sink.open())
    assert run.data.tags["ray.job_id"] == "7"
    assert [item.path for item in sink._client.list_artifacts(sink.open(), "heatmaps")] == ["heatmaps/plain.png"]
    assert [item.path for item in sink._client.list_artifacts(sink.open(), "config")] == ["config/experiment.yaml"]


def archive_of(folder: Path, storage: Path) -> JournalArchive:
    return JournalArchive(folder / "journal.jsonl", LocalFileSystem(), str(storage), period_s=0.05)


def test_the_storage_keeps_a_copy_that_another_machine_goes_on_with(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    journal = Journal(first / "journal.jsonl")
    with archive_of(first, tmp_path / "storage") as archive:
        journal.append({"kind": "tags", "tags": {"n": "1"}})
        archive.push()
        journal.append({"kind": "tags", "tags": {"n": "2"}})
    assert len(list((tmp_path / "storage").iterdir())) >= 2
    with archive_of(second, tmp_path / "storage"):
        assert (second / "journal.jsonl").read_bytes() == journal.path.read_bytes()
        Journal(second / "journal.jsonl").append({"kind": "tags", "tags": {"n": "3"}})
    with archive_of(first, tmp_path / "storage"):  # the first machine comes back, its copy out of date
        assert [record["tags"]["n"] for record in JournalReader(journal.path).read()] == ["1", "2", "3"]


def test_what_the_storage_does_not_have_yet_is_kept_and_copied(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with archive_of(tmp_path, tmp_path / "storage"):
        journal.append({"kind": "tags", "tags": {"n": "1"}})
    journal.append({"kind": "tags", "tags": {"n": "2"}})  # written, and the process died before it was copied
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "ta')  # torn
    with archive_of(tmp_path, tmp_path / "storage"):
        pass
    copied = b"".join(path.read_bytes() for path in sorted((tmp_path / "storage").iterdir()))
    assert journal.path.read_bytes() == copied + b'{"kind": "ta'
    assert len(JournalReader(journal.path).read()) == 2


def test_each_nodes_load_is_in_the_record_once() -> None:
    reports = [
        {"step": 3, "time_ms": 5, "train/loss": 1.0, "node": {"address": "10.0.0.1", "cpu_percent": 40.0}},
        {"step": 3, "time_ms": 6, "node": {"address": "10.0.0.2", "cpu_percent": 10.0}},
        {"step": 3, "time_ms": 7, "node": {"address": "10.0.0.1", "cpu_percent": 60.0}},
    ]
    assert by_node(reports) == {"node/10.0.0.1/cpu_percent": 60.0, "node/10.0.0.2/cpu_percent": 10.0}
    (record,) = records_of({**reports[0], **by_node(reports)})
    assert record["metrics"] == {"train/loss": 1.0, **by_node(reports)}
    assert by_node([{"step": 3, "time_ms": 5}]) == {}
