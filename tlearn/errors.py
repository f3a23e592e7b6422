"""What tlearn raises on purpose."""


class TlearnError(ValueError):
    """Bad input or configuration: the message names the file or key and the way to mend it (exit code 2)."""


class DivergedError(RuntimeError):
    """Training produces nothing but non-finite gradients (exit code 1)."""


class StoppedBySignalError(Exception):
    """A signal asked the run to stop; everything is saved and `--resume auto` goes on from there (exit code 75)."""
