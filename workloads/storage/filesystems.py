"""Opens local paths and `s3://` URIs: `resolve_uri`, `read_bytes`, `atomic_write`, and `with_retries` for outages."""

import io
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.arrow import ArrowFSWrapper

from workloads.errors import DataError

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
ATTEMPTS = 6
"""Attempts of one read before it fails; with the waits between them they span about 15 s of outage."""
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 8.0

# Errors that another attempt would meet again: wrong credentials, no such bucket or key, a request that S3 rejects.
_FINAL = re.compile(
    r"HTTP status 40[0134]|ACCESS_DENIED|NO_SUCH_(BUCKET|KEY)|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH"
    r"|RESOURCE_NOT_FOUND|Path does not exist|Not a regular file|[Cc]ould ?n.t resolve host",
)


def resolve_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system, and the path within it, of a local path or a URI (`s3://bucket/prefix`).

    S3 takes its endpoint, region and credentials from the usual environment: AWS_ENDPOINT_URL, AWS_REGION,
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the machine's role.

    Raises:
        DataError: the URI's scheme is unknown.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    if scheme == "s3":
        if not rest.strip("/"):
            raise DataError(f"{uri}: names no bucket; give s3://bucket/prefix")
        return s3_filesystem(), rest.rstrip("/")
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{uri}: cannot be opened ({error}); give a folder or an s3:// URI") from None
    return filesystem, path.rstrip("/")


def s3_filesystem() -> pafs.S3FileSystem:
    """pyarrow's S3 file system, configured by the environment, with timeouts; one connection pool per configuration."""
    register_with_fsspec()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    # The credentials are part of the cache's key only so that a change of the environment creates a new client.
    return _s3_filesystem(endpoint, region, tuple(os.environ.get(name) for name in _CREDENTIALS))


_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@lru_cache(maxsize=4)
def _s3_filesystem(endpoint: str | None, region: str, credentials: tuple[str | None, ...]) -> pafs.S3FileSystem:
    options: dict[str, Any] = {}
    if endpoint:
        options = {"endpoint_override": endpoint, "scheme": endpoint.partition("://")[0] or "https"}
    return pafs.S3FileSystem(
        region=region,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=2),  # the rest is `with_retries`
        **options,
    )


# pyarrow's messages for a store that is down, overloaded or cut off.
_OUTAGE = re.compile(
    r"HTTP status 5\d\d|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|curlCode|"
    r"[Cc]onnection|[Tt]imed? ?out",
)


def is_outage(error: BaseException) -> bool:
    """Whether the store did not answer, so that a later attempt may succeed; damaged data is no outage."""
    return isinstance(error, OSError) and not is_final(error) and _OUTAGE.search(str(error)) is not None


def is_final(error: BaseException) -> bool:
    """Whether another attempt would fail with the same error: no such file or host, no permission."""
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return True
    return not isinstance(error, OSError) or _FINAL.search(str(error)) is not None


def with_retries(operation: Callable[[], T], *, attempts: int = ATTEMPTS) -> T:
    """Call `operation`; on 5xx, timeouts and cut connections call it again, after growing, jittered waits.

    Raises:
        OSError: of the last attempt, or the first one that is final (403, 404, no such host).
    """
    for attempt in range(1, attempts + 1):
        try:
            return operation()
        except OSError as error:
            if attempt == attempts or is_final(error):
                raise
            time.sleep(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def read_bytes(filesystem: pafs.FileSystem, path: str, *, attempts: int = ATTEMPTS) -> bytes:
    """Read one file, with retries on S3."""

    def read() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return stream.read()

    return with_retries(read, attempts=attempts if isinstance(filesystem, pafs.S3FileSystem) else 1)


PARTIAL = ".partial-"
"""Part of the name of a file that is being written, or that a killed process did not finish."""
_BUFFERED_BYTES = 16 << 20


@contextmanager
def atomic_write(filesystem: pafs.FileSystem, path: str, *, attempts: int = ATTEMPTS) -> Iterator[BinaryIO]:
    """Open `path` for writing; after the block it exists with all that was written, after an error it is as before.

    Locally the file is written beside its place, synced to the disk and renamed; missing folders are created. In an object
    store the object appears when the block ends: one of up to 16 MiB is uploaded then, with retries; a larger one is
    streamed, and removed again if the block raises (so give a large one a name that nothing reads before it is complete).

    Args:
        attempts: tries of the upload of a small object.

    Raises:
        OSError: the file or object cannot be written.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        with _replaced(path) as file:
            yield file
        return
    upload = _Upload(filesystem, path)
    try:
        yield cast(BinaryIO, upload)
    except BaseException:
        upload.abandon()
        raise
    upload.complete(attempts)


@contextmanager
def _replaced(path: str) -> Iterator[BinaryIO]:
    """A local file that replaces `path` when the block ends."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    partial = f"{path}{PARTIAL}{uuid.uuid4().hex[:12]}"  # no process on any machine that shares the disk has the same
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    with suppress(OSError):  # some network file systems do not sync folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Upload(io.RawIOBase):
    """An object that is being written: in memory while it is small, because pyarrow cannot abandon an open upload."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem, self._path = filesystem, path
        self._buffer = io.BytesIO()
        self._stream: pa.NativeFile | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._stream is None and self._buffer.tell() + view.nbytes > _BUFFERED_BYTES:
            self._stream = self._filesystem.open_output_stream(self._path)
            self._stream.write(self._buffer.getbuffer())
        (self._buffer if self._stream is None else self._stream).write(view)
        return view.nbytes

    def complete(self, attempts: int) -> None:
        """Make the object visible."""
        if self._stream is not None:
            self._stream.close()
            return

        def put() -> None:
            with self._filesystem.open_output_stream(self._path) as stream:
                stream.write(self._buffer.getbuffer())

        with_retries(put, attempts=attempts)

    def abandon(self) -> None:
        """Leave no object; one that was streamed in part is closed and deleted."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.close()
                self._filesystem.delete_file(self._path)


class ArrowS3(ArrowFSWrapper):
    """pyarrow's S3 for fsspec, so that one client and one configuration serve the process, without s3fs."""

    protocol = ("s3", "s3a")
    root_marker = ""

    def __init__(self, **_: Any) -> None:
        super().__init__(fs=s3_filesystem())

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(item) for item in path]
        return re.sub(r"^s3a?://", "", str(path)).rstrip("/")


def register_with_fsspec() -> None:
    """Register pyarrow's S3 for `s3://` with fsspec, and so for pandas, datasets and Ray in this process."""
    for scheme in ArrowS3.protocol:
        fsspec.register_implementation(scheme, ArrowS3, clobber=True)
