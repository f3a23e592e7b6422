"""`tlearn drill`: kill a short copy of a recipe again and again, and compare it with a run that nobody touched."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tlearn import checkpoint
from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.console import progress_bar, show
from tlearn.data.prepare import open_or_prepare
from tlearn.errors import RankFailedError, StoppedBySignalError, TlearnError
from tlearn.launch import run_ranks
from tlearn.models.build import assemble
from tlearn.run import train
from tlearn.runtime import use_cpu
from tlearn.stages import expand

BATCH_SIZE, STEPS_PER_EPOCH, IMAGE_SIZES_PX = 16, 5, (64, 128)
"""Of the copy, where the recipe's own are not smaller; the smallest size that the model takes."""

TOLERANCE = 1e-9
"""Largest relative difference of a loss in double precision between numbers of processes; measured are 1e-13."""

_OF_THE_CLOCK = ("images_per_s", "seconds", "save/")

Row = dict[str, Any]


@dataclass
class Interruption:
    """How a run was ended, and where it had gone on before."""

    signal: str
    processes: int
    started_at_step: int
    after_step: int
    """Rows of metrics.jsonl by then; what the newest checkpoint does not hold is done again."""


@dataclass
class Leg:
    """One comparison with an uninterrupted run."""

    name: str
    precision: str
    steps: int
    exact: bool
    """Whether it has to be equal to the bit."""
    interruptions: list[Interruption] = field(default_factory=list)
    first_difference: str | None = None
    """Step or epoch, and what differs in it."""
    largest_difference: float = 0.0
    """Of the loss of a step, relative."""
    equal: bool = False


def drill(
    path: Path | None, overrides: Sequence[str], *, nproc: int = 1, kills: int = 4, seed: int = 0
) -> dict[str, Any]:
    """Interrupt a short copy of a recipe at random moments and compare.

    With as many processes everything has to be equal to the bit: losses, rates, batches, scores, final weights and
    optimizer. With other numbers of processes batches and rates have to be equal, and losses in double precision to
    TOLERANCE (without dropout and with BatchNorm statistics as they are, which differ by their nature).

    Args:
        path, overrides: the recipe, as `load_config` takes it.
        nproc: processes of the run.
        kills: interruptions of the first comparison, SIGKILL and SIGTERM in turn.
        seed: of the moments.

    Returns:
        `equal`, and a `Leg` per comparison.

    Raises:
        TlearnError: a recipe that cannot be drilled.
    """
    config = short_copy(path, overrides)
    root = Path(tempfile.mkdtemp(prefix="tlearn-drill-"))
    try:
        legs = _legs(config, root, nproc, kills, seed)
    except BaseException:
        shutil.rmtree(root)
        raise
    equal = all(leg.equal for leg in legs)
    if equal:
        shutil.rmtree(root)
    return {"equal": equal, "legs": [asdict(leg) for leg in legs], "folder": None if equal else str(root)}


def _legs(config: Config, root: Path, nproc: int, kills: int, seed: int) -> list[Leg]:
    moments = random.Random(seed)
    show(f"drill     {config.data.path}, {len(config.stages or [])} stages; runs and logs in {root}")
    whole = root / "untouched"
    _run(config, whole, nproc)
    first = compare("same processes", config, whole, root / "killed", [nproc] * (kills + 1), moments)
    if not first.equal:
        _run(config, root / "untouched-again", nproc)
        if again := _first_difference(whole, root / "untouched-again", exact=True):
            first.first_difference = (
                f"{first.first_difference}; but two runs that nobody touched differ as well ({again}): this machine "
                "does not repeat a computation, so that nothing is proved"
            )
    legs = [first]
    if others := _other_worlds(nproc, config):
        exact = _in_double(config)
        _run(exact, root / "untouched-fp64", nproc)
        worlds = [nproc, *others, nproc]
        legs.append(
            compare("other processes", exact, root / "untouched-fp64", root / "moved", worlds, moments, exact=False)
        )
    return legs


