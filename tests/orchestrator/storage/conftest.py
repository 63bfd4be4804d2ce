"""A real S3 service, a bucket of each test's own, and the datasets that the tests of `workloads.data` read."""

import pytest

from orchestrator.storage import object_store
from tests.s3_peer import S3Peer, faulty, s3_peer
from tests.workloads.data.conftest import dataset, folder

__all__ = ["dataset", "faulty", "folder", "s3_peer"]  # fixtures


def use(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def peer(s3_peer: S3Peer, monkeypatch: pytest.MonkeyPatch) -> S3Peer:
    use(monkeypatch, s3_peer.environment())
    return s3_peer


@pytest.fixture
def bucket(peer: S3Peer, request: pytest.FixtureRequest) -> str:
    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    object_store.client().create_bucket(Bucket=name)
    return name
