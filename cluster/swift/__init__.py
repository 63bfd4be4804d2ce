"""Sets up an S3 store: OpenStack Swift with its s3api, in a separate virtual environment, because its pins differ from ours.

It checks signatures, supports conditional writes, byte ranges and multipart uploads, and stores objects as files below one folder,
whose file system must have extended attributes. It has one copy of everything: use it for trials, not for data to keep.
"""

import getpass
import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = ("swift==2.38.3", "setuptools<81")
KINDS = ("account", "container", "object", "proxy")
"""Swift's four servers; clients connect to the proxy."""

_SERVER = Path(__file__).with_name("launch.py")


def home() -> Path:
    """Folder of this user's virtual environment with Swift."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "orchestrator", "swift-2.38.3")


def make_environment(home: Path, *requirements: str, timeout_s: float = 900.0) -> Path:
    """The Python of a virtual environment with `requirements`, which is created on first use.

    Raises:
        subprocess.SubprocessError, OSError: it cannot be created.
    """
    python, done = home / "bin" / "python", home / "ready"
    if not done.exists() or done.read_text() != " ".join(requirements):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, capture_output=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *requirements]
        subprocess.run(pip, check=True, capture_output=True, timeout=timeout_s)
        done.write_text(" ".join(requirements))
    return python


def configure(
    folder: Path,
    python: Path,
    *,
    ports: dict[str, int],
    access_key: str,
    secret_key: str,
    host: str = "127.0.0.1",
) -> dict[str, list[str]]:
    """Write the store's configuration into `folder`.

    Args:
        python: interpreter of an environment with `REQUIREMENTS`.
        ports: port of each of `KINDS`.
        access_key: ACCOUNT:USER, the form that Swift expects.
        host: address of the proxy; the servers behind it listen on loopback.

    Returns:
        Kind → command that runs the server in the foreground.
    """
    devices = folder / "devices"
    (devices / "d1").mkdir(parents=True, exist_ok=True)
    conf = folder / "swift.conf"
    conf.write_text(
        "[swift-hash]\nswift_hash_path_prefix = a\nswift_hash_path_suffix = b\n"
        "[storage-policy:0]\nname = one\ndefault = yes\n"
    )
    user = getpass.getuser()
    common = f"workers = 0\nuser = {user}\nswift_dir = {folder}\nlog_level = WARNING\n"
    for kind in KINDS[:-1]:
        (folder / f"{kind}.conf").write_text(
            f"[DEFAULT]\n{common}bind_ip = 127.0.0.1\nbind_port = {ports[kind]}\ndevices = {devices}\nmount_check = false\n"
            f"[pipeline:main]\npipeline = {kind}-server\n[app:{kind}-server]\nuse = egg:swift#{kind}\n"
        )
    rings = [f"{kind}={ports[kind]}" for kind in KINDS[:-1]]
    subprocess.run([str(python), str(_SERVER), "rings", str(folder), *rings], check=True, capture_output=True)
    proxy = folder / "proxy.conf"
    proxy.touch(mode=0o600)
    account, _, name = access_key.partition(":")
    proxy.write_text(
        _PROXY.format(common=common, host=host, port=ports["proxy"], user=f"{account}_{name}", secret=secret_key)
    )
    return {
        kind: [str(python), str(_SERVER), f"{kind}-server", str(folder / f"{kind}.conf"), str(conf)] for kind in KINDS
    }


def server_environment() -> dict[str, str]:
    """Environment variables of the servers."""
    return {
        "PYTHONPATH": str(_SERVER.parent),
        "PYTHONWARNINGS": "ignore",
    }  # the proxy's filter lies beside its launcher


_PROXY = """[DEFAULT]
{common}bind_ip = {host}
bind_port = {port}
[pipeline:main]
pipeline = catch_errors healthcheck cache listing_formats s3api tempauth bulk slo dlo versioned_writes copy proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
paste.filter_factory = launch:cache_filter
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret} .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
[filter:copy]
use = egg:swift#copy
"""