def short_copy(path: Path | None, overrides: Sequence[str]) -> Config:
    """The recipe with its stages, optimizers, schedules and rules, but few and small images.

    Raises:
        TlearnError: a recipe that promises no exact resume.
    """
    own = load_config(path, overrides)
    if own.data.reader != "indexed":
        raise TlearnError("data.reader: stream gives up exact resume within an epoch: there is nothing to drill")
    open_or_prepare(own.data.path)
    batch_size = min(own.batch.size, BATCH_SIZE)
    changes = [
        f"batch.size={batch_size}",
        f"quick.samples={STEPS_PER_EPOCH * batch_size - 1}",  # batches of uneven sizes
        f"quick.epochs={len(expand(own).stages or []) + 2}",
        "save_every={epochs: 1, steps: 3}",
        "tracking.wandb.mode=disabled",
        "run.audit=true",
    ]
    if own.batch.micro and own.batch.micro < own.batch.size:
        changes.append(f"batch.micro={-(-batch_size // 2)}")  # accumulates
    for size_px in IMAGE_SIZES_PX:
        config = expand(load_config(path, [*overrides, *changes, f"quick.image_size={size_px}"], quick=True))
        try:
            assemble(config.model.model_copy(update={"weights": "random"}), config.data.image_size, 2)
        except TlearnError:
            continue
        return config
    return expand(load_config(path, [*overrides, *changes, "quick.image_size=2048"], quick=True))


def _other_worlds(nproc: int, config: Config) -> list[int]:
    """Two other numbers of processes that the machine and the batch have room for."""
    most = min(config.batch.size, 10**6 if use_cpu() else torch.accelerator.device_count())
    return [n for n in (nproc + 1, nproc - 1 if nproc > 1 else nproc + 2) if 1 <= n <= most]


def _in_double(config: Config) -> Config:
    model = config.model.model_copy(update={"dropout": 0.0, "batch_norm": "frozen"})
    return config.model_copy(update={"precision": "fp64", "model": model})


def compare(
    name: str,
    config: Config,
    whole: Path,
    folder: Path,
    worlds: Sequence[int],
    moments: random.Random,
    *,
    exact: bool = True,
) -> Leg:
    """Run with these numbers of processes, one after the other, each but the last one interrupted.

    Args:
        name: shown.
        config: of the run.
        whole: folder of a run that nobody touched.
        folder: a new one.
        worlds: processes, from one interruption to the next.
        moments: which moments.
        exact: equal to the bit; otherwise losses to TOLERANCE, and what follows from them not at all.
    """
    step_s = _result(whole)["seconds"] / _result(whole)["steps"]
    steps = _rows(whole, "step")
    leg = Leg(name, load_config(whole / "config.yaml").precision, len(steps), exact)
    show(f"drill     {name}: {len(worlds) - 1} interruptions in {len(steps)} steps")
    with progress_bar(name, len(worlds)) as advance:
        for i, world_size in enumerate(worlds[:-1]):
            # one in every part of the run, so that it gets ahead
            after = int(0.85 * len(steps) * (i + moments.random()) / (len(worlds) - 1))
            number = (signal.SIGKILL, signal.SIGTERM)[i % 2]
            interruption = _interrupt(config, folder, world_size, number, after, moments.uniform(0, 4 * step_s))
            advance()
            if interruption is None:
                break  # it was faster
            leg.interruptions.append(interruption)
        _run(config, folder, worlds[-1])
        advance()
    leg.first_difference = _first_difference(whole, folder, exact=exact)
    leg.largest_difference = max(
        (_difference(a["train/loss"], b["train/loss"]) for a, b in zip(steps, _rows(folder, "step"), strict=False)),
        default=0.0,
    )
    if leg.first_difference is None and len(leg.interruptions) < len(worlds) - 1:
        leg.first_difference = "not tried: the run was faster than the signals; try again, or give it more images"
    leg.equal = leg.first_difference is None
    return leg


