"""Signals that ask to stop: a flag that a second, later SIGINT overrides."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tlearn.errors import StoppedBySignalError
from tlearn.signals import STOPPING, StopFlag, handled_by, stop


@pytest.mark.parametrize("number", STOPPING)
def test_outside_of_training_a_signal_ends_the_program(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignalError, match=f"stopped by {number.name}"), handled_by(stop):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", STOPPING)
def test_in_training_it_sets_a_flag(number: signal.Signals) -> None:
    flag = StopFlag()
    assert not flag
    with handled_by(flag.set):
        os.kill(os.getpid(), number)
    assert flag
    assert flag.signal == number.name


def test_one_ctrl_c_may_arrive_twice_and_a_later_one_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("tlearn.signals.time.monotonic", lambda: clock[0])
    flag = StopFlag()
    with handled_by(flag.set):
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1.0
        os.kill(os.getpid(), signal.SIGINT)  # a terminal and a launcher both pass it on
        clock[0] += 5.0
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert flag.signal == "SIGINT"


def test_no_handler_of_errors_swallows_the_request() -> None:
    def careless(work: Callable[[], None]) -> str:
        try:
            work()
        except Exception:
            return "swallowed"
        return "done"

    with pytest.raises(StoppedBySignalError), handled_by(stop):
        careless(lambda: os.kill(os.getpid(), signal.SIGTERM))
