"""The journal delivers everything once, whatever the sink does."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from orchestrator.experiments.load import load_experiment
from orchestrator.ray_support.node_load import by_node
from orchestrator.runs.delivery import JournalDrain
from orchestrator.runs.identity import claim_run
from orchestrator.runs.journal import Journal, JournalReader, parse_journal
from orchestrator.runs.journal_access import open_journal, read_records
from orchestrator.runs.journal_archive import JournalArchive
from orchestrator.runs.records import ArtifactsRecord, FaultRecord, MetricsRecord, Record, TagsRecord
from orchestrator.storage.lock import Lock, LockLostError
from orchestrator.training.journal_callback import records_of


def metrics(step: int, **values: float) -> MetricsRecord:
    return MetricsRecord(step=step, time_ms=1_000 + step, metrics=values)


def numbered(n: int) -> MetricsRecord:
    return metrics(n, n=float(n))


def test_every_kind_of_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    records: list[Record] = [
        metrics(3, a=1.0),
        ArtifactsRecord(folder="artifacts/step_3", step=3, time_ms=7),
        TagsRecord(tags={"ray.job_id": "1"}, time_ms=8),
        TagsRecord(tags={"run.faults": "none"}),
        FaultRecord(command="c", failure={"kind": "worker", "saved_step": 4, "step": None}),
    ]
    journal = Journal(tmp_path / "journal.jsonl")
    for record in records:
        journal.append(record)
    assert JournalReader(journal.path).read() == records


def test_a_journal_of_an_earlier_version_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """Lines as e1283fa wrote them, and one of a kind that this version does not know."""
    lines = [
        '{"kind": "tags", "time_ms": 5, "tags": {"ray.job_id": "01"}}',
        '{"kind": "metrics", "step": 1, "time_ms": 6, "metrics": {"train/loss": NaN}}',
        '{"kind": "artifacts", "step": 1, "time_ms": 6, "folder": "artifacts/step_00000001"}',
        '{"kind": "fault", "command": "c", "failure": {"kind": "node", "reason": "r", "signature": "s", "step": 1, '
        '"saved_step": 0, "at_s": 1.5}}',
        '{"kind": "tags", "tags": {"run.faults": "node at step 1: r"}}',
        '{"kind": "unheard-of"}',
    ]
    records = parse_journal("\n".join(lines).encode(), source="run")
    assert [type(record) for record in records] == [TagsRecord, MetricsRecord, ArtifactsRecord, FaultRecord, TagsRecord]
    assert "unheard-of" in caplog.text


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
    assert sink.taken == [metrics(step, a=float(step)) for step in range(50)]


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
        MetricsRecord(step=3, time_ms=7, metrics={"train/loss": 1.5}),
        ArtifactsRecord(step=3, time_ms=7, folder="artifacts/step_3"),
    ]


def read_segments(storage: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(storage.iterdir()))


@contextlib.contextmanager
def archived(folder: Path, storage: Path) -> Iterator[JournalArchive]:
    archive = JournalArchive(folder / "journal.jsonl", LocalFileSystem(), str(storage), period_s=0.05)
    archive.start()
    yield archive
    archive.close()


def test_another_machine_continues_the_copy_in_the_storage(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    journal = Journal(first / "journal.jsonl")
    with archived(first, tmp_path / "storage") as archive:
        journal.append(numbered(1))
        archive.push()
        journal.append(numbered(2))
    assert len(list((tmp_path / "storage").iterdir())) >= 2
    with archived(second, tmp_path / "storage"):
        assert (second / "journal.jsonl").read_bytes() == journal.path.read_bytes()
        Journal(second / "journal.jsonl").append(numbered(3))
    with archived(first, tmp_path / "storage"):  # the first machine comes back, its copy out of date
        assert JournalReader(journal.path).read() == [numbered(1), numbered(2), numbered(3)]


def test_a_machine_that_comes_back_keeps_the_lines_it_had_not_archived(tmp_path: Path) -> None:
    first, second, storage = tmp_path / "first", tmp_path / "second", tmp_path / "storage"
    journal = Journal(first / "journal.jsonl")
    with archived(first, storage):
        journal.append(numbered(1))
    journal.append(numbered(2))  # the machine is lost before this is archived
    journal.append(TagsRecord(tags={"run.faults": "of the past"}))
    with archived(second, storage):
        Journal(second / "journal.jsonl").append(numbered(3))
    for _ in range(2):  # the second time there is nothing left to add
        with archived(first, storage):
            pass
        assert JournalReader(journal.path).read() == [numbered(1), numbered(3), numbered(2)]
        assert read_segments(storage) == journal.path.read_bytes()


def test_lines_that_the_storage_lacks_are_kept_and_copied(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with archived(tmp_path, tmp_path / "storage"):
        journal.append(numbered(1))
    journal.append(numbered(2))  # the process died before it was copied
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "me')  # and in the middle of the next line
    with archived(tmp_path, tmp_path / "storage"):
        pass
    assert journal.path.read_bytes() == read_segments(tmp_path / "storage") + b'{"kind": "me'
    assert len(JournalReader(journal.path).read()) == 2


def test_each_nodes_load_is_in_the_record_once() -> None:
    reports = [
        {"step": 3, "time_ms": 5, "train/loss": 1.0, "node": {"address": "10.0.0.1", "cpu_percent": 40.0}},
        {"step": 3, "time_ms": 6, "node": {"address": "10.0.0.2", "cpu_percent": 10.0}},
        {"step": 3, "time_ms": 7, "node": {"address": "10.0.0.1", "cpu_percent": 60.0}},
    ]
    assert by_node(reports) == {"node/10.0.0.1/cpu_percent": 60.0, "node/10.0.0.2/cpu_percent": 10.0}
    (record,) = records_of({**reports[0], **by_node(reports)})
    assert isinstance(record, MetricsRecord)
    assert record.metrics == {"train/loss": 1.0, **by_node(reports)}
    assert by_node([{"step": 3, "time_ms": 5}]) == {}


def test_the_journal_of_remote_storage_leaves_no_file_on_this_machine_once_it_is_all_archived(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`file://` stands for any storage that is not a plain local folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    storage = tmp_path / "storage"
    loaded = load_experiment(str(experiment), [f"storage.path=file://{storage}", "tracking.run_name=far"])
    run = claim_run(loaded, manifest_sha256="0" * 64)
    with open_journal(loaded, run, lock=Lock()) as path:
        Journal(path).append(numbered(1))
        assert path.is_file() and storage not in path.parents
    assert not path.parent.exists()
    assert read_records(loaded) == [numbered(1)]


class LostLock(Lock):
    def check(self) -> None:
        raise LockLostError("another process took over")


def test_a_process_that_lost_its_lock_copies_and_delivers_nothing(tmp_path: Path) -> None:
    journal, sink = Journal(tmp_path / "journal.jsonl"), FlakySink(failures=0)
    lock = LostLock()
    archive = JournalArchive(journal.path, LocalFileSystem(), str(tmp_path / "storage"), check=lock.check)
    archive.start()
    drain = JournalDrain(journal.path, sink, check=lock.check, poll_s=0.01)
    drain.start()
    journal.append(numbered(1))
    assert drain.close(timeout_s=0.0) == 1 and sink.taken == []
    assert not archive.close() and not (tmp_path / "storage").exists()


def test_a_record_that_the_disk_takes_only_in_part_is_an_error_and_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: real(descriptor, line[:10]))
        with pytest.raises(OSError, match="No space left"):
            journal.append(metrics(1, a=1.0))
    journal.append(metrics(2, a=2.0))
    assert JournalReader(journal.path).read() == [metrics(2, a=2.0)]
