"""What trains when: named strategies as lists of stages, and rules resolved to a rate for every parameter.

A strategy is a function from Config to stages, pure data; the engine never asks which one runs. No torch here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

from tlearn.config import Config, Rule, Stage
from tlearn.errors import TlearnError

HEAD_ONLY: list[Rule] = [("head", 1.0), (".*", 0.0)]
LAST_BLOCK: list[Rule] = [("head", 1.0), ("last:1", 0.1), (".*", 0.0)]
ALL: list[Rule] = [("head", 1.0), (".*", 0.1)]
"""Pretrained layers take a tenth of the head's rate, so that they are tuned and not overwritten."""


def feature_extraction(epochs: int) -> list[Stage]:
    """The backbone stays as it is; only the head learns."""
    return [Stage(name="head", epochs=epochs, train=HEAD_ONLY)]


def partial(epochs: int) -> list[Stage]:
    """The head and the last block."""
    return [Stage(name="last_block", epochs=epochs, train=LAST_BLOCK)]


def full(epochs: int) -> list[Stage]:
    """Everything at once."""
    return [Stage(name="all", epochs=epochs, train=ALL)]


def staged(epochs: int) -> list[Stage]:
    """Head first, then the last block, then all: LP-FT (Kumar et al. 2022, "Fine-tuning can distort pretrained
    features and underperform out-of-distribution") with a step between."""
    lengths = _share(epochs, 3)
    return [
        Stage(name=name, epochs=length, train=rules)
        for name, length, rules in zip(
            ("head", "last_block", "all"), lengths, (HEAD_ONLY, LAST_BLOCK, ALL), strict=False
        )
    ]


def progressive(epochs: int) -> list[Stage]:
    """One more block per stage, from the head down, then all: gradual unfreezing (Howard & Ruder 2018)."""
    lengths = _share(epochs, 5)
    stages = [Stage(name="head", epochs=lengths[0], train=HEAD_ONLY)]
    for depth, length in enumerate(lengths[1:-1], start=1):
        rules: list[Rule] = [("head", 1.0), (f"last:{depth}", 0.1), (".*", 0.0)]
        stages.append(Stage(name=f"last_{depth}", epochs=length, train=rules))
    if len(lengths) > 1:
        stages.append(Stage(name="all", epochs=lengths[-1], train=ALL))
    return stages


def scratch(epochs: int) -> list[Stage]:
    """The baseline without transfer: random weights, everything at one rate."""
    return [Stage(name="all", epochs=epochs, train=[(".*", 1.0)])]


STRATEGIES: dict[str, Callable[[int], list[Stage]]] = {
    "feature_extraction": feature_extraction,
    "partial": partial,
    "full": full,
    "staged": staged,
    "progressive": progressive,
    "scratch": scratch,
}


def _share(epochs: int, parts: int) -> list[int]:
    """Epochs per stage: as even as can be, none empty, earlier stages the longer ones."""
    parts = min(parts, epochs)
    return [epochs // parts + (i < epochs % parts) for i in range(parts)]


def expand(config: Config) -> Config:
    """The config with its stages listed.

    Raises:
        TlearnError: `strategy: auto`, which needs the images.
    """
    if config.stages is None and config.strategy == "auto":
        raise TlearnError(
            "strategy = 'auto': its stages are not known before the images are looked at; `tlearn train` does, and "
            f"`tlearn plan {config.data.path}` prints them"
        )
    return config.model_copy(update={"stages": config.stages or STRATEGIES[config.strategy](config.epochs)})


def filled(config: Config) -> list[Stage]:
    """The stages, each with its optimizer, schedule, image size and so on: its own or the run's.

    Raises:
        TlearnError: a warm-up that is longer than its stage.
    """
    stages = [
        stage.model_copy(
            update={
                "optimizer": stage.optimizer or config.optimizer,
                "schedule": stage.schedule or config.schedule,
                "image_size": stage.image_size or config.data.image_size,
                "views": stage.views or config.data.augment.views,
                "layer_decay": stage.layer_decay or config.layer_decay,
                "patience": stage.patience or config.patience,
            }
        )
        for stage in expand(config).stages or []
    ]
    for stage in stages:
        if stage.schedule and stage.schedule.warmup_epochs >= stage.epochs:
            raise TlearnError(
                f"stages: {stage.name}: a warm-up of {stage.schedule.warmup_epochs:g} epochs leaves nothing of the "
                f"stage's {stage.epochs}; shorten schedule.warmup_epochs"
            )
    return stages


def resolve(stage: Stage, names: Sequence[str], head: str, blocks: Sequence[Sequence[str]]) -> dict[str, float]:
    """Learning-rate multiplier of every parameter under a stage's rules: the first match wins.

    Args:
        stage: its `train` holds (pattern, multiplier) rules.
        names: all parameter names.
        head: name of the head layer.
        blocks: parameter names of the backbone's blocks, shallow to deep.

    Raises:
        TlearnError: a rule that matches nothing, a parameter that no rule matches, a stage that trains nothing.
    """
    multipliers: dict[str, float] = {}
    for pattern, multiplier in stage.train:
        matched = _matches(stage.name, pattern, names, head, blocks)
        if not matched:
            raise TlearnError(
                f"stages: {stage.name}: the rule {pattern!r} matches no parameter{_closest(pattern, names)}"
            )
        if all(name in multipliers for name in matched) and pattern != stage.train[-1][0]:
            raise TlearnError(
                f"stages: {stage.name}: the rule {pattern!r} has no effect: rules before it match the same"
            )
        for name in matched:
            multipliers.setdefault(name, multiplier)
    if unmatched := [name for name in names if name not in multipliers]:
        raise TlearnError(
            f"stages: {stage.name}: no rule matches {unmatched[0]!r} and {len(unmatched) - 1} more parameters; "
            'end the list with [".*", 0] to freeze them or [".*", 1.0] to train them'
        )
    if not any(multipliers.values()):
        raise TlearnError(f"stages: {stage.name}: every parameter has multiplier 0; nothing would train")
    decay = stage.layer_decay or 1.0
    for depth, block in enumerate(reversed(blocks), start=1):
        for name in block:
            multipliers[name] *= decay**depth
    return multipliers


def _matches(stage: str, pattern: str, names: Sequence[str], head: str, blocks: Sequence[Sequence[str]]) -> list[str]:
    if pattern == "head":
        return [name for name in names if name.startswith(f"{head}.")]
    if last := re.fullmatch(r"last:(\d+)", pattern):
        n = int(last[1])
        if not 1 <= n <= len(blocks):
            raise TlearnError(f"stages: {stage}: {pattern!r}: this backbone has 1 to {len(blocks)} blocks")
        return [name for block in blocks[-n:] for name in block]
    if layers := re.fullmatch(r"([\w.]+)\.(\d+)-(\d+)", pattern):
        prefixes = tuple(f"{layers[1]}.{i}." for i in range(int(layers[2]), int(layers[3]) + 1))
        return [name for name in names if name.startswith(prefixes)]
    try:
        return [name for name in names if re.match(pattern, name)]
    except (re.error, OverflowError) as error:
        raise TlearnError(f"stages: {stage}: {pattern!r} is no regular expression: {error}") from None


def _closest(pattern: str, names: Sequence[str]) -> str:
    prefixes = sorted({name[:i] for name in names for i in range(len(name)) if name[i] == "."})
    close = difflib.get_close_matches(pattern, prefixes, n=3, cutoff=0.5)
    return f"; close names: {', '.join(close)}" if close else f"; parameters start with: {', '.join(prefixes[:6])}"
