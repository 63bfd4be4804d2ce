"""What pyarrow's S3 cannot do, by boto3: ask before work starts, write only if nobody has, lock, and clean up."""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from workloads.errors import DataError
from workloads.storage.filesystems import CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S

LOCK_TTL_S = 20.0
"""A lock that was not renewed for so long belongs to a process that died."""


class HeldError(DataError):
    """Another process holds a lock; the message says what it does."""


def split_s3(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/prefix` → (bucket, some/prefix).

    Raises:
        DataError: not an S3 URI with a bucket.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.strip("/").partition("/")
    if scheme != "s3" or not bucket:
        raise DataError(f"{uri}: is no S3 URI; give s3://bucket/prefix")
    return bucket, key


def client() -> Any:
    """A boto3 client configured by the environment, as pyarrow's is, with bounded retries and waits."""
    return _client(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))


@lru_cache(maxsize=4)
def _client(_: tuple[tuple[str, str], ...]) -> Any:
    import boto3
    from botocore.config import Config

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    style = "path" if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") else "auto"
    settings = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=REQUEST_TIMEOUT_S,
        retries={"mode": "standard", "max_attempts": 3},
        s3={"addressing_style": style},
    )
    # A session of its own: boto3's default one keeps the first credentials it saw.
    return boto3.session.Session().client("s3", region_name=region, config=settings)


def preflight(uri: str) -> None:
    """See that the bucket is there and may be written to, before work starts.

    Raises:
        DataError: it is not; the message says which of address, credentials and bucket to mend.
    """
    bucket, prefix = split_s3(uri)
    probe = f"{prefix}/_preflight-{uuid.uuid4().hex}".lstrip("/")
    with _explained(uri):
        s3 = client()
        s3.put_object(Bucket=bucket, Key=probe, Body=b"")
        s3.delete_object(Bucket=bucket, Key=probe)


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what boto3 raises into one sentence."""
    from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, NoCredentialsError

    try:
        yield
    except NoCredentialsError:
        raise DataError(f"{uri}: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except EndpointConnectionError as error:
        raise DataError(f"{uri}: the service does not answer ({error}); mend AWS_ENDPOINT_URL") from None
    except ClientError as error:
        raise DataError(f"{uri}: {_advice(error)}") from None
    except BotoCoreError as error:
        raise DataError(f"{uri}: cannot be used ({error}); check AWS_ENDPOINT_URL and credentials") from None


def _advice(error: Any) -> str:
    match _code(error):
        case "NoSuchBucket" | "404":
            return "the bucket does not exist; make it or mend the URI"
        case "SignatureDoesNotMatch" | "InvalidAccessKeyId" | "403":
            return "the credentials are refused; mend AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case "AccessDenied":
            return "access is denied; ask for the right to write to this bucket"
        case code:
            return f"the service refuses with {code} ({error})"


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write an object unless there is one; returns whether it was written. Of several writers one wins.

    Raises:
        DataError: the service cannot be used.
    """
    from botocore.exceptions import ClientError

    bucket, key = split_s3(uri)
    with _explained(uri):
        try:
            client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except ClientError as error:
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                return False
            raise


def get_object(uri: str) -> bytes | None:
    """An object's bytes, or None where there is none.

    Raises:
        DataError: the service cannot be used.
    """
    from botocore.exceptions import ClientError

    bucket, key = split_s3(uri)
    with _explained(uri):
        try:
            return client().get_object(Bucket=bucket, Key=key)["Body"].read()
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                return None
            raise


def abort_stale_uploads(uri: str, *, older_than_s: float = 86_400.0) -> int:
    """Abort multipart uploads below `uri` that nobody finished, which cost storage unseen; returns how many.

    Raises:
        DataError: the service cannot be used.
    """
    bucket, prefix = split_s3(uri)
    oldest = datetime.now(UTC) - timedelta(seconds=older_than_s)
    aborted = 0
    with _explained(uri):
        s3 = client()
        for page in s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", []):
                if upload["Initiated"] <= oldest:
                    s3.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                    aborted += 1
    return aborted


@contextlib.contextmanager
def lock(uri: str, *, what: str, ttl_s: float = LOCK_TTL_S) -> Iterator[None]:
    """Hold the object at `uri` as a lock, renewed while the context lasts; one of a dead process is taken over.

    Raises:
        HeldError: somebody else holds it; `what` tells what they are doing.
    """
    token = uuid.uuid4().hex
    _acquire(uri, token, what, ttl_s)
    stop = threading.Event()
    renewer = threading.Thread(target=_renew, args=(uri, token, ttl_s, stop), name="s3-lock", daemon=True)
    renewer.start()
    try:
        yield
    finally:
        stop.set()
        renewer.join(REQUEST_TIMEOUT_S)
        if _token(uri) == token:
            _delete(uri)


def _acquire(uri: str, token: str, what: str, ttl_s: float) -> None:
    for _ in range(3):
        if put_if_absent(uri, _lock_body(token)):
            return
        held = get_object(uri)
        age_s = time.time() - (json.loads(held)["renewed"] if held else 0)
        if held and age_s < ttl_s:
            raise HeldError(
                f"{uri}: another process is {what} (seen {age_s:.0f} s ago); wait for it, "
                f"or {ttl_s:.0f} s after it died"
            )
        # Only the lock that was looked at may go: somebody may have taken over in between.
        if held and _token(uri) == json.loads(held)["token"]:
            _delete(uri)
    raise HeldError(f"{uri}: several processes want this lock at once; give the command again")


def _renew(uri: str, token: str, ttl_s: float, stop: threading.Event) -> None:
    bucket, key = split_s3(uri)
    while not stop.wait(ttl_s / 4):
        with contextlib.suppress(DataError), _explained(uri):
            if _token(uri) != token:
                return
            client().put_object(Bucket=bucket, Key=key, Body=_lock_body(token))


def _lock_body(token: str) -> bytes:
    return json.dumps({"token": token, "renewed": time.time()}).encode()


def _token(uri: str) -> str | None:
    body = get_object(uri)
    return json.loads(body)["token"] if body else None


def _delete(uri: str) -> None:
    bucket, key = split_s3(uri)
    with _explained(uri):
        client().delete_object(Bucket=bucket, Key=key)
