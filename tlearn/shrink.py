"""What `--quick` sets: the same stages on fewer and smaller images, shorter, their schedules in proportion.

A function of the config alone, so that two quick runs are equal. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tlearn.config import Config


def changes(config: Config) -> Iterator[tuple[str, Any]]:
    """Option and value of all that `--quick` sets."""
    quick = config.quick
    yield "data.score_test", False
    yield "data.image_size", min(config.data.image_size or quick.image_size, quick.image_size)
    if config.data.stream is not None:
        yield "data.stream.train_samples", min(config.data.stream.train_samples, quick.samples)
    else:
        for key in ("max_train", "max_val"):
            yield f"data.{key}", min(getattr(config.data, key) or quick.samples, quick.samples)
    yield "batch.size", min(config.batch.size, quick.samples)
    if config.stages is None:
        epochs = min(config.epochs, quick.epochs)
        yield "epochs", epochs
        yield from _shortened("schedule", config.schedule, epochs / config.epochs)
        return
    before = [stage.epochs for stage in config.stages]
    after = _shares(before, quick.epochs)
    yield from _shortened("schedule", config.schedule, sum(after) / sum(before))
    for i, (stage, epochs) in enumerate(zip(config.stages, after, strict=True)):
        yield f"stages.{i}.epochs", epochs
        if stage.image_size is not None:
            yield f"stages.{i}.image_size", min(stage.image_size, quick.image_size)
        if stage.schedule is not None:
            yield from _shortened(f"stages.{i}.schedule", stage.schedule, epochs / stage.epochs)


def _shares(epochs: Sequence[int], total: int) -> list[int]:
    """`total` epochs shared out in proportion, at least one each; what is shorter already stays as it is."""
    if sum(epochs) <= total:
        return list(epochs)
    shares = [1] * len(epochs)
    for _ in range(total - len(epochs)):
        # the stage that is furthest below its share
        i = max(range(len(epochs)), key=lambda i: epochs[i] / shares[i])
        shares[i] += 1
    return shares


def _shortened(key: str, schedule: Any, ratio: float) -> Iterator[tuple[str, Any]]:
    """Everything in a schedule that is measured in epochs."""
    if ratio < 1:
        for name in ("warmup_epochs", "step_epochs", "t_0"):
            value = getattr(schedule, name, None)
            if value and not isinstance(value, str):  # shares of the stage shrink with it
                yield f"{key}.{name}", value * ratio
