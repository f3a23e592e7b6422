"""`tlearn advise RUN`: from the symptoms of a run to what to change in the next one. No torch.

Every symptom is a function in SYMPTOMS, from what a run left to an advice or None: no rows, no advice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tlearn.config import Config, Stage
from tlearn.configfile import load_config
from tlearn.errors import TlearnError

Row = Mapping[str, Any]

RISE = 1.1
"""The loss of the last quarter of a stage's steps over that of the first: from here on it rises."""
JUMP, JUMPS = 0.03, 2
"""A fall of val top-1 from one epoch to the next that is no noise, and how many of these are too many."""
GAP = 0.15
"""Train top-1 less val top-1: from here on the network has learned the images by heart."""
LOW = 0.7
"""Train top-1 below which the network has not even learned the images that it saw."""
GROWTH = 0.005
"""Val top-1 of the last epoch above that of all before it: it has not come to an end."""
NOT_FINITE = "loss or gradient not finite"
_SMALLER_PX = (192, 160, 128, 96, 64)
_NO_MEMORY = re.compile(
    r"[^\n]*(?:out of memory|OutOfMemoryError|OUT_OF_MEMORY|oom[-_ ]kill|killed by SIGKILL)[^\n]*", re.I
)


class Advice(NamedTuple):
    """What was seen, in which numbers, and what to set."""

    symptom: str
    numbers: str
    options: str


@dataclass(frozen=True)
class Seen:
    """What a run left."""

    config: Config
    """With its stages listed."""
    rows: Sequence[Row]
    """Of metrics.jsonl."""
    result: Row | None
    """result.json of a run that was finished."""
    text: str
    """log.txt, and what the ranks of a job left."""
    finished: bool

    def of(self, kind: str, stage: str | None = None) -> list[Row]:
        """Rows of a kind, of one stage or all."""
        return [row for row in self.rows if row["kind"] == kind and stage in (None, row["stage"])]

    def rate(self, name: str) -> tuple[str, float]:
        """The option that holds a stage's rate, and its value."""
        number, stage = next((i, s) for i, s in enumerate(self.stages) if s.name == name)
        if stage.optimizer is not None:
            return f"stages.{number}.optimizer.lr", stage.optimizer.lr
        return "optimizer.lr", self.config.optimizer.lr

    @property
    def stages(self) -> list[Stage]:
        """Of the config."""
        return self.config.stages or []

    @property
    def noise(self) -> float:
        """Standard error of val top-1; 0 where the number of images is not known."""
        if self.result is None:
            return 0.0
        p, n = self.result["val"]["top1"], self.result["val"]["n"]
        return math.sqrt(p * (1 - p) / n)


def read_run(folder: Path) -> Seen:
    """What is in a run folder.

    Raises:
        TlearnError: it holds no run.
    """
    if not (folder / "config.yaml").is_file():
        raise TlearnError(f"{folder}: holds no run (no config.yaml); give the folder that --run named")
    rows = []
    with suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the last line of a run that was killed
                rows.append(json.loads(line))
    result = None
    with suppress(FileNotFoundError, ValueError):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    texts = [folder / "log.txt", *sorted(folder.glob("slurm/*_failure.txt")), *sorted(folder.glob("slurm/*.err"))]
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in texts if path.is_file())
    return Seen(load_config(folder / "config.yaml"), rows, result, text, result is not None)


def too_fast(seen: Seen) -> list[Advice]:
    """Signs of rates that are too high."""
    return [advice for look in (_not_finite, _rising) if (advice := look(seen)) is not None]


def still_improves(seen: Seen) -> bool:
    """Whether the last epoch is the best by far."""
    return _still_improving(seen) is not None


def advise(seen: Seen) -> list[Advice]:
    """What to change, the most urgent first; empty where no symptom was found."""
    return [advice for look in SYMPTOMS if (advice := look(seen)) is not None]


def val_top1(row: Row) -> float:
    """Of an epoch, whatever the image size."""
    return float(next(value for key, value in row.items() if key.startswith("val/top1@")))


def _no_memory(seen: Seen) -> Advice | None:
    found = _NO_MEMORY.search(seen.text)
    if found is None:
        return None
    size_px, batch = seen.config.data.image_size, seen.config.batch
    smaller = next((px for px in _SMALLER_PX if size_px is None or px < size_px), None)
    ways = ["batch.find=true" if not batch.find else f"batch.micro={max(1, (batch.micro or batch.size) // 2)}"]
    if smaller is not None:
        ways.append(f"data.image_size={smaller}")
    return Advice(
        "out of memory",
        f"batch {batch.micro or batch.size} at {size_px or 'default'} px: {found[0].strip()[:120]}",
        " or ".join(ways),
    )


