"""The errors a user can cause, each with the exit code that `dpojax.main` gives it.

Every message names the field (or the file and line), the value, and the fix.
"""


class DpojaxError(Exception):
    """An error with a message meant for the user; `exit_code` is the process's."""

    exit_code = 1


class Interrupted(BaseException):  # not an error, and nothing that handles errors may swallow it
    """A signal asked the run to stop; what there was to save is saved. `exit_code` is the process's."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class ConfigError(DpojaxError, ValueError):
    """A setting, the command line, or a path that does not exist. Exit code 2."""

    exit_code = 2


class DataError(DpojaxError, ValueError):
    """The contents of a data file. Exit code 3."""

    exit_code = 3


class CheckpointError(DpojaxError):
    """A checkpoint that is damaged or belongs to another run. Exit code 4."""

    exit_code = 4


class FitError(DpojaxError):
    """The run does not fit the devices' memory. Exit code 6."""

    exit_code = 6


class NumericsError(DpojaxError):
    """Training produced non-finite numbers and stopped. Exit code 5."""

    exit_code = 5
