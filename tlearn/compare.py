"""`tlearn compare`: several recipes, trained on the same images with the same seeds, and one table. Imports no torch.

FOLDER/NAME/seed-S/       the run folder; NAME is the config's file stem
FOLDER/NAME/seed-S.yaml   what was asked for, with the options of the command line
FOLDER/NAME/seed-S.json   processes that worked on it: when, how long, how much memory
FOLDER/NAME/seed-S.log    what they printed
FOLDER/compare.*          json (everything), md (the table), png (accuracy over epochs)
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
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

from tlearn.comparison import draw, markdown, notes, read_run, summarise
from tlearn.config import Config
from tlearn.configfile import differing_keys, dump_config, load_config
from tlearn.console import show
from tlearn.data.prepare import open_or_prepare
from tlearn.data.workers import available_cores
from tlearn.errors import StoppedBySignalError, TlearnError
from tlearn.files import write_json, write_text
from tlearn.signals import handled_by, stop

_LAST_LINES = 12
"""Shown of a run that fails."""

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

    def attempts(self) -> list[Attempt]:
        """The processes that worked on it; one whose end nobody saw ended with its last sign of life."""
        file = self.beside(".json")
        attempts: list[Attempt] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        if attempts and attempts[-1]["wall_s"] is None:
            signs = (self.beside(".log"), self.folder / "metrics.jsonl", self.folder / "result.json")
            last = max((sign.stat().st_mtime for sign in signs if sign.exists()), default=0.0)
            attempts[-1]["wall_s"] = round(max(0.0, last - attempts[-1]["started_at"]), 3)
        return attempts


def compare(
    files: Sequence[Path], overrides: Sequence[str], folder: Path, *, seeds: int = 3, nproc: int = 1
) -> dict[str, Any]:
    """Train every recipe with every seed, in turn, each run in a process of its own; finished runs are kept.

    Args:
        files: a config per recipe; its name is the file's stem.
        overrides: `a.b=c` for all of them.
        folder: for runs and tables.
        seeds: 0, 1, ...
        nproc: processes of each run.

    Returns:
        What compare.json holds; `failed` counts the runs that failed.

    Raises:
        TlearnError: recipes that cannot be compared, a folder that holds other runs; nothing was trained.
        StoppedBySignalError: the run that was under way is saved; the same call goes on.
    """
    jobs = _jobs(files, overrides, seeds, folder)
    for job in jobs:
        _note_what_is_asked(job)
    failed = _train_all([job for job in jobs if not job.is_finished], nproc)
    names = dict.fromkeys(job.name for job in jobs)
    done = [job for job in jobs if job.is_finished]
    recipes = {n: [read_run(j.folder, j.seed, j.attempts()) for j in done if j.name == n] for n in names}
    command = ["tlearn", "compare", *map(str, files), *overrides, "--seeds", str(seeds), "--out", str(folder)]
    report = {
        "command": shlex.join(command + (["--nproc", str(nproc)] if nproc > 1 else [])),
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(done),
        "seeds": list(range(seeds)),
        "failed": failed,
        "recipes": (rows := summarise(recipes, range(seeds))),
        "notes": notes(rows),
    }
    write_json(folder / "compare.json", report)
    write_text(folder / "compare.md", markdown(report))
    draw(rows, folder / "compare.png")
    show(f"compare   {folder}/compare.json, compare.md, compare.png")
    return report


def _jobs(files: Sequence[Path], overrides: Sequence[str], seeds: int, folder: Path) -> list[Job]:
    """All runs, the recipes in turn, so that a machine that becomes slower or faster favours none."""
    if len(files) < 2:
        raise TlearnError("compare takes two configs or more, and options a.b=c for all of them")
    if any(text.partition("=")[0] == "seed" for text in overrides):
        raise TlearnError("the command line: seed has no effect: --seeds N trains every recipe with seeds 0 to N-1")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise TlearnError("compare starts its runs itself: use --nproc N instead of a launcher")
    stems = [file.stem for file in files]
    if twice := sorted({str(file) for file in files if stems.count(file.stem) > 1}):
        raise TlearnError(f"{', '.join(twice)}: these recipes have one name; rename a file")
    jobs = [
        Job(file.stem, seed, load_config(file, [*overrides, f"seed={seed}"]), folder / file.stem / f"seed-{seed}")
        for seed in range(seeds)
        for file in files
    ]
    _check_same_images([job for job in jobs if job.seed == 0])
    for job in jobs:
        asked = job.beside(".yaml")
        if asked.is_file() and (changes := differing_keys(load_config(asked), job.config)):
            raise TlearnError(
                "\n  ".join([f"{job.folder}: holds a run with other options; use a new --out:", *changes])
            )
        if not asked.is_file() and job.folder.exists():
            raise TlearnError(f"{job.folder}: is not a run of a comparison; use a new --out")
    return jobs


def _check_same_images(jobs: Sequence[Job]) -> None:
    """Before hours are spent; the runs' own records are compared as well, at the end."""
    first: tuple[str, dict[str, Any]] | None = None
    for job in jobs:
        data = job.config.data
        if data.reader == "indexed":
            images = {"fingerprint": open_or_prepare(data.path).fingerprint}
        else:
            images = {"path": data.path, "stream": str(data.stream)}
        seen: dict[str, Any] = images | {"max_train": data.max_train, "max_val": data.max_val}
        first = first or (job.name, seen)
        different = [key for key in seen | first[1] if seen.get(key) != first[1].get(key)]
        if different:
            raise TlearnError(
                f"{first[0]} and {job.name} do not see the same images: {', '.join(different)} of their data differ; "
                "name them once for all, data.path=DATA"
            )