def _interrupt(
    config: Config, folder: Path, world_size: int, number: signal.Signals, after: int, delay_s: float
) -> Interruption | None:
    """Go on with a run, and send its processes a signal `delay_s` after it logged step `after`; None: it was faster."""
    started_at, before = _saved_step(folder), _changed_at(folder)
    over, fired = threading.Event(), threading.Event()

    def watch(processes: list[int]) -> None:
        while not over.is_set() and (_changed_at(folder) == before or len(_rows(folder, "step")) < after):
            time.sleep(0.01)
        if over.wait(delay_s):
            return
        fired.set()
        with suppress(ProcessLookupError):
            for process in processes if number == signal.SIGKILL else processes[-1:]:
                os.kill(process, number)

    def begin(processes: list[int]) -> None:
        threading.Thread(target=watch, args=(processes,), daemon=True).start()

    try:
        run_ranks(_rank, (config, folder), world_size, begin)
    except (RankFailedError, StoppedBySignalError):
        if not fired.is_set():
            raise
    finally:
        over.set()
    if (folder / "result.json").exists():
        return None
    return Interruption(number.name, world_size, started_at, len(_rows(folder, "step")))


def _run(config: Config, folder: Path, world_size: int) -> None:
    run_ranks(_rank, (config, folder), world_size)


def _rank(config: Config, folder: Path) -> None:
    """Train, with what would be shown in a log, and with kernels that add in a fixed order where there are such."""
    with folder.with_suffix(".log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    train(config, folder)


def _changed_at(folder: Path) -> int:
    try:
        return (folder / "metrics.jsonl").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _saved_step(folder: Path) -> int:
    newest = checkpoint.newest(folder / "checkpoints")
    return checkpoint.read_progress(newest).step if newest else 0


def _result(folder: Path) -> Row:
    result: Row = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def _rows(folder: Path, kind: str) -> list[Row]:
    """Whole rows of metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == kind]


def _first_difference(whole: Path, other: Path, *, exact: bool) -> str | None:
    """In words: where two runs part, or None. Not exact: losses may differ by TOLERANCE, scores and weights by more."""
    for kind in ("step", "epoch"):
        ours, theirs = _rows(whole, kind), _rows(other, kind)
        if [row["step"] for row in ours] != [row["step"] for row in theirs]:
            return f"{len(theirs)} {kind}s were logged instead of {len(ours)}, or not in their order"
        for a, b in zip(ours, theirs, strict=True):
            for key in [key for key in a if not key.startswith(_OF_THE_CLOCK)]:
                if exact or key in ("batch_hash", "lr"):
                    differs = a[key] != b.get(key)
                else:
                    differs = key == "train/loss" and kind == "step" and _difference(a[key], b[key]) > TOLERANCE
                if differs:
                    return f"{kind} {a['step']}: {key} {b.get(key)} instead of {a[key]}"
    if not exact:
        return None
    states = [checkpoint.newest(folder / "checkpoints") for folder in (whole, other)]
    loaded = [checkpoint.load(state) for state in states if state]
    for what in ("model", "optimizer"):
        a, b = (getattr(state, what) for state in loaded)
        wrong = [name for name in a if name not in b or not torch.equal(a[name], b[name])]
        if wrong or a.keys() != b.keys():
            return f"after the last step: {len(wrong)} tensors of the {what} ({', '.join(wrong[:3])})"
    return None


def _difference(a: float | None, b: float | None) -> float:
    """Relative; losses that are not finite are None."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / abs(a) if a else abs(b)


def report_table(report: dict[str, Any]) -> Table:
    """One row an interruption."""
    table = Table(
        "comparison", "processes", "went on at step", "ended by", "after step", title="drill", title_justify="left"
    )
    for leg in report["legs"]:
        for stop in leg["interruptions"]:
            table.add_row(
                leg["name"],
                str(stop["processes"]),
                str(stop["started_at_step"]),
                stop["signal"],
                str(stop["after_step"]),
            )
    return table


def verdict(report: dict[str, Any]) -> list[str]:
    """A line a comparison."""
    lines = []
    if len(report["legs"]) == 1:
        lines.append("NOT TRIED: other numbers of processes; this machine has no room for more")
    for leg in report["legs"]:
        about = f"{leg['name']} ({leg['precision']}, {leg['steps']} steps, {len(leg['interruptions'])} interruptions)"
        if not leg["equal"]:
            lines.append(f"DIFFERS  {about}: {leg['first_difference']}")
        elif leg["exact"]:
            lines.append(f"EQUAL    {about}: losses, rates, batches, scores, final weights and optimizer to the bit")
        else:
            lines.append(f"EQUAL    {about}: batches and rates; losses to {leg['largest_difference']:.1e}")
    return lines
