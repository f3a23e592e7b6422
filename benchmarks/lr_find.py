"""Do the rates that `tlearn lr-find` suggests train as well as others? The head of the demo's recipe, on its pictures.

    python benchmarks/lr_find.py [--splits 3] [--rates 1e-3 3e-3 1e-2] [WORK_FOLDER]

On every 70/30 split the head's rate is looked for, then heads are trained for 12 epochs (Adam, cosine; frozen layers
are stored) at a range of rates and at what three readings of the curve give. Val top-1 of the best epoch (chosen on
val) and of the last one (chosen on nothing), and the val loss of the last. A run that was finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

from datasets import make
from strategies import COMMON

from tlearn import load_config, prepare, train
from tlearn.data.plan import Options
from tlearn.lrfind import find_rates

STAGES = "stages=[{name: head, epochs: 12, views: 4, train: [[head, 1.0], ['.*', 0]]}]"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
Scores = tuple[float, float, float]


def main() -> None:
    """Train everything, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo/lr_find"))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    pictures = make("tux10", folder / "pictures")
    os.environ["TLEARN_CACHE"] = str(folder / "cache")  # stored features go with the folder
    rows: dict[str, list[Scores]] = {}
    for seed in range(arguments.splits):
        data = folder / f"data-{seed}"
        n = len(prepare(pictures, data, Options(val=0.3, seed=seed)).splits["val"])
        options = [*COMMON, STAGES, "optimizer.name=adam", f"data.path={data}", f"seed={seed}"]
        (test,) = find_rates(load_config(None, options), None, folder / f"curve-{seed}")["tests"]
        suggested = {"suggested": test["suggestion"], **test["others"]}
        print(f"split {seed}, {n} val images: " + ", ".join(f"{name} {rate:.2g}" for name, rate in suggested.items()))
        for name, rate in {**{f"{rate:g}": rate for rate in arguments.rates}, **suggested}.items():
            rows.setdefault(name, []).append(_trained(folder / f"run-{seed}-{rate:g}", options, rate))
    print(f"\nval top-1 at 128 px in %, {arguments.splits} splits\n")
    print("| rate | best epoch | last epoch | last val loss |\n|---|---|---|---|")
    for name, scores in rows.items():
        best, last, loss = (statistics.mean(column) for column in zip(*scores, strict=True))
        print(f"| {name} | {100 * best:.1f} | {100 * last:.1f} | {loss:.3f} |")


def _trained(run: Path, options: list[str], rate: float) -> Scores:
    if not (run / "result.json").exists():
        train(load_config(None, [*options, f"optimizer.lr={rate:g}"]), run)
    best = json.loads((run / "result.json").read_text())["val"]["top1"]
    last = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if row["kind"] == "epoch"][-1]
    return best, last["val/top1@128"], last["val/loss@128"]


if __name__ == "__main__":
    main()
