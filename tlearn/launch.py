"""Several processes on this machine: what `--nproc N` starts.

Ranks are forked from a server that has imported torch and the rest once, so that N of them start as fast as one.
They end together: when one fails the others are ended, and when this process is gone so are they.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import connection
from types import FrameType
from typing import Any, NamedTuple

from tlearn.data.workers import available_cores, end_with_parent, main_hidden
from tlearn.errors import EXPECTED, RankFailedError, StoppedBySignalError, TlearnError, refused
from tlearn.rendezvous import LOOPBACK
from tlearn.signals import Handler, StopFlag, handled_by, stop

GRACE_S = 10.0
"""After one rank failed the others have this long to fail too before they are killed."""

STOPPED_GRACE_S = 120.0
"""As long the others have after one was stopped by a signal."""

_REPORT_CHARACTERS = 20_000


class _Report(NamedTuple):
    """What a rank's function came to."""

    result: Any = None
    error: BaseException | None = None
    at: float = 0.0
    """Seconds on the machine's clock, by which the first of several failures is told."""


class _Rank:
    """A process that was started, and the pipe on which it reports."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tlearn.run"])
        self.name = f"rank {environment['RANK']}"
        self.pipe, remote = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_run_rank, args=(function, tuple(arguments), dict(environment), remote), name=self.name
        )
        with main_hidden():
            self.process.start()
        remote.close()
        self.report: _Report | None = None

    def read(self) -> None:
        """Take the report; a rank that ended without one was killed."""
        try:
            # not simply `recv`: a loader worker that outlives its rank holds the other end, and there would be no end
            if not self.pipe.poll():
                raise EOFError
            self.report = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            how = self.process.exitcode or 0
            if how == -signal.SIGTERM:  # before it could handle signals
                self.report = _Report(error=StoppedBySignalError("stopped by SIGTERM; start the same command again"))
                return
            by = f"killed by {signal.Signals(-how).name}" if how < 0 else f"ended with exit code {how}"
            message = f"{self.name} (process {self.process.pid}) was {by}; the other ranks were ended"
            # before all others: they fail because this one is gone
            self.report = _Report(error=RankFailedError(message), at=0.0)


def run_ranks(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    nproc: int,
    started: Callable[[list[int]], None] | None = None,
) -> list[Any]:
    """Call `function(*arguments)` in `nproc` processes that find each other as torchrun's would.

    Args:
        function: of a module that every process can import, not of the program's main one.
        arguments: picklable, the same for every rank.
        nproc: processes.
        started: is told their ids, by rank.

    Returns:
        What it returned, by rank.

    Raises:
        RankFailedError: a rank was killed, or raised something unexpected: its own traceback, not the echo of others.
        TlearnError, DivergedError, StoppedBySignalError: what the first rank to fail raised.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // nproc))
    common = {
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": threads,
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME") or LOOPBACK,
    }
    ranks: list[_Rank] = []
    with handled_by(_forward_to(ranks, nproc)):
        try:
            for i in range(nproc):
                ranks.append(_Rank(function, arguments, {**common, "RANK": str(i), "LOCAL_RANK": str(i)}))
            if started is not None:
                started([rank.process.pid or 0 for rank in ranks])
            _wait(ranks)
        finally:
            for rank in ranks:
                if rank.report is None:
                    rank.process.kill()
                rank.process.join()
    failed = [rank.report for rank in ranks if rank.report is not None and rank.report.error is not None]
    if failed:
        error = min(failed, key=lambda report: report.at).error
        assert error is not None
        raise error
    return [rank.report.result for rank in ranks if rank.report is not None]


def _wait(ranks: Sequence[_Rank]) -> None:
    """Until every rank has reported, or until those that are left have had their time."""
    deadline: float | None = None
    while waiting := [rank for rank in ranks if rank.report is None]:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        handles = [handle for rank in waiting for handle in (rank.pipe, rank.process.sentinel)]
        ready = connection.wait(handles, timeout)
        if not ready:
            return
        for rank in waiting:
            if rank.pipe in ready or rank.process.sentinel in ready:
                rank.read()
                assert rank.report is not None
                error = rank.report.error
                if error is not None and deadline is None:
                    # ranks that were stopped have saved together; finishing may take rank 0 longer
                    stopped = isinstance(error, StoppedBySignalError)
                    deadline = time.monotonic() + (STOPPED_GRACE_S if stopped else GRACE_S)


def _forward_to(ranks: Sequence[_Rank], nproc: int) -> Handler:
    """Signals go to the ranks, which save and leave; this process waits for them, but not for ever."""
    first: list[float] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if len(ranks) < nproc:  # nothing is under way yet
            stop(number, frame)
        first.append(time.monotonic())
        if number == signal.SIGINT and first[-1] - first[0] > StopFlag.SAME_S:
            raise KeyboardInterrupt
        for rank in ranks:
            if rank.process.is_alive():
                # not as SIGINT: a terminal has sent them that already, and a second one means "at once"
                os.kill(rank.process.pid or 0, signal.SIGTERM if number == signal.SIGINT else number)

    return forward


def _run_rank(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], pipe: Any) -> None:
    os.environ.clear()  # the server's, which may have been started long ago
    os.environ.update(environment)
    end_with_parent()
    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # torch read the variable when the server imported it
    try:
        with handled_by(stop):
            report = _Report(result=function(*arguments))
    except EXPECTED as error:
        report = _Report(error=error, at=time.monotonic())
    except BaseException as error:
        at = time.monotonic()
        text = traceback.format_exc()[-_REPORT_CHARACTERS:]
        known = refused(error) or RankFailedError(f"rank {environment['RANK']} failed:\n{text}")
        report = _Report(error=known, at=at)
    pipe.send(report)
    pipe.close()
    # torch's process group would wait for ranks that are gone
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if report.error is None else 1)


_PORTS = range(20_000, 32_768)
"""Below those that Linux gives to connections of all kinds, which come in between until rank 0 listens."""


def _free_port() -> int:
    draw = random.SystemRandom()  # two launches at once shall not choose alike, whatever their seeds
    while True:
        port = draw.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def in_processes(function: str, nproc: int | None, *arguments: Any) -> Any:
    """What `module:function` returns here, or on rank 0 of `nproc` processes."""
    launched = os.environ.get("WORLD_SIZE")
    if nproc is not None and launched not in (None, str(nproc)):
        raise TlearnError(f"--nproc {nproc}: the launcher has started {launched} processes; make the two numbers equal")
    if nproc is not None and nproc > 1 and launched is None:
        return run_ranks(call, (function, *arguments), nproc)[0]
    try:
        result = call(function, *arguments)
    except KeyboardInterrupt:  # the second one: not even a write that is under way is waited for
        os._exit(128 + signal.SIGINT)
    if launched is not None:
        from tlearn.runtime import leave

        leave()
    return result


def call(function: str, *arguments: Any) -> Any:
    """Import `module:function` and call it. By name, so that this process need not import what only ranks use."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)(*arguments)
