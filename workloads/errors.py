"""Errors that are shown to a user as one sentence: `UserError` and its kinds, each with the exit code of the command."""


class UserError(Exception):
    """Something that the user can act on; the message is one sentence that says what and how to mend it."""

    exit_code = 1
    """Of the command that ends with this error."""


class RequestError(UserError):
    """The request cannot work; nothing was started."""

    exit_code = 2


class ConfigError(RequestError, ValueError):
    """A configuration is wrong; the message names the dotted key and how to mend it."""


class DataError(RequestError):
    """The data is not what it should be; the message names the file or row and how to mend it."""


class StoreUnavailableError(DataError):
    """The store did not answer for as long as one read may take; a later try may succeed."""

    exit_code = 1


class RunFailedError(UserError):
    """Work that was started could not be finished; the message says why in one sentence."""


class RunStoppedError(UserError):
    """The work ended because it was requested to; the message says at which step, and how to continue."""
