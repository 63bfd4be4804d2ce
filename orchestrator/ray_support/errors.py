"""Finds the cause inside an error that Ray raises (`worker_cause`), and reduces an error to one line (`sentence`)."""

from orchestrator.ray_support.private import inner_exception

_TRACEBACK = "Traceback (most recent call last)"


def worker_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, out of Ray's wrappers; `error` itself if no worker did.

    Of several workers' exceptions this project's own comes first, then the death of a worker: one rank's fault makes the
    others lose their connection.
    """
    failures = getattr(error, "worker_failures", None) or {}
    causes = [inner_exception(failure) for _, failure in sorted(failures.items())]
    own = [cause for cause in causes if type(cause).__module__.startswith("workloads")]
    died = [cause for cause in causes if type(cause).__module__.startswith("ray.")]
    return (own or died or causes or [getattr(error, "controller_failure", None) or error])[0]


def sentence(error: BaseException) -> str:
    """An exception's message as one line; of one that Ray carried from another process, the original's.

    The first line, because what follows it is advice (CUDA), the statement (SQL) or internals (Ray); of a text that holds a
    traceback the last line, which is the exception.
    """
    original = getattr(error, "cause", None)
    if isinstance(original, BaseException):
        return sentence(original)
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if _TRACEBACK in text or died_at_birth(error) else lines[0]


def died_at_birth(error: BaseException) -> bool:
    """Whether an actor's own constructor raised: Ray then ends its message with that exception."""
    return "error raised in its creation task" in str(error)
