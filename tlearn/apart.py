"""`tlearn train` in processes of their own: measured, one after another or several at once. Imports no torch.

PLACE/seed-S/       the run folder
PLACE/seed-S.yaml   what was asked for, with the options of the command line
PLACE/seed-S.json   processes that worked on it: when, how long, how much memory
PLACE/seed-S.log    what they printed
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tlearn.config import Config
from tlearn.configfile import differing_keys, dump_config, load_config
from tlearn.console import show
from tlearn.data.prepare import open_or_prepare
from tlearn.data.workers import available_cores
from tlearn.errors import StoppedBySignalError, TlearnError
from tlearn.files import write_json, write_text
from tlearn.signals import handled_by

_LAST_LINES = 12
"""Shown of a run that fails."""

_LOOK_AGAIN_S = 0.05

_PR_SET_PDEATHSIG = 1

Attempt = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One recipe with one seed."""

    name: str
    seed: int
    config: Config
    folder: Path

    def beside(self, suffix: str) -> Path:
        """A file next to the run folder."""
        return self.folder.with_name(f"{self.folder.name}{suffix}")

    @property
    def is_finished(self) -> bool:
        """Whether its run has ended well."""
        return (self.folder / "result.json").is_file()

    def result(self) -> dict[str, Any]:
        """Of a finished run."""
        content: dict[str, Any] = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        return content

    def outcome(self) -> str:
        """Of a finished run, in words."""
        result = self.result()
        return f"val/top1@{result['image_size_px']} {result['val']['top1']:.1%}"

    def attempts(self) -> list[Attempt]:
        """The processes that worked on it; one whose end nobody saw ended with its last sign of life."""
        file = self.beside(".json")
        attempts: list[Attempt] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        if attempts and attempts[-1]["wall_s"] is None:
            signs = (self.beside(".log"), self.folder / "metrics.jsonl", self.folder / "result.json")
            last = max((sign.stat().st_mtime for sign in signs if sign.exists()), default=0.0)
            attempts[-1]["wall_s"] = round(max(0.0, last - attempts[-1]["started_at"]), 3)
        return attempts

    def check_folder(self) -> None:
        """Raise where something else lies in its place.

        Raises:
            TlearnError: a run with other options, or one that was not started from here.
        """
        asked = self.beside(".yaml")
        if asked.is_file() and (changes := differing_keys(load_config(asked), self.config)):
            raise TlearnError(
                "\n  ".join([f"{self.folder}: holds a run with other options; use a new --out:", *changes])
            )
        if not asked.is_file() and self.folder.exists():
            raise TlearnError(f"{self.folder}: is a run that was not begun by this command; use a new --out")

    def note_what_is_asked(self) -> None:
        """Before it begins."""
        if not self.beside(".yaml").is_file():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.beside(".yaml"), dump_config(self.config))


