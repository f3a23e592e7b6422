"""Processes that work for this one and do not outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import connection
from typing import TypeVar

_CHUNK = 16  # items per message to a worker

T = TypeVar("T")
R = TypeVar("R")


def on_all_cores(function: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """`map` in worker processes, in order. A bounded number of items is under way at any time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(items) < 2 * _CHUNK or cores == 1:
        yield from map(function, items)
        return
    # not fork: this process may hold torch's or a progress bar's threads
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(cores, mp_context=context, initializer=serve)
    try:
        rest = iter(items)
        while block := list(islice(rest, cores * _CHUNK * 16)):
            yield from pool.map(function, block, chunksize=_CHUNK)
    finally:
        # also when a signal or an error ends the loop: what is not begun is dropped
        pool.shutdown(cancel_futures=True)


def serve() -> None:
    """In a worker: leave signals to the process that started it, and end when that is gone, however it ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
