"""Memory of a benchmark's process."""

from pathlib import Path


def peak_mib() -> float:
    """Peak resident memory of this program alone, MiB; ru_maxrss would begin with what its parent held when it was started."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
