"""What is measured of a quick run, and the faults that can be seen in it. No torch.

A fault is a function in FAULTS, from the facts to what is wrong and what to set, or None; one is enough for a no-go.
WARNINGS are told, whatever the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import log
from typing import NamedTuple

from scipy.special import bdtr

from tlearn.advice import NOT_FINITE, RISE, Advice
from tlearn.forecast import Forecast
from tlearn.metrics import wilson_interval

FEW = 5
"""Certain copies: from here on they say something of the images that were not looked at."""
FALLS = 0.98
"""Of the loss at the beginning; what is not below it has not fallen."""
COPIES = 0.05
"""Share of the val images with a near copy in train: from here on their accuracy says something else."""
OFF = 0.5
"""Deviations by which the mean of a channel may lie off, before weights see pixels unlike those they know. Measured
once: 0.55 off (ten-class set, EfficientNet-Lite0, 128 px) a linear probe had 77.5 % of 102 val images, not 82.4 %."""
STRETCH = 1.5
"""Times a channel's deviation may be larger or smaller."""
SKIPPED = 0.1
"""Share of the steps that may be skipped for a gradient that is not finite (fp16 looks for its scale so)."""
WAITING = 0.1
FULL = 0.9
"""Of the memory: above it a run does not fit."""


class Fault(NamedTuple):
    """What is wrong, and what to do about it."""

    name: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f"; {self.fix}" if self.fix else "")


class Against(NamedTuple):
    """The same val images, by the quick run's best weights and by a linear probe of frozen features."""

    both: int
    """Both are right."""
    only_run: int
    only_probe: int

    @property
    def p(self) -> float:
        """Of a difference at least as large by chance: McNemar's test, exact, two-sided."""
        n, few = self.only_run + self.only_probe, min(self.only_run, self.only_probe)
        return min(1.0, 2 * float(bdtr(few, n, 0.5)))


class Copy(NamedTuple):
    """A val image and a train image that show the same."""

    val: str
    train: str
    cosine: float


@dataclass(frozen=True)
class Leaks:
    """Images on both sides of the split."""

    dropped: dict[str, int] = field(default_factory=dict)
    """What `prepare` found and dropped, by kind."""
    exact: int = 0
    """Images that are in train and in val all the same."""
    copies: int = 0
    """Val images with a near copy among the train images that were looked at."""
    listed: tuple[Copy, ...] = ()
    """The nearest of them."""
    certain: int = 0
    """Copies that no different pictures are as near as."""
    looked_at: tuple[int, int] = (0, 0)
    """Train and val images among which near copies were looked for."""
    train: int = 0
    """All train images."""
    unseen: str | None = None
    """Why near copies were not looked for."""

    @property
    def share(self) -> float:
        """Of val images with a near copy in train: what was seen, or what certain ones among some train images say of
        all of them (the lower end of the interval)."""
        train, val = self.looked_at
        if not (train and val):
            return 0.0
        foreseen = wilson_interval(self.certain, val)[0] * self.train / train if self.certain >= FEW else 0.0
        return min(1.0, max(self.copies / val, foreseen))


Colours = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation per channel."""


@dataclass(frozen=True)
class Facts:
    """What a verdict rests on."""

    image_size_px: int
    classes: int
    epochs: int
    """That the quick run was to have."""
    val: int = 0
    """Val images that were scored; 0: none yet."""
    hits: int = 0
    """After the last epoch, which nobody chose."""
    majority: int = 0
    """Val images of the largest class."""
    missing: tuple[str, ...] = ()
    """Classes without a val image."""
    losses: tuple[float | None, ...] = ()
    """Train loss per epoch; None: not finite."""
    loss_is_of_labels: bool = True
    """Alone: a guess has ln(classes)."""
    too_fast: tuple[Advice, ...] = ()
    """As advice.py sees it."""
    steps: int = 0
    skipped: int = 0
    still_improving: bool = False
    ended_by: Fault | None = None
    """What ended the training before its end."""
    stopped: bool = False
    """By quick.minutes."""
    against: Against | None = None
    no_probe: str | None = None
    leaks: Leaks = Leaks()
    normalised: Colours | None = None
    """By what images are normalised, where it is not what the weights were trained with."""
    own: Colours | None = None
    """Of the weights."""
    forecast: Forecast | None = None
    no_forecast: str | None = None
    refused: str | None = None
    """What the full run says instead of beginning."""
    no_room: str | None = None
    """What a step at full size said that did not fit the memory."""
    finds_batch: bool = False
    """By `batch.find`."""
    batch: int = 32
    """Images that a process of the full run has at once."""

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, 95 %."""
        return wilson_interval(self.hits, self.val)


def _ended(facts: Facts) -> Fault | None:
    return facts.ended_by


def _missing(facts: Facts) -> Fault | None:
    if not facts.missing:
        return None
    names = ", ".join(facts.missing[:5]) + (" ..." if len(facts.missing) > 5 else "")
    return Fault(
        "class missing in val",
        f"no val image of {len(facts.missing)} of {facts.classes} classes ({names}): nothing will be known of them",
        "add val images of these classes, or prepare the data again with a val split of every class (--val 0.2)",
    )


def _exact(facts: Facts) -> Fault | None:
    if not facts.leaks.exact:
        return None
    reason = f"{facts.leaks.exact:,} images are in train and in val"
    return Fault("leak", reason, "prepare the data again, with `tlearn prepare`, which drops them")


