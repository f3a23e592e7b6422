"""What a full run will take, from a few of its steps: seconds, images/s, memory. Arithmetic alone, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

REST = 0.02
"""Of a training step, at least: what is left of it where the outputs of all layers but the head are stored."""


@dataclass(frozen=True)
class StageCost:
    """What was measured of a stage, and how long the full run stays in it."""

    name: str
    epochs: int
    image_s: float
    """Of training an image, every layer computing, in a step with this process's part of the batch; images were there
    already, as at the beginning of a run."""
    views: int | None
    """Changed versions of an image, where the outputs of its frozen layers are stored; None: they are not."""


@dataclass(frozen=True)
class Measured:
    """What a trial of a few steps at full size showed."""

    stages: tuple[StageCost, ...]
    val_image_s: float
    """To evaluate an image."""
    loaded_per_s: float
    """Images that the loader gives while nothing is computed."""
    shared: float
    """Of the cores on which the network computes, what the loader takes to give so many; 0 on an accelerator."""
    once_s: float
    """What comes once in a run: building the model, the first and the last words."""
    memory_mib: float
    """Peak of the process's own memory."""
    device_mib: float | None
    """Peak of an accelerator's memory."""
    image_size_px: int


@dataclass(frozen=True)
class Room:
    """What the machine has."""

    memory_mib: float
    device_mib: float | None
    processes: int
    """Of the run, on this machine."""


@dataclass(frozen=True)
class Forecast:
    """What a full run will take."""

    wall_s: float
    """From the start of training to its result; a patience that ends a stage early is not foreseen."""
    images_per_s: float
    """Training images of all epochs over `wall_s`."""
    memory_mib: float
    """Peak of one process; its loader workers come on top."""
    device_mib: float | None
    waiting: float
    """Share of a step's time in which the network waits for images."""
    image_size_px: int
    stage_s: dict[str, float]
    room: Room

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "wall_s": round(self.wall_s, 1),
            "train_images_per_s": round(self.images_per_s, 2),
            "memory_mib": round(self.memory_mib, 1),
            "device_mib": self.device_mib,
            "waiting": round(self.waiting, 3),
            "image_size_px": self.image_size_px,
            "stage_s": {name: round(seconds, 1) for name, seconds in self.stage_s.items()},
            "machine_memory_mib": round(self.room.memory_mib, 1),
            "machine_device_mib": self.room.device_mib,
        }


def forecast(measured: Measured, sizes: dict[str, int], processes: int, room: Room) -> Forecast:
    """Images times their seconds, evaluations, and what comes once.

    Frozen layers whose outputs are stored run once per image and view, and what training an image then still takes is
    what it took less a forward through the network. Stages share what is stored, so images are looked at again only
    for the views that no stage before had.

    Args:
        measured: by one process.
        sizes: images per split of the full run.
        processes: that train together.
        room: of the machine.
    """
    train, val = ceil(sizes["train"] / processes), ceil(sizes["val"] / processes)
    loading_s, val_s = 1 / measured.loaded_per_s, val * measured.val_image_s
    beside_s = measured.shared * loading_s
    seconds, computing_s, training_s, looked = dict[str, float](), 0.0, 0.0, 0
    for stage in measured.stages:
        images = stage.epochs * train
        if stage.views is None:
            own_s = stage.image_s + beside_s
            seconds[stage.name] = images * max(own_s, loading_s) + stage.epochs * val_s
            computing_s += images * own_s
            training_s += images * max(own_s, loading_s)
            continue
        rest_s = max(stage.image_s - max(0.0, measured.val_image_s - beside_s), REST * stage.image_s)
        fill_s = max(0, stage.views - looked) * train * max(measured.val_image_s, loading_s) + val_s * (looked == 0)
        looked = max(looked, stage.views)
        seconds[stage.name] = fill_s + images * rest_s
    last_s = sum(ceil(sizes.get(name, 0) / processes) for name in ("val", "test", "target")) * measured.val_image_s
    wall_s = sum(seconds.values()) + last_s + measured.once_s
    return Forecast(
        wall_s=wall_s,
        images_per_s=sum(stage.epochs for stage in measured.stages) * sizes["train"] / wall_s,
        memory_mib=measured.memory_mib,
        device_mib=measured.device_mib,
        waiting=1 - computing_s / training_s if training_s else 0.0,
        image_size_px=measured.image_size_px,
        stage_s=seconds,
        room=room,
    )
