"""A real S3 service on loopback, OpenStack Swift with s3api in an environment of its own, and a proxy that fails on demand."""

import contextlib
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.swift import KINDS, REQUIREMENTS, configure, home, make_environment, server_environment

ACCESS_KEY, SECRET_KEY = "test:tester", "testing"


def made_environment(place: Path, *requirements: str) -> Path:
    """The Python of a virtual environment with `requirements`, made on first use; skips the test where it cannot be made."""
    try:
        return make_environment(place, *requirements)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"the environment in {place} cannot be made: {error}")


def peer_environment(name: str, *requirements: str) -> Path:
    """The Python of an environment of this checkout with another tool, made on first use."""
    place = Path(os.environ.get("TEST_PEERS") or Path(__file__).parents[2] / "build" / "peers") / name
    return made_environment(place, *requirements)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class S3Peer:
    """A running service."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, *, secret: str = SECRET_KEY, endpoint: str | None = None) -> dict[str, str]:
        """What a client's environment needs."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def run_s3_peer(folder: Path) -> Iterator[S3Peer]:
    """Swift's four servers, as long as the context lasts."""
    python = made_environment(home(), *REQUIREMENTS)
    ports = {kind: free_port() for kind in KINDS}
    commands = configure(folder, python, ports=ports, access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    environment = {**os.environ, **server_environment()}
    processes = []
    try:
        for kind, command in commands.items():
            with (folder / f"{kind}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        _wait(ports["proxy"], processes, folder)
        yield S3Peer(ports["proxy"])
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


def _wait(port: int, processes: list[subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=2).read()
            return
        time.sleep(0.1)
    logs = "\n".join(path.read_text()[-800:] for path in folder.glob("*.log"))
    pytest.fail(f"the S3 peer did not start:\n{logs}")


class FaultyProxy:
    """Stands before the service and fails as told; counts what it did."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.refuse = 0  # so many of the next requests are answered 503
        self.cut = 0  # so many of the next large bodies are cut in the middle
        self.delay_s = 0.0  # before each answer
        self.down = False  # connections are closed at once
        self.faults = 0
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self.down:
            self.faults += 1
            client.close()
            return
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._target)) as server:
            back = threading.Thread(target=self._answer, args=(server, client), daemon=True)
            back.start()
            while data := client.recv(65536):
                if self.down:
                    self.faults += 1
                    return
                if self.refuse > 0 and data.split(b" ", 1)[0] in (b"GET", b"HEAD", b"PUT", b"POST"):
                    self.refuse -= 1
                    self.faults += 1
                    client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    return
                server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            passed = 0
            while data := server.recv(16384):
                if self.delay_s and data.startswith(b"HTTP/1.1"):
                    time.sleep(self.delay_s)
                passed = 0 if data.startswith(b"HTTP/1.1") else passed + len(data)
                if self.cut > 0 and passed > 8000:
                    self.cut -= 1
                    self.faults += 1
                    client.sendall(data[: len(data) // 2])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def s3_peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Peer]:
    """The service, started once for all tests that ask for it."""
    with run_s3_peer(tmp_path_factory.mktemp("swift")) as peer:
        yield peer


@pytest.fixture
def faulty(s3_peer: S3Peer) -> Iterator[FaultyProxy]:
    """A way to the service that can be made to fail."""
    proxy = FaultyProxy(s3_peer.port)
    yield proxy
    proxy.close()
