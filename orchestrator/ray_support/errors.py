"""Finds the cause inside an error that Ray raises, and reduces it to one sentence."""


def worker_cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, out of Ray's wrappers; `error` itself if no worker did.

    Of several workers' exceptions the one that says most counts: one rank's fault makes the others lose their connection.
    """
    failures = getattr(error, "worker_failures", None) or {}
    causes = [_unwrapped(failure) for _, failure in sorted(failures.items())]
    own = [cause for cause in causes if type(cause).__module__.startswith("workloads")]
    died = [cause for cause in causes if type(cause).__module__.startswith("ray.")]
    return (own or died or causes or [getattr(error, "controller_failure", None) or error])[0]


def _unwrapped(failure: BaseException) -> BaseException:
    for name in ("_base_exc", "health_check_failure"):
        failure = getattr(failure, name, None) or failure
    return failure


def sentence(error: BaseException) -> str:
    """An exception's message as one line; of one that Ray carried from another process, the original's."""
    original = getattr(error, "cause", None)
    if isinstance(original, BaseException):
        return sentence(original)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Ray explains a death over many lines, the first of which says what died.
    return lines[0] if type(error).__module__.startswith("ray.") and not died_at_birth(error) else lines[-1]


def died_at_birth(error: BaseException) -> bool:
    """Whether an actor's own constructor raised: Ray then ends its message with that exception."""
    return "error raised in its creation task" in str(error)