def _not_finite(seen: Seen) -> Advice | None:
    steps = seen.of("step")
    bad = [row for row in steps if row.get("rejected") or row["train/loss"] is None]
    if not bad:
        return None
    option, rate = seen.rate(bad[0]["stage"])
    half = " or precision=fp32" if seen.config.precision in ("fp16", "bf16") else ""
    return Advice(
        NOT_FINITE,
        f"{len(bad)} of {len(steps)} steps, first at step {bad[0]['step']} (stage {bad[0]['stage']}, rate {rate:g})",
        f"{option}={rate / 10:g}{half}",
    )


def _rising(seen: Seen) -> Advice | None:
    for stage in seen.stages:
        losses = [row["train/loss"] for row in seen.of("step", stage.name) if row["train/loss"] is not None]
        quarter = len(losses) // 4
        if quarter < 2:
            continue
        first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
        if last > RISE * first:
            option, rate = seen.rate(stage.name)
            numbers = (
                f"stage {stage.name}: {first:.3g} in the first quarter of {len(losses)} steps, {last:.3g} in the last"
            )
            return Advice("training loss rises", f"{numbers} (rate {rate:g})", f"{option}={rate / 3:.2g}")
    return None


def _jumps(seen: Seen) -> Advice | None:
    jump = max(JUMP, 2 * seen.noise)
    for stage in seen.stages:
        scores = [val_top1(row) for row in seen.of("epoch", stage.name)]
        falls = [before - after for before, after in pairwise(scores) if before - after > jump]
        if len(falls) >= JUMPS:
            option, rate = seen.rate(stage.name)
            return Advice(
                "val accuracy jumps about",
                f"stage {stage.name}: fell {len(falls)} times in {len(scores)} epochs, by up to {max(falls):.1%}",
                f"batch.size={2 * seen.config.batch.size} or {option}={rate / 3:.2g}",
            )
    return None


def _by_heart(seen: Seen) -> Advice | None:
    epochs = seen.of("epoch")
    if not epochs or epochs[-1]["train/top1"] is None:
        return None
    train, val = epochs[-1]["train/top1"], val_top1(epochs[-1])
    if train - val < max(GAP, 3 * seen.noise):
        return None
    ways = []
    stage = next(s for s in seen.stages if s.name == epochs[-1]["stage"])
    if any(rate > 0 for pattern, rate in stage.train if pattern != "head"):
        ways.append("train less (strategy=partial or feature_extraction)")
    smallest = seen.config.data.augment.scale[0]
    if smallest > 0.1:
        ways.append(f"data.augment.scale=[{max(0.08, smallest / 2):.2g}, 1.0]")
    if seen.config.objective.label_smoothing == 0:
        ways.append("objective.label_smoothing=0.1")
    return Advice(
        "val far below train",
        f"last epoch: train top-1 {train:.1%}, val {val:.1%}",
        "more images, or " + " or ".join(ways) if ways else "more images",
    )


def _low(seen: Seen) -> Advice | None:
    epochs = seen.of("epoch")
    if not epochs or epochs[-1]["train/top1"] is None or epochs[-1]["train/top1"] >= LOW:
        return None
    number, stage = next((i, s) for i, s in enumerate(seen.stages) if s.name == epochs[-1]["stage"])
    option, rate = seen.rate(stage.name)
    ways = [f"stages.{number}.epochs={2 * stage.epochs}"]
    if any(rate == 0 for _, rate in stage.train):
        ways.append("unfreeze more (strategy=staged)")
    return Advice(
        "even train accuracy is low",
        f"last epoch of {len(epochs)}: train top-1 {epochs[-1]['train/top1']:.1%}",
        " or ".join([*ways, f"{option}={3 * rate:.2g}"]),
    )


def _still_improving(seen: Seen) -> Advice | None:
    epochs = seen.of("epoch")
    if not seen.finished or len(epochs) < 3:
        return None
    *before, last = map(val_top1, epochs)
    if last < max(before) + GROWTH:
        return None
    number, stage = len(seen.stages) - 1, seen.stages[-1]
    return Advice(
        "still improving at the end",
        f"the last epoch is the best: val top-1 {last:.1%}, {max(before):.1%} before",
        f"stages.{number}.epochs={2 * stage.epochs}",
    )


def _unfinished(seen: Seen) -> Advice | None:
    if seen.finished:
        return None
    done, planned = len(seen.of("epoch")), sum(stage.epochs for stage in seen.stages)
    return Advice("not finished", f"{done} of {planned} epochs", "tlearn train --run RUN goes on")


SYMPTOMS: tuple[Callable[[Seen], Advice | None], ...] = (
    _no_memory,
    _not_finite,
    _rising,
    _jumps,
    _by_heart,
    _low,
    _still_improving,
    _unfinished,
)
