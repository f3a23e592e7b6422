"""Does a full run take what `--quick` says? A forecast and the run itself, in turn, each in a process of its own.

    python benchmarks/forecast.py 3 CONFIG.yaml [a.b=c ...]

Seconds are those of the training from its start to its result, without the start of Python; memory is the peak of the
process. Stored features of earlier runs would make a run shorter than was said: each run begins with an empty cache.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def foreseen(arguments: list[str]) -> tuple[float, float]:
    """Seconds and MiB that a forecast says."""
    from tlearn.configfile import load_config
    from tlearn.launch import run_ranks
    from tlearn.trial import foresee, mapped_mib

    found = run_ranks(foresee, (load_config(arguments[0], arguments[1:]), 1, 1, mapped_mib()), 1)[0]
    return found.wall_s, found.memory_mib


def taken(arguments: list[str]) -> tuple[float, float]:
    """Seconds and MiB that the run takes."""
    from tlearn.configfile import load_config
    from tlearn.run import train

    config = load_config(arguments[0], arguments[1:])
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        train(config, Path(folder) / "run")
        return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def in_a_process(role: str, arguments: list[str]) -> tuple[float, float]:
    """What `role` gives. This process imports no torch: Linux hands its peak of memory on to those it starts."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, role, *arguments, "tracking.wandb.mode=disabled"],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TLEARN_CACHE": cache},
        )
    seconds, mib = json.loads(done.stdout)
    return seconds, mib


def main(rounds: int, arguments: list[str]) -> None:
    """Print a row a round, and the medians of the ratios."""
    ratios = []
    for number in range(rounds):
        said, took = in_a_process("foreseen", arguments), in_a_process("taken", arguments)
        ratios.append((said[0] / took[0], said[1] / took[1]))
        print(
            f"round {number}: {said[0]:.1f} s and {said[1]:.0f} MiB said, {took[0]:.1f} s and {took[1]:.0f} MiB taken"
        )
        sys.stdout.flush()
    time_ratio, memory_ratio = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"medians of said / taken: time {time_ratio:.2f}, memory {memory_ratio:.2f}")


if __name__ == "__main__":
    roles = {"foreseen": foreseen, "taken": taken}
    if sys.argv[1] in roles:
        print(json.dumps(roles[sys.argv[1]](sys.argv[2:])))
    else:
        main(int(sys.argv[1]), sys.argv[2:])
