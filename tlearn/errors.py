"""What tlearn raises on purpose, and the exit codes that these become."""

import errno


class TlearnError(ValueError):
    """Bad input or configuration: the message names the file or key and the way to mend it."""

    exit_code = 2


class NoGradientError(TlearnError):
    """Parameters that are to be trained have no way to the loss."""


class DivergedError(RuntimeError):
    """Training produces nothing but non-finite gradients."""

    exit_code = 1


class RankFailedError(RuntimeError):
    """One of several processes was killed or failed, or they no longer agree."""

    exit_code = 1


class StoppedBySignalError(BaseException):
    """A signal asked the run to stop; everything is saved and `--resume auto` goes on from there.

    Like KeyboardInterrupt no Exception: nothing that handles the errors of a broken file may swallow it.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later

    def __init__(self, message: str, signal: str | None = None) -> None:
        super().__init__(message)
        self.signal = signal
        """Its name; None: another process got it."""


EXPECTED = (TlearnError, DivergedError, RankFailedError, StoppedBySignalError)
"""These end the program with their message and their `exit_code`, without a traceback."""

_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def refused(error: BaseException) -> TlearnError | None:
    """What a file system refuses is for the user to mend: rights, a full or a read-only disk."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return TlearnError(f"{error.filename}: {error.strerror}")
    return None
