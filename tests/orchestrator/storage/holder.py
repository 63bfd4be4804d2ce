"""A process that holds a lease: `python -m tests.orchestrator.storage.holder URI LEASE_S RENEW_S HOLD_S`.

Prints `ready` once it could begin, waits for a line, and prints `in` and `out`, or `held`.
"""

import sys
import time

from orchestrator.storage import object_store
from orchestrator.storage.lease import hold_lease
from orchestrator.storage.lock import HeldError


def main() -> None:
    uri, lease_s, renew_s, hold_s = sys.argv[1], *map(float, sys.argv[2:])
    object_store.client()
    say("ready")
    sys.stdin.readline()
    try:
        with hold_lease(uri, what="testing", lease_s=lease_s, renew_s=renew_s) as lease:
            say("in")
            time.sleep(hold_s)
            lease.check()
            say("out")
    except HeldError:
        say("held")


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
