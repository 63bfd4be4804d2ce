"""The errors that are shown to the user as one sentence: `UserError` and its kinds, each with the exit code of the command."""


class UserError(Exception):
    """An error that the user can act on; the message is one sentence with the cause and the fix."""

    exit_code = 1
    """Exit code of a command that ends with this error."""


class RequestError(UserError):
    """The request cannot work; nothing was started."""

    exit_code = 2


class ConfigError(RequestError, ValueError):
    """A configuration is wrong; the message names the dotted key and the fix."""


class DataError(RequestError):
    """A dataset is missing or damaged; the message names the file or row and the fix."""


class StoreUnavailableError(DataError):
    """The store did not answer within the time limit of a read; a later try may succeed."""

    exit_code = 1


class RunFailedError(UserError):
    """Work that was started has failed; the message gives the reason."""


class RunStoppedError(UserError):
    """The run ended because it was asked to; the message gives the step, and how to continue."""
