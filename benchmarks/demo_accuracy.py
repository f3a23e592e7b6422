"""What the demo's recipe reaches: the ten-class set, 5 seeded 70/30 splits, pretrained and random weights.

    python benchmarks/demo_accuracy.py [--splits 5] [WORK_FOLDER]

Each row is the mean over the splits of the val top-1 of the best epoch (chosen on val) and of the last epoch
(chosen on nothing). Takes about 2 minutes per training run on 2 cores; a run that was finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from datasets import make

from tlearn import load_config, prepare, train
from tlearn.data.plan import Options

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
VARIANTS = {"Lite0 weights": [], "random weights": ["model.weights=random"]}


def main() -> None:
    """Train everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/accuracy"))
    parser.add_argument("--splits", type=int, default=5)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    pictures = make("tux10", folder / "pictures")
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    images = []
    for seed in range(arguments.splits):
        data = folder / f"data-{seed}"
        images.append(len(prepare(pictures, data, Options(val=0.3, seed=seed)).splits["val"]))
        for name, options in VARIANTS.items():
            run = folder / f"run-{seed}-{name.split()[0]}"
            config = load_config(CONFIG, [f"data.path={data}", f"seed={seed}", *options])
            result = json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else None
            best = (result or train(config, run))["val"]["top1"]
            epochs = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if row["kind"] == "epoch"]
            scores[name].append((best, epochs[-1][f"val/top1@{config.data.image_size}"]))
    sizes = f"{min(images)}-{max(images)}"
    print(f"\nval top-1 at 128 px, mean (sd) over {arguments.splits} splits of {sizes} val images\n")
    print("| start | best epoch | last epoch |\n|---|---|---|")
    for name, pairs in scores.items():
        cells = []
        for values in zip(*pairs, strict=True):
            percent = [100 * value for value in values]
            spread = statistics.stdev(percent) if len(percent) > 1 else float("nan")
            cells.append(f"{statistics.mean(percent):.1f} ({spread:.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