def check_not_launched(command: str) -> None:
    """Raise under a launcher, where every process would start all runs.

    Raises:
        TlearnError: torchrun or the like has started this process.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise TlearnError(f"{command} starts its runs itself; call it without a launcher")


def check_same_images(recipes: Sequence[tuple[str, Config]]) -> None:
    """Before hours are spent; the runs' own records are compared as well, at the end.

    Args:
        recipes: names and configs.

    Raises:
        TlearnError: two that do not train and validate on the same images.
    """
    first: tuple[str, dict[str, Any]] | None = None
    for name, config in recipes:
        data = config.data
        if data.reader == "indexed":
            images = {"fingerprint": open_or_prepare(data.path).fingerprint}
        else:
            images = {"path": data.path, "stream": str(data.stream)}
        seen: dict[str, Any] = images | {"max_train": data.max_train, "max_val": data.max_val}
        first = first or (name, seen)
        different = [key for key in seen | first[1] if seen.get(key) != first[1].get(key)]
        if different:
            raise TlearnError(
                f"{first[0]} and {name} do not see the same images: {', '.join(different)} of their data differ; "
                "name them once for all, data.path=DATA"
            )


def machine_of(done: Sequence[Job]) -> str:
    """On which finished runs were done."""
    names = {json.loads((j.folder / "environment.json").read_text(encoding="utf-8"))["device"] for j in done}
    return " and ".join(sorted(f"{available_cores()} CPU cores" if name == "cpu" else name for name in names))


class _Process:
    """A job's process, from its start to its end."""

    def __init__(self, job: Job, nproc: int, slot: int, at_once: int) -> None:
        self.job, self.nproc, self.slot = job, nproc, slot
        command = [sys.executable, "-m", "tlearn", "train", str(job.beside(".yaml")), "--run", str(job.folder)]
        self._earlier = job.attempts()
        self._attempt: Attempt = {"started_at": time.time(), "wall_s": None, "peak_mib": None, "exit_code": None}
        self._record()
        self._began = time.monotonic()
        with job.beside(".log").open("ab") as log:
            self._process = subprocess.Popen(
                command + (["--nproc", str(nproc)] if nproc > 1 else []),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(slot, at_once),
                start_new_session=True,  # a terminal's Ctrl-C comes once, from here
                preexec_fn=_saved_when_parent_is_gone if sys.platform == "linux" else None,
            )

    def send(self, number: int) -> None:
        """A signal."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def exit_code(self) -> int | None:
        """Once it has ended; the first time that is noticed it is recorded too."""
        if self._process.returncode is None:
            # not Popen.wait: it tells no peak of memory
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self._attempt |= {"wall_s": round(time.monotonic() - self._began, 3), "exit_code": code}
                if self.nproc == 1:  # the ranks of several are not children of ours
                    peak_mib = usage.ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)
                    self._attempt["peak_mib"] = round(peak_mib, 1)
                self._record()
        return self._process.returncode

    def _record(self) -> None:
        write_json(self.job.beside(".json"), [*self._earlier, self._attempt])


def train_all(who: str, jobs: Sequence[Job], *, nproc: int = 1, at_once: int = 1) -> int:
    """Train what has not been trained; signals are passed on to what runs, and its end is waited for.

    Args:
        who: speaks.
        jobs: none of them finished; what fails stops no other.
        nproc: processes of each.
        at_once: so many jobs side by side; they share the cores, and the devices that CUDA_VISIBLE_DEVICES lists.

    Returns:
        How many failed.

    Raises:
        StoppedBySignalError: a signal came; what ran has saved and ended.
    """
    waiting, running = list(jobs), list[_Process]()
    signals: list[int] = []
    failed, began = 0, time.monotonic()

    def pass_on(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for process in running:
            process.send(number)

    with handled_by(pass_on):
        while running or (waiting and not signals):
            while waiting and len(running) < at_once and not signals:
                job = waiting.pop(0)
                unfinished = _runs(len(waiting) + len(running) + 1)
                show(f"{who:<9} {job.name}, seed {job.seed}: begins; {unfinished} left, this one included")
                slot = min(set(range(at_once)) - {process.slot for process in running})
                running.append(_Process(job, nproc, slot, at_once))
                if signals:  # it came before the process was known
                    running[-1].send(signals[0])
            for process in [process for process in running if process.exit_code() is not None]:
                running.remove(process)
                if signals and not process.job.is_finished:
                    continue  # it was stopped
                failed += not process.job.is_finished
                left = len(waiting) + len(running)
                rest = (time.monotonic() - began) / (len(jobs) - left) * left
                _tell(who, process.job, process.exit_code() or 0, left, rest)
            time.sleep(_LOOK_AGAIN_S)
    if signals:
        name = signal.Signals(signals[0]).name
        raise StoppedBySignalError(f"stopped by {name}; start the same command again to go on", name)
    return failed


def _tell(who: str, job: Job, code: int, left: int, rest_s: float) -> None:
    """What a run that has ended came to."""
    if job.is_finished:
        outcome = job.outcome()
    else:
        lines = job.beside(".log").read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        show("\n".join([f"{who:<9} {job.beside('.log')} ends with:", *(f"  {line}" for line in lines)]))
        outcome = f"FAILED ({f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'})"
    rest = f"{_runs(left)} left, about {rest_s / 60:.0f} min" if left else "none left"
    show(f"{who:<9} {job.name}, seed {job.seed}: {outcome} in {job.attempts()[-1]['wall_s']:.0f} s; {rest}")


def _runs(n: int) -> str:
    return f"{n} run{'s' * (n != 1)}"


def _environment(slot: int, at_once: int) -> dict[str, str] | None:
    """Of a job beside others: its share of the cores, and a device of its own where several are listed."""
    if at_once == 1:
        return None
    share = {"OMP_NUM_THREADS": str(max(1, available_cores() // at_once))} | os.environ
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return share | ({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if len(devices) > 1 else {})


def _saved_when_parent_is_gone() -> None:
    """Else a run whose starter was killed would hold its folder for as long as it takes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
