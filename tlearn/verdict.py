"""Go, no-go or unsure: the decision after a quick run, a pure function of what was measured. No torch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from tlearn.faults import FAULTS, WARNINGS, Facts, Fault
from tlearn.metrics import wilson_interval

Word = Literal["go", "no-go", "unsure"]
EXIT_CODES: dict[Word, int] = {"go": 0, "no-go": 3, "unsure": 4}

WIDE = 0.1
"""Half an interval of accuracy: from here on it is too wide to decide on."""
NEAR = 0.15
"""Of what the majority class gets wrong: where the upper end of the interval is within, more images are of no use."""
MANY_STEPS, MANY_EPOCHS = 50, 3
"""A shorter training is not compared with a probe that was trained to its end."""
SIGNIFICANT = 0.05


class Verdict(NamedTuple):
    """The word, why, and what else there is to know."""

    word: Word
    reasons: list[str]
    faults: list[Fault]
    warnings: list[Fault]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": self.word,
            "exit_code": EXIT_CODES[self.word],
            "reasons": self.reasons,
            "faults": [fault._asdict() for fault in self.faults],
            "warnings": [warning._asdict() for warning in self.warnings],
        }


def decide(facts: Facts) -> Verdict:
    """The verdict.

    unsure: stopped by the clock, or the accuracy's interval is too wide; no-go: a fault, or an accuracy that may as
    well be the majority class's; go: an accuracy above it, and not significantly below the linear probe's.
    """
    faults = [fault for look in FAULTS if (fault := look(facts)) is not None]
    warnings = [warning for look in WARNINGS if (warning := look(facts)) is not None]
    if facts.stopped:
        done = f"quick.minutes stopped it after {len(facts.losses)} of {facts.epochs} epochs; the same command goes on"
        return Verdict("unsure", [done], faults, warnings)
    word, reasons = _by_accuracy(facts) if facts.val else ("no-go", [])
    reasons += map(str, faults)
    return Verdict("no-go" if faults else word, reasons, faults, warnings)


def _by_accuracy(facts: Facts) -> tuple[Word, list[str]]:
    low, high = facts.interval
    chance, top1 = facts.majority / facts.val, facts.hits / facts.val
    scored = (
        f"val/top1@{facts.image_size_px} {top1:.1%} after the last epoch (95 % interval {low:.1%} to {high:.1%}, "
        f"{facts.val:,} images); the largest class is {chance:.1%}"
    )
    if (high - low) / 2 > WIDE:
        enough = next(n for n in range(facts.val, 10**4) if _half_width(top1, n) <= WIDE)
        why = f"the interval is too wide to decide on: about {enough:,} val images would do"
        return "unsure", [scored, why]
    if low <= chance:
        if high - chance <= NEAR * (1 - chance):
            why = (
                "that is no better than always answering the largest class: labels and pictures do not go together, or "
            )
            return "no-go", [scored, why + _whose_fault(facts)]
        enough = next((n for n in range(facts.val, 10**5, 10) if _low(top1, n) > chance), 10**5)
        return "unsure", [scored, f"it may be chance: if it stays so, about {enough:,} val images would tell"]
    if facts.against is None:
        return "go", [scored, f"above the largest class; no linear probe beside it: {facts.no_probe}"]
    run, probe = (facts.against.both + n for n in (facts.against.only_run, facts.against.only_probe))
    beside = (
        f"a linear probe of frozen features has {probe} of them right, the best epoch {run} "
        f"(McNemar's exact test: p {facts.against.p:.2g})"
    )
    if run < probe and facts.against.p < SIGNIFICANT:
        if facts.still_improving or facts.steps < MANY_STEPS or len(facts.losses) < MANY_EPOCHS:
            return "unsure", [scored, f"{beside}; it was short, or still improving: raise quick.epochs"]
        fix = "try strategy=feature_extraction, or lower rates for the layers behind the head"
        return "no-go", [scored, f"significantly below what costs nothing: {beside}; {fix}"]
    return "go", [scored, f"above the largest class, and not significantly below what costs nothing: {beside}"]


def _whose_fault(facts: Facts) -> str:
    """The other explanation of an accuracy at chance."""
    if facts.against is None:
        return "the recipe does not learn"
    probe = facts.against.both + facts.against.only_probe
    low, _ = wilson_interval(probe, facts.val)
    if low > facts.majority / facts.val:
        return f"rather the recipe does not learn: a linear probe has {probe} of {facts.val} right"
    return f"the backbone sees no difference (a linear probe has {probe} of {facts.val} right); look at some labels"


def _half_width(share: float, n: int) -> float:
    low, high = wilson_interval(round(share * n), n)
    return (high - low) / 2


def _low(share: float, n: int) -> float:
    return wilson_interval(round(share * n), n)[0]
