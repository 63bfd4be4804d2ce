"""boto3 operations that pyarrow's S3 lacks: preflight check, conditional put, an object's age, removal of stale uploads."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

from workloads.errors import DataError
from workloads.storage.filesystems import CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S

QUICK_TIMEOUT_S = 10.0
"""The longest that one `quick` request takes, which is not repeated."""


def split_s3(uri: str) -> tuple[str, str]:
    """`s3://bucket/some/prefix` → (bucket, some/prefix).

    Raises:
        DataError: not an S3 URI with a bucket.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.strip("/").partition("/")
    if scheme != "s3" or not bucket:
        raise DataError(f"{uri}: not an S3 URI; give s3://bucket/prefix")
    return bucket, key


def client(*, quick: bool = False) -> Any:
    """A boto3 client configured by the environment, as pyarrow's is; with `quick`, a request is short and not repeated."""
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    return _client(environment, quick)


@lru_cache(maxsize=8)
def _client(_: tuple[tuple[str, str], ...], quick: bool) -> Any:
    import boto3
    from botocore.config import Config

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    style = "path" if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") else "auto"
    settings = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=QUICK_TIMEOUT_S - CONNECT_TIMEOUT_S if quick else REQUEST_TIMEOUT_S,
        retries={"mode": "standard", "max_attempts": 1 if quick else 3},
        s3={"addressing_style": style},
    )
    # Not boto3's default session, which stores the first credentials that it saw.
    return boto3.session.Session().client("s3", region_name=region, config=settings)


def preflight(uri: str) -> None:
    """Write and delete a small object below `uri`, before work starts.

    Raises:
        DataError: the bucket cannot be used; the message says which of endpoint, credentials and bucket to correct.
    """
    bucket, prefix = split_s3(uri)
    probe = f"{prefix}/_preflight-{uuid.uuid4().hex}".lstrip("/")
    with _explained(uri):
        s3 = client()
        s3.put_object(Bucket=bucket, Key=probe, Body=b"")
        s3.delete_object(Bucket=bucket, Key=probe)


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn boto3's errors into a `DataError` of one sentence."""
    from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError, NoCredentialsError

    try:
        yield
    except NoCredentialsError:
        raise DataError(f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except EndpointConnectionError as error:
        raise DataError(f"{uri}: the service does not answer ({error}); check AWS_ENDPOINT_URL") from None
    except ClientError as error:
        raise DataError(f"{uri}: {_advice(error)}") from None
    except BotoCoreError as error:
        raise DataError(f"{uri}: cannot be used ({error}); check AWS_ENDPOINT_URL and credentials") from None


def _advice(error: Any) -> str:
    match _code(error):
        case "NoSuchBucket" | "404":
            return "the bucket does not exist; create it or correct the URI"
        case "SignatureDoesNotMatch" | "InvalidAccessKeyId" | "403":
            return "the credentials are refused; correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        case "AccessDenied":
            return "access is denied; the credentials need permission to write to this bucket"
        case code:
            return f"the service refuses with {code} ({error})"


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write an object unless it exists; returns whether it was written. Of several writers exactly one succeeds.

    OpenStack Swift checks and writes in two steps. There several that write at the same moment may all succeed, and the last
    one's object stays.

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


def put_object(uri: str, data: bytes, *, quick: bool = False) -> None:
    """Write an object.

    Raises:
        DataError: the service cannot be used.
    """
    bucket, key = split_s3(uri)
    with _explained(uri):
        client(quick=quick).put_object(Bucket=bucket, Key=key, Body=data)


def get_object(uri: str, *, quick: bool = False) -> bytes | None:
    """An object's bytes, or None if it does not exist.

    Raises:
        DataError: the service cannot be used.
    """
    found = get_with_age(uri, quick=quick)
    return None if found is None else found[0]


def get_with_age(uri: str, *, quick: bool = False) -> tuple[bytes, float] | None:
    """An object's bytes, and the seconds since it was written by the service's own clock; None if it does not exist.

    Raises:
        DataError: the service cannot be used.
    """
    from botocore.exceptions import ClientError

    bucket, key = split_s3(uri)
    with _explained(uri):
        try:
            answer = client(quick=quick).get_object(Bucket=bucket, Key=key)
            sent = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(sent) if sent else answer["LastModified"]
            return answer["Body"].read(), max(0.0, (now - answer["LastModified"]).total_seconds())
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                return None
            raise


def list_names(uri: str) -> list[str]:
    """The names of the objects directly below `uri`.

    Raises:
        DataError: the service cannot be used.
    """
    bucket, prefix = split_s3(uri)
    with _explained(uri):
        answer = client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/")
    return [item["Key"].rpartition("/")[2] for item in answer.get("Contents", [])]


def delete_object(uri: str, *, quick: bool = False) -> None:
    """Delete an object if it exists.

    Raises:
        DataError: the service cannot be used.
    """
    bucket, key = split_s3(uri)
    with _explained(uri):
        client(quick=quick).delete_object(Bucket=bucket, Key=key)


def abort_stale_uploads(uri: str, *, older_than_s: float = 86_400.0) -> int:
    """Abort unfinished multipart uploads below `uri`, which occupy storage that no listing shows; returns how many.

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
