"""Signals that ask a program to stop: a flag in training, an exception everywhere else."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from tlearn.errors import StoppedBySignalError

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

Handler = Callable[[int, FrameType | None], None]
"""Or `signal.SIG_DFL`: end at once."""


@contextmanager
def handled_by(handler: Handler | signal.Handlers) -> Iterator[None]:
    """Inside, `handler` takes the signals that ask to stop; the handlers of before come back at the end."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    # elsewhere (a notebook's worker thread, say) Python can set no handlers
    before = {number: signal.signal(number, handler) for number in (STOPPING if in_main_thread else ())}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def stop(number: int, frame: FrameType | None) -> None:
    """Outside of training: end at once; whatever is under way can be started again.

    Raises:
        StoppedBySignalError: always.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the tidying up
    name = signal.Signals(number).name
    raise StoppedBySignalError(f"stopped by {name}; start the same command again to go on", name)


class StopFlag:
    """Set by a signal, read at step boundaries. A SIGINT after that leaves at once, by KeyboardInterrupt.

    Not within SAME_S: a terminal and a launcher both pass on the one Ctrl-C.
    """

    SAME_S = 2.0

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def error(self) -> StoppedBySignalError:
        """What to raise once all processes know of it."""
        return StoppedBySignalError(f"stopped by {self.signal or 'a signal to another process'}", self.signal)

    def set(self, number: int, frame: FrameType | None) -> None:
        """The handler: no collective and no file access in here, only the flag."""
        now = time.monotonic()
        if self.signal is None or (self.signal, number) == ("SIGUSR2", signal.SIGTERM):  # not "again" but "no more"
            self.signal, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > self.SAME_S:
            raise KeyboardInterrupt
