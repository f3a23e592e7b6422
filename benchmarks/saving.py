"""What does a checkpoint cost: the pause of the loop, and the slowdown of the steps beside the write?

    python benchmarks/saving.py [--rounds N]      (about 5 minutes)

Each model trains in full with Adam on random images. In turn: a checkpoint written beside training (as `tlearn train`
does), the same written while the loop waits, and `torch.save` of the same tensors to one file while the loop waits,
with fsync, without hashes. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tlearn import checkpoint
from tlearn.checkpoint import Progress, State, copied
from tlearn.config import Adam, Keep, SaveEvery
from tlearn.configfile import load_config
from tlearn.models.build import build_model
from tlearn.optim import build_optimizer, named_state
from tlearn.saver import Saver
from tlearn.tracking import Tracker

MODELS = (("tf_efficientnet_lite0", 96, 16), ("resnet50", 96, 16), ("vit_base_patch16_224", 96, 8))
"""Name, image size in px, batch size."""


class Training:
    """One optimizer step after the other."""

    def __init__(self, name: str, size_px: int, batch_size: int) -> None:
        options = ["data.path=x", f"model.backbone=timm:{name}", "model.weights=random", f"data.image_size={size_px}"]
        self.net = build_model(load_config(None, options), 10).net.train()
        self.optimizer = build_optimizer(Adam(), self.net, {name: 1.0 for name, _ in self.net.named_parameters()})
        self.images = torch.randn(batch_size, 3, size_px, size_px).to(memory_format=torch.channels_last)
        self.progress = Progress()

    def step(self) -> float:
        """Seconds."""
        start = time.perf_counter()
        self.net(self.images).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return time.perf_counter() - start

    @property
    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Of the model and of the optimizer."""
        return self.net.state_dict(), named_state(self.optimizer)


def save_with_torch(path: Path, training: Training) -> None:
    """The peer: one pickle, fsynced, put in place."""
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        torch.save(training.tensors, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def timed(action: Callable[[], object]) -> float:
    """Seconds that a call took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(training: Training, folder: Path, rounds: int) -> str:
    """A row of the table."""
    inactive = Tracker(load_config(None, ["data.path=x"]), folder, 0, None, active=False)
    saver = Saver(folder / "beside", folder / "best", None, inactive, SaveEvery(), Keep(), active=True)
    waiting, peer = [], []
    for _ in range(3):
        training.step()
    for _ in range(rounds):
        for _ in range(6):
            saver.step_took(training.step())
        saver.save(*training.tensors, training.progress)
        while saver.is_writing:
            saver.step_took(training.step())
        model, optimizer = training.tensors
        state = State(copied(model), copied(optimizer), training.progress)
        waiting.append(timed(lambda: checkpoint.save(folder / "waiting", state, 2, None)))  # noqa: B023
        peer.append(timed(lambda: save_with_torch(folder / "peer.pt", training)))
    saver.wait()
    account = saver.cost.account()
    mib = sum(t.numel() * t.element_size() for tensors in training.tensors for t in tensors.values()) / 2**20
    alone = statistics.median(saver.cost.steps_s[False])
    return (
        f"{mib:9.0f} | {alone:6.3f} | {account['save/pause_s']:15.3f} | {account['save/write_s']:15.2f} | "
        f"{account['save/slowdown']:16.2f} | {statistics.median(waiting):16.2f} | {statistics.median(peer):12.2f}"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    columns = (
        "state MiB",
        "step s",
        "beside: pause s",
        "beside: write s",
        "beside: slowdown",
        "waiting: pause s",
        "torch.save s",
    )
    print(f"{'model':21s} | " + " | ".join(columns))
    for name, size_px, batch_size in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name:21s} | {measure(Training(name, size_px, batch_size), Path(folder), rounds)}", flush=True)


if __name__ == "__main__":
    main()
