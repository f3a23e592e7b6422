"""Saving beside training: state is copied while the loop waits, and written by a thread while it goes on."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tlearn import checkpoint
from tlearn.checkpoint import Progress, State, Tensors, copied
from tlearn.config import Keep, SaveEvery
from tlearn.console import show
from tlearn.data.workers import no_fork
from tlearn.errors import TlearnError
from tlearn.tracking import Tracker

_REMEMBERED = 1000
"""Steps whose times are compared."""


class Saver:
    """Writes checkpoints and the weights of the best epochs, one after the other; the context ends after that.

    A write that fails is reported and training goes on: what was saved before is whole, and the next one may find room.

    Args:
        checkpoints, best: folders of the run.
        found: the checkpoint that the run goes on from.
        tracker: of the run; a checkpoint names how far its metrics were.
        every: when checkpoints are due.
        keep: how many stay.
        active: rank 0; on the others nothing is written.
    """

    def __init__(
        self,
        checkpoints: Path,
        best: Path,
        found: Path | None,
        tracker: Tracker,
        every: SaveEvery,
        keep: Keep,
        *,
        active: bool,
    ) -> None:
        self.checkpoints, self.best, self.tracker = checkpoints, best, tracker
        self.every, self.keep, self.active = every, keep, active
        self.cost = Cost()
        self._last = found
        self._saved_at = time.monotonic()
        self._unwritten: list[tuple[Tensors, Mapping[str, Any]]] = []
        self._shown: list[dict[str, Any]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver", initializer=_be_nice)
        self._writes: list[Future[None]] = []

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # who leaves at once leaves a half-written folder, which the next save removes
        self._thread.shutdown(wait=kind is not KeyboardInterrupt, cancel_futures=kind is KeyboardInterrupt)

    def is_due(self, progress: Progress, steps_per_epoch: int) -> bool:
        """By epochs or steps: the same on every rank."""
        epochs, into_epoch = divmod(progress.stage_step, steps_per_epoch)
        by_epochs = self.every.epochs is not None and into_epoch == 0 and epochs % self.every.epochs == 0
        return by_epochs or (self.every.steps is not None and progress.step % self.every.steps == 0)

    @property
    def is_due_by_clock(self) -> bool:
        """By rank 0's clock."""
        minutes = self.every.minutes
        return self.active and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, model: Tensors, optimizer: Tensors, progress: Progress) -> None:
        """Copy everything now, write a checkpoint of it beside what follows; waits for the one before."""
        if not self.active:
            return
        with _timed(self.cost.pauses_s):
            if error := self._finish():
                show(
                    f"WARNING: {self.checkpoints}: not saved: {error}; training goes on, earlier checkpoints are whole"
                )
            progress.wandb_id, progress.metrics_bytes = self.tracker.wandb_id, self.tracker.written()
            state = State(copied(model), copied(optimizer), deepcopy(progress))

            def write() -> None:
                with _timed(self.cost.writes_s):
                    self._write_weights(state.progress.best)  # which the checkpoint will name
                    self._last = checkpoint.save(self.checkpoints, state, self.keep.checkpoints, self._last)
                self._show_best(state.progress.best)

            self._begin(write)
        self._saved_at = time.monotonic()

    def keep_best(self, model: Tensors, best: list[dict[str, Any]], score: Mapping[str, Any]) -> None:
        """Write the weights that got this score if they are among the best, and show the best in their folder."""
        if not self.active or score not in best:
            return
        best = deepcopy(best)
        with _timed(self.cost.pauses_s):
            weights = copied(model)

        def write() -> None:
            self._unwritten.append((weights, score))  # not before: an earlier save that waits would pass over them
            self._write_weights(best)
            self._show_best(best)

        self._begin(write)

    def wait(self) -> Path | None:
        """Until everything is written; returns the newest checkpoint.

        Raises:
            TlearnError: it could not be.
        """
        if error := self._finish():
            raise TlearnError(f"{self.checkpoints}: not saved: {error}; mend that and start the same command again")
        return self._last

    def step_took(self, seconds: float) -> None:
        """Note the time of a training step."""
        self.cost.step_took(seconds, writing=self.is_writing)

    @property
    def is_writing(self) -> bool:
        """Whether something is not yet on the disk."""
        return any(not write.done() for write in self._writes)

    def _begin(self, write: Callable[[], None]) -> None:
        def run() -> None:
            with no_fork:
                write()

        self._writes.append(self._thread.submit(run))

    def _finish(self) -> BaseException | None:
        """Wait for what is being written; returns why the last of it failed, if a disk may be the reason."""
        errors = [write.exception() for write in self._writes]
        self._writes = []
        for error in errors:
            if error is not None and not isinstance(error, OSError | SafetensorError):
                raise error
        return errors[-1] if errors else None

    def _write_weights(self, best: list[dict[str, Any]]) -> None:
        while self._unwritten:  # more than one if the disk was full
            weights, score = self._unwritten[0]
            if score in best:
                checkpoint.save_best(self.checkpoints, weights, score)
            del self._unwritten[0]

    def _show_best(self, best: list[dict[str, Any]]) -> None:
        if best != self._shown:
            checkpoint.publish_best(self.checkpoints, self.best, best)
            self._shown = best


class Cost:
    """What saving costs: the pauses of the loop, the time to write, the slowdown of the steps beside that."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []
        self.writes_s: list[float] = []
        self.steps_s: dict[bool, deque[float]] = {beside: deque(maxlen=_REMEMBERED) for beside in (False, True)}
        self._was_writing = False

    def step_took(self, seconds: float, *, writing: bool) -> None:
        """Note the time of a training step, at the end of which something was being written or not."""
        self.steps_s[writing or self._was_writing].append(seconds)
        self._was_writing = writing

    def account(self) -> dict[str, float]:
        """Medians so far: the pause and the time to write, in s, and how many times as long as others the steps took
        beside which was written; what is not known yet is left out."""
        measures = {"save/pause_s": self.pauses_s, "save/write_s": self.writes_s}
        account = {name: round(statistics.median(values), 4) for name, values in measures.items() if values}
        if all(self.steps_s.values()):
            alone, beside = (statistics.median(self.steps_s[writing]) for writing in (False, True))
            account["save/slowdown"] = round(beside / alone, 3)
        return account


def _be_nice() -> None:
    if sys.platform == "linux":  # there a thread has a priority of its own; training comes first
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


@contextmanager
def _timed(into: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)