def _note_what_is_asked(job: Job) -> None:
    if not job.beside(".yaml").is_file():
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        write_text(job.beside(".yaml"), dump_config(job.config))


def _train_all(jobs: Sequence[Job], nproc: int) -> int:
    """Train what has not been trained; returns how many runs failed."""
    failed, began = 0, time.monotonic()
    for number, job in enumerate(jobs):
        show(f"compare   {job.name}, seed {job.seed}: begins; {_runs(len(jobs) - number)} left with this one")
        code = _run(job, nproc)
        last = job.attempts()[-1]
        if job.is_finished:
            result = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
            outcome = f"val/top1@{result['image_size_px']} {result['val']['top1']:.1%}"
        else:
            failed += 1
            lines = job.beside(".log").read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
            show("\n".join([f"compare   {job.beside('.log')} ends with:", *(f"  {line}" for line in lines)]))
            outcome = f"FAILED ({f'killed by {signal.Signals(-code).name}' if code < 0 else f'exit code {code}'})"
        left = len(jobs) - number - 1
        rest = (time.monotonic() - began) / (number + 1) * left
        show(f"compare   {job.name}, seed {job.seed}: {outcome} in {last['wall_s']:.0f} s; {_left(left, rest)}")
    return failed


def _runs(n: int) -> str:
    return f"{n} run{'s' * (n != 1)}"


def _left(runs: int, seconds: float) -> str:
    return f"{_runs(runs)} left, about {seconds / 60:.0f} min" if runs else "none left"


def _run(job: Job, nproc: int) -> int:
    """`tlearn train` in a process of its own, measured; signals are passed on, and it is waited for. Its exit code.

    Raises:
        StoppedBySignalError: a signal came; the run has ended.
    """
    command = [sys.executable, "-m", "tlearn", "train", str(job.beside(".yaml")), "--run", str(job.folder)]
    attempts = job.attempts()
    attempt: Attempt = {"started_at": time.time(), "wall_s": None, "peak_mib": None, "exit_code": None}
    write_json(job.beside(".json"), [*attempts, attempt])
    children: list[int] = []
    signals: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not children:
            stop(number, frame)
        signals.append(number)
        with suppress(ProcessLookupError):
            os.kill(children[0], number)

    with handled_by(pass_on), job.beside(".log").open("ab") as log:
        began = time.monotonic()
        process = subprocess.Popen(
            command + (["--nproc", str(nproc)] if nproc > 1 else []),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a terminal's Ctrl-C comes once, from here
            preexec_fn=_saved_when_parent_is_gone if sys.platform == "linux" else None,
        )
        children.append(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        attempt |= {"wall_s": round(time.monotonic() - began, 3), "exit_code": code}
        if nproc == 1:  # the ranks of several are not children of ours
            attempt["peak_mib"] = round(usage.ru_maxrss / (2**10 if sys.platform == "linux" else 2**20), 1)
        write_json(job.beside(".json"), [*attempts, attempt])
    if signals:
        name = signal.Signals(signals[0]).name
        raise StoppedBySignalError(f"stopped by {name}; start the same command again to go on", name)
    return code


def _saved_when_parent_is_gone() -> None:
    """Else a run whose comparison was killed would hold its folder for as long as it takes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _machine(done: Sequence[Job]) -> str:
    """On which the runs were done."""
    names = {json.loads((j.folder / "environment.json").read_text(encoding="utf-8"))["device"] for j in done}
    return " and ".join(sorted(f"{available_cores()} CPU cores" if name == "cpu" else name for name in names))
