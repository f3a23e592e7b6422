"""What a rate-range test says: loss over growing rates, read as a learning rate, and drawn. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tlearn.files import replace

SMOOTHING = 0.9
"""Of the loss that ends a test, per step. An average of past losses is late: by it the minimum of the demo's head came
at four times the rate, so a finished curve is read with `centred`."""

WIDTH = 4.0
"""Standard deviation in steps, of 12 in which the rate grows tenfold, of the Gaussian that smooths a finished curve."""

DIVERGED = 4.0
"""The test ends once the smoothed loss is so many times its minimum (fastai)."""

MARGIN = 10.0
"""The suggestion lies so many times below the rate of the smallest loss (fastai's `minimum`)."""

_FEWEST = 8
"""Losses of which something can be said."""


class Span(NamedTuple):
    """Of the rates of a test."""

    start: float = 1e-7
    end: float = 10.0
    steps: int = 100

    def rates(self) -> list[float]:
        """From start to end, each by the same factor above the one before."""
        return [float(rate) for rate in np.geomspace(self.start, self.end, self.steps)]


class Curve(NamedTuple):
    """Loss over rates; it ends where the loss exploded."""

    rates: list[float]
    losses: list[float]
    """Of each step, before it was taken; the last may not be finite."""
    smoothed: list[float]
    """Their exponential moving average with bias correction, as far as they are finite."""


class Suggestion(NamedTuple):
    """What to make of a curve."""

    rate: float | None
    """A tenth of the rate at which the loss, smoothed, is smallest; None: see `why_not`."""
    why_not: str | None
    others: dict[str, float]
    """What other readings of the same curve give: its steepest fall (fastai's `steep`), and the
    middle of the longest run of ever lower losses (fastai's `valley`, by ESRI)."""


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential moving average, divided by what is missing in its weights (Kingma & Ba 2015, 3)."""
    average, averages = 0.0, []
    for i, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averages.append(average / (1 - SMOOTHING**i))
    return averages


def centred(losses: Sequence[float]) -> npt.NDArray[np.float64]:
    """Smoothed by what comes before and after alike; an explosion counts as twice the loss of the first quarter."""
    from scipy.ndimage import gaussian_filter1d

    values = np.nan_to_num(np.array(losses), nan=np.inf)
    ceiling = 2 * values[: len(values) // 4].mean()
    return np.asarray(gaussian_filter1d(np.minimum(values, ceiling), WIDTH, mode="nearest"))


def suggest(curve: Curve) -> Suggestion:
    """A learning rate, or why the curve names none.

    The loss has fallen where its smoothed minimum lies more than 1.5 standard deviations of single losses below their
    mean, both over the first quarter of the curve, whose rates are too small to matter.
    """
    if len(curve.smoothed) < _FEWEST:
        return Suggestion(None, f"the loss explodes at once: begin below {curve.rates[0]:.2g}", {})
    quiet, losses = np.array(curve.losses[: len(curve.losses) // 4]), centred(curve.losses)
    lowest = int(losses.argmin())
    if losses[lowest] >= quiet.mean() - 1.5 * quiet.std():
        return Suggestion(None, "the loss does not fall below its noise", {})
    falling = losses[: lowest + 1]
    others = {
        "steepest": curve.rates[int(np.diff(falling, append=falling[-1]).argmin())],
        "valley": curve.rates[_valley(falling)],
    }
    if lowest == len(losses) - 1:
        return Suggestion(None, f"the loss still falls at {curve.rates[-1]:.2g}: end above it", others)
    return Suggestion(float(f"{curve.rates[lowest] / MARGIN:.2g}"), None, others)


def _valley(values: npt.NDArray[np.float64]) -> int:
    """The middle of the longest subsequence of ever lower values, counted back from its end as if it had no gaps."""
    length = np.ones(len(values), dtype=np.int64)
    for i in range(1, len(values)):
        before = length[:i][values[:i] > values[i]]
        length[i] = 1 + before.max(initial=0)
    end = int(length.argmax())
    return end - int(length[end]) // 2


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG: loss over rates, a picture per stage; dots are single steps, dashed lines the suggestions."""
    from matplotlib.figure import Figure

    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(7, 3.5 * len(stages)), layout="constrained")
    for stage, axes in zip(stages, figure.subplots(len(stages), squeeze=False)[:, 0], strict=True):
        shown = [row for row in rows if row["stage"] == stage]
        for row in shown:
            label = f"{row['trains']} ({row['head']} head)" if row["trains"] != "head" else "head"
            if row["suggestion"] is not None:
                label += f": {row['suggestion']:.2g}"
            losses = [math.nan if loss is None else loss for loss in row["losses"]]
            (line,) = axes.plot(row["rates"], centred(losses), label=label)
            axes.plot(row["rates"], losses, ".", color=line.get_color(), markersize=3, alpha=0.4)
            if row["suggestion"] is not None:
                axes.axvline(row["suggestion"], color=line.get_color(), linestyle="--", linewidth=1)
        begins = max(max(row["smoothed"][:1], default=1.0) for row in shown)
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=stage, ylim=(0, 2 * begins))
        axes.grid(alpha=0.3)
        axes.legend()
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=120, format="png")
    replace(temporary, path)
