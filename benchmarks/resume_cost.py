"""What does it cost to go on at step 10, and at step 1,000,000?

    python benchmarks/resume_cost.py      (about 2 minutes)

Time from the start of `train` to the end of its first step, in a fresh process, for a run whose checkpoint says that it
has done so many steps, with a metrics.jsonl of that length. Rounds in turn, medians.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets

from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.data.prepare import prepare
from tlearn.files import sha256
from tlearn.launch import run_ranks
from tlearn.run import train
from tlearn.tracking import Tracker

STEPS, ROUNDS = (10, 1_000_000), 5
STEPS_PER_EPOCH = 7
"""200 images in batches of 32."""


class EnoughError(Exception):
    """One step was taken."""


def stop_at(step: int) -> None:
    """From here on a run ends by EnoughError when it logs this step."""
    log = Tracker.log

    def log_until(self: Tracker, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == step:
            raise EnoughError

    Tracker.log = log_until  # type: ignore[method-assign]


def make_run(config: Config, folder: Path, step: int) -> Path:
    """A run of one stage that stands at `step`: one that did a single step, with another number in its checkpoint."""
    log = Tracker.log
    stop_at(2)
    try:
        train(config.model_copy(update={"save_every": config.save_every.model_copy(update={"steps": 1})}), folder)
    except EnoughError:
        pass
    finally:
        Tracker.log = log  # type: ignore[method-assign]
    done = folder / "checkpoints" / "step-00000001"
    row = (folder / "metrics.jsonl").read_bytes().partition(b"\n")[0] + b"\n"
    with (folder / "metrics.jsonl").open("wb") as file:
        for first in range(0, step, 10_000):
            file.write(row * min(10_000, step - first))
    progress = json.loads((done / "progress.json").read_text())
    progress |= {
        "step": step,
        "stage_step": step,
        "stage_epochs": step // STEPS_PER_EPOCH,
        "metrics_bytes": step * len(row),
    }
    (done / "progress.json").write_text(json.dumps(progress))
    manifest = json.loads((done / "manifest.json").read_text())
    entry = manifest["files"]["progress.json"]
    entry["bytes"], entry["sha256"] = (done / "progress.json").stat().st_size, sha256(done / "progress.json")
    (done / "manifest.json").write_text(json.dumps(manifest))
    done.rename(done.with_name(f"step-{step:08d}"))
    return folder


def first_step_s(config: Config, folder: Path, step: int) -> float:
    """Go on from `step` for one step; seconds."""
    stop_at(step + 1)
    start = time.perf_counter()
    try:
        train(config, folder)
    except EnoughError:
        return time.perf_counter() - start
    raise AssertionError("no step was taken")


def main() -> None:
    """Print a line per number of steps."""
    import resume_cost as this  # ranks cannot import the functions of a program's main module

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = root / "data"
        prepare(datasets.make("photo_crops", root / "crops"), data)
        config = load_config(
            None,
            [
                f"data.path={data}",
                "data.image_size=32",
                "model={backbone: test_efficientnet, weights: random}",
                "stages=[{name: head, epochs: 200000, train: [[head, 1.0], ['.*', 0]]}]",
                "precision=fp32",
                "tracking.wandb.mode=disabled",
            ],
        )
        for step in STEPS:
            run_ranks(this.make_run, (config, root / str(step), step), 1)
        seconds: dict[int, list[float]] = {step: [] for step in STEPS}
        for _ in range(ROUNDS):
            for step in STEPS:
                seconds[step] += run_ranks(this.first_step_s, (config, root / str(step), step), 1)
        for step in STEPS:
            size_mib = (root / str(step) / "metrics.jsonl").stat().st_size / 2**20
            spread = f"{min(seconds[step]):.2f} to {max(seconds[step]):.2f}"
            median = statistics.median(seconds[step])
            print(f"at step {step:9,d} (metrics.jsonl {size_mib:5.1f} MiB): {median:.2f} s ({spread})")


if __name__ == "__main__":
    main()
