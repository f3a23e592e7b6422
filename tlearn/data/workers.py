"""Processes that work for this one and do not outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection
from types import ModuleType
from typing import TypeVar

_CHUNK = 16  # items per message to a worker

no_fork = threading.Lock()
"""Held by threads of ours that must not run while a process is forked: a child in which a lock of theirs is taken for
ever can hang (Python before 3.12)."""

T = TypeVar("T")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(function: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """`map` in worker processes, in order. A bounded number of items is under way at any time."""
    cores = available_cores()
    if len(items) < 2 * _CHUNK or cores == 1:
        yield from map(function, items)
        return
    # not fork: this process may hold torch's or a progress bar's threads
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(cores, mp_context=context, initializer=serve)
    try:
        rest = iter(items)
        while block := list(islice(rest, cores * _CHUNK * 16)):
            with main_hidden():
                results = pool.map(function, block, chunksize=_CHUNK)
            yield from results
    finally:
        # also when a signal or an error ends the loop: what is not begun is dropped
        pool.shutdown(cancel_futures=True)


@contextmanager
def main_hidden() -> Iterator[None]:
    """Inside, new processes do not import the program's main module.

    They need it for nothing, and a script that calls us outside of `if __name__ == "__main__"` would begin anew in
    every one of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def serve() -> None:
    """In a worker: leave signals to the process that started it, and end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
