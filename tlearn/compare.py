"""`tlearn compare`: several recipes, trained on the same images with the same seeds, and one table. Imports no torch.

FOLDER/NAME/seed-S/       the run folder; NAME is the config's file stem
FOLDER/NAME/seed-S.yaml   what was asked for, with the options of the command line
FOLDER/NAME/seed-S.json   processes that worked on it: when, how long, how much memory
FOLDER/NAME/seed-S.log    what they printed
FOLDER/compare.*          json (everything), md (the table), png (accuracy over epochs)
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlearn.apart import Job, check_not_launched, check_same_images, machine_of, train_all
from tlearn.comparison import draw, markdown, notes, read_run, summarise
from tlearn.configfile import load_config
from tlearn.console import show
from tlearn.errors import TlearnError
from tlearn.files import write_json, write_text


def compare(
    files: Sequence[Path], overrides: Sequence[str], folder: Path, *, seeds: int = 3, nproc: int = 1
) -> dict[str, Any]:
    """Train every recipe with every seed, in turn, each run in a process of its own; finished runs are kept.

    Args:
        files: a config per recipe; its name is the file's stem.
        overrides: `a.b=c` for all of them.
        folder: for runs and tables.
        seeds: 0, 1, ...
        nproc: processes of each run.

    Returns:
        What compare.json holds; `failed` counts the runs that failed.

    Raises:
        TlearnError: recipes that cannot be compared, a folder that holds other runs; nothing was trained.
        StoppedBySignalError: the run that was under way is saved; the same call goes on.
    """
    jobs = _jobs(files, overrides, seeds, folder)
    for job in jobs:
        job.note_what_is_asked()
    failed = train_all("compare", [job for job in jobs if not job.is_finished], nproc=nproc)
    names = dict.fromkeys(job.name for job in jobs)
    done = [job for job in jobs if job.is_finished]
    recipes = {n: [read_run(j.folder, j.seed, j.attempts()) for j in done if j.name == n] for n in names}
    command = ["tlearn", "compare", *map(str, files), *overrides, "--seeds", str(seeds), "--out", str(folder)]
    report = {
        "command": shlex.join(command + (["--nproc", str(nproc)] if nproc > 1 else [])),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine_of(done),
        "seeds": list(range(seeds)),
        "failed": failed,
        "recipes": (rows := summarise(recipes, range(seeds))),
        "notes": notes(rows),
    }
    write_json(folder / "compare.json", report)
    write_text(folder / "compare.md", markdown(report))
    draw(rows, folder / "compare.png")
    show(f"compare   {folder}/compare.json, compare.md, compare.png")
    return report


def _jobs(files: Sequence[Path], overrides: Sequence[str], seeds: int, folder: Path) -> list[Job]:
    """All runs, the recipes in turn, so that a machine that becomes slower or faster favours none."""
    if len(files) < 2:
        raise TlearnError("compare takes two configs or more, and options a.b=c for all of them")
    if any(text.partition("=")[0] == "seed" for text in overrides):
        raise TlearnError("the command line: seed has no effect: --seeds N trains every recipe with seeds 0 to N-1")
    check_not_launched("compare")
    stems = [file.stem for file in files]
    if twice := sorted({str(file) for file in files if stems.count(file.stem) > 1}):
        raise TlearnError(f"{', '.join(twice)}: these recipes have one name; rename a file")
    jobs = [
        Job(file.stem, seed, load_config(file, [*overrides, f"seed={seed}"]), folder / file.stem / f"seed-{seed}")
        for seed in range(seeds)
        for file in files
    ]
    check_same_images([(job.name, job.config) for job in jobs if job.seed == 0])
    for job in jobs:
        job.check_folder()
    return jobs
