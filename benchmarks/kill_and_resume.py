"""Random recipes, killed and resumed at random moments: is the rest of the run the same to the bit?

    python benchmarks/kill_and_resume.py [POINTS] [--seed N]      (make soak: 30 points)

Every recipe has three stages, and draws its optimizers, schedules (warm restarts among them), accumulation, precision,
loader workers, processes and how often it saves. Exit code 1 if a run differs from the one that nobody touched.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import datasets

from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.data.prepare import prepare
from tlearn.drill import compare
from tlearn.launch import run_ranks
from tlearn.run import train

KILLS_PER_RECIPE = 5


class Outcome(NamedTuple):
    """Of one recipe."""

    points: int
    """Interruptions."""
    difference: str | None
    recipe: str


def recipe(data: Path, chance: random.Random) -> tuple[Config, int]:
    """A run of a few seconds and its number of processes."""
    optimizers = ("{name: adam, lr: 0.01}", "{name: adamw, lr: 0.003}", "{name: sgd, lr: 0.01, momentum: 0.9}")
    schedules = (
        "{name: cosine_warm_restarts, t_0: 1, t_mult: 2}",
        "{name: cosine_warm_restarts, t_0: 50%, t_mult: 1, warmup_epochs: 0.5}",
        "{name: step, step_epochs: 0.7}",
        "{name: cosine}",
    )
    rules = ("[[head, 1.0], ['.*', 0]]", "[[head, 1.0], ['last:1', 0.5], ['.*', 0]]", "[['.*', 1.0]]")
    stages = [
        f"{{name: s{i}, epochs: {chance.randint(1, 3)}, train: {rules[i]}, optimizer: {chance.choice(optimizers)}, "
        f"schedule: {chance.choice(schedules)}, image_size: {chance.choice((32, 40))}}}"
        for i in range(3)
    ]
    options = [
        f"data.path={data}",
        f"data.workers={chance.choice((0, 1, 2))}",
        "data.image_size=32",
        "model={backbone: test_efficientnet, weights: random}",
        f"model.batch_norm={chance.choice(('frozen', 'train'))}",
        f"model.dropout={chance.choice((0.0, 0.3))}",
        f"stages=[{', '.join(stages)}]",
        f"batch={{size: {chance.choice((24, 33))}, micro: {chance.choice((5, 12, 40))}}}",
        f"precision={chance.choice(('fp32', 'bf16'))}",
        f"save_every={{epochs: {chance.choice((1, 2))}, steps: {chance.choice((2, 5, 100))}}}",
        f"keep={{best: {chance.choice((1, 3))}}}",
        f"seed={chance.randint(0, 99)}",
        "tracking.wandb.mode=disabled",
        "run.audit=true",
    ]
    return load_config(None, options), chance.choice((1, 1, 2))


def hunt(data: Path, folder: Path, seed: int, kills: int = KILLS_PER_RECIPE) -> Outcome:
    """One random recipe, once without and once with interruptions."""
    chance = random.Random(seed)
    config, nproc = recipe(data, chance)
    whole = folder / f"whole-{seed}"
    run_ranks(train, (config, whole), nproc)
    leg = compare(f"recipe {seed}", config, whole, folder / f"killed-{seed}", [nproc] * (kills + 1), chance)
    stages = "; ".join(f"{s.epochs} x {s.optimizer.name}, {s.schedule.name}" for s in config.stages or [])
    about = f"{nproc} processes, {config.precision}, micro {config.batch.micro}, {stages}"
    return Outcome(len(leg.interruptions), leg.first_difference, about)


def main() -> None:
    """Hunt until enough interruptions were survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=int, nargs="?", default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        prepare(datasets.make("photo_crops", folder / "crops"), data)
        points, seed, different = 0, arguments.seed, 0
        while points < arguments.points:
            outcome = hunt(data, folder, seed)
            points, seed = points + outcome.points, seed + 1
            different += outcome.difference is not None
            print(f"{outcome.difference or 'equal':6s}  {outcome.points} interruptions  {outcome.recipe}", flush=True)
    print(f"{points} interruptions of {seed - arguments.seed} recipes, {different} of which differ")
    raise SystemExit(different > 0)


if __name__ == "__main__":
    main()