def _copied(facts: Facts) -> Fault | None:
    return _copies(facts) if facts.leaks.share >= COPIES else None


def _some_copied(facts: Facts) -> Fault | None:
    return _copies(facts) if 0 < facts.leaks.share < COPIES else None


def _copies(facts: Facts) -> Fault:
    leaks = facts.leaks
    train, val = leaks.looked_at
    first = leaks.listed[0]
    seen = leaks.copies / val
    more = f", at least {leaks.share:.0%} if the other {leaks.train - train:,} train images are alike"
    return Fault(
        "leak",
        f"{leaks.copies} of {val:,} val images ({seen:.0%}{more * (leaks.share > seen)}) have a near copy in train, "
        f"such as {first.val} and {first.train}",
        "keep copies of a picture in one split; verdict.json lists some",
    )


def _normalisation(facts: Facts) -> Fault | None:
    if facts.normalised is None or facts.own is None:
        return None
    (mean, std), (own_mean, own_std) = facts.normalised, facts.own
    off = max(abs(a - b) / s for a, b, s in zip(mean, own_mean, own_std, strict=True))
    stretch = max(max(a / b, b / a) for a, b in zip(std, own_std, strict=True))
    if off <= OFF and stretch <= STRETCH:
        return None
    return Fault(
        "normalisation",
        f"images are normalised by mean {_list(mean)} and deviation {_list(std)}, but the weights know pixels of "
        f"{_list(own_mean)} and {_list(own_std)}: the means are {off:.2g} deviations apart",
        "set data.normalise=weights",
    )


def _list(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _no_progress(facts: Facts) -> Fault | None:
    # other terms of an objective may rise, as a discriminator's does
    if not facts.losses or facts.losses[-1] is None or not facts.loss_is_of_labels:
        return None
    first, last, guess = facts.losses[0], facts.losses[-1], log(facts.classes)
    if last >= FALLS * guess:
        numbers = f"train loss of the last epoch {last:.3f}; a guess has ln({facts.classes}) = {guess:.3f}"
    elif len(facts.losses) > 1 and first is not None and last >= first and last > guess / 2:
        numbers = f"train loss {first:.3f} in the first epoch, {last:.3f} in the last"
    else:
        return None
    return Fault(
        "loss does not fall", numbers, "look at labels and augmentation, or try other rates: tlearn advise RUN"
    )


def _rates(facts: Facts) -> Fault | None:
    # of a few steps the loss may rise by chance, of whole epochs it does not
    losses = [loss for loss in facts.losses if loss is not None]
    guess = log(facts.classes)
    rises = any(after > max(RISE * before, guess / 2) for before, after in pairwise(losses)) and facts.loss_is_of_labels
    many = facts.skipped > SKIPPED * facts.steps
    signs = [sign for sign in facts.too_fast if (many if sign.symptom == NOT_FINITE else rises)]
    if not signs:
        return None
    return Fault("rates too high", f"{signs[0].symptom}: {signs[0].numbers}", f"set {signs[0].options}")


def _refused(facts: Facts) -> Fault | None:
    if facts.refused is None:
        return None
    return Fault("full run", f"it would not begin: {facts.refused}", "")


def _memory(facts: Facts) -> Fault | None:
    fix = f"set batch.micro={max(1, facts.batch // 2)} or batch.find=true"
    if facts.no_room is not None:
        return Fault("memory", f"a step of the full run does not fit: {facts.no_room}", fix)
    forecast = facts.forecast
    if forecast is None:
        return None
    room = forecast.room
    device_mib = 0.0 if facts.finds_batch else forecast.device_mib or 0.0  # with batch.find: of attempts that failed
    needs = [
        ("of this machine", forecast.memory_mib * room.processes, room.memory_mib),
        ("of the accelerator", device_mib, room.device_mib or float("inf")),
    ]
    for whose, needed, there in needs:
        if needed > FULL * there:
            return Fault(
                "memory",
                f"the full run at {forecast.image_size_px} px needs {needed / 1024:.1f} of the {there / 1024:.1f} GiB "
                + whose,
                fix,
            )
    return None


def _dropped(facts: Facts) -> Fault | None:
    if not facts.leaks.dropped:
        return None
    kinds = ", ".join(f"{n:,} times {kind}" for kind, n in sorted(facts.leaks.dropped.items()))
    return Fault(
        "leak in the source",
        f"{kinds}; `prepare` has dropped copies, so these data are clean",
        "mend the source for other uses of it; audit.json names the files",
    )


def _waiting(facts: Facts) -> Fault | None:
    if facts.forecast is None or facts.forecast.waiting < WAITING:
        return None
    return Fault(
        "input-bound",
        f"the full run will wait for images {facts.forecast.waiting:.0%} of its training time",
        "raise data.workers, or prepare smaller files (tlearn prepare --max-side)",
    )


def _unlooked(facts: Facts) -> Fault | None:
    if facts.leaks.unseen is None:
        return None
    return Fault("near copies", f"were not looked for: {facts.leaks.unseen}", "")


def _unforeseen(facts: Facts) -> Fault | None:
    if facts.no_forecast is None:
        return None
    return Fault("full run", f"its time and memory are not known: {facts.no_forecast}", "")


Look = Callable[[Facts], Fault | None]
FAULTS: tuple[Look, ...] = (_ended, _missing, _exact, _copied, _no_progress, _rates, _refused, _memory)
WARNINGS: tuple[Look, ...] = (_dropped, _some_copied, _normalisation, _waiting, _unlooked, _unforeseen)
