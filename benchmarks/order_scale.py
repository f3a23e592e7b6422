"""The order at a scale that no test can train at: 100 million samples in 10,000 shards, up to 4,096 processes.

    python benchmarks/order_scale.py [--samples N] [--shards N]        about 2 minutes

For every world size: what one process needs to know its first batch (time and memory, in a process of its own), then,
without processes, whether the parts of all ranks together hold every sample of an epoch exactly once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tracemalloc

import numpy as np
from numpy.typing import NDArray

from tlearn.data.loader import Share
from tlearn.data.order import ShuffledOrder, batch_range, steps_per_epoch

WORLDS = ((1, 256), (7, 1000), (64, 4096), (4096, 131072))
"""(processes, global batch)."""
LIMITS = {"seconds": 2.0, "mib": 1024.0}


def shard_sizes(samples: int, shards: int) -> NDArray[np.int64]:
    """Uneven shards that hold `samples` in all."""
    cuts = np.sort(np.random.default_rng(0).integers(0, samples, shards - 1))
    return np.diff(np.concatenate([[0], cuts, [samples]]))


def every_sample_once(sizes: NDArray[np.int64], epoch: int, batch_size: int, world_size: int) -> bool:
    """Ask every rank for its part of every step, as its loader workers do, and count."""
    order = ShuffledOrder(sizes, seed=1)
    seen = np.zeros(len(order), dtype=np.uint8)
    shares = [Share(batch_size, rank, world_size) for rank in range(world_size)]
    for step in range(steps_per_epoch(len(order), batch_size)):
        positions = batch_range(step, len(order), batch_size)
        for share in shares:
            np.add.at(seen, order(epoch, *share.part(*positions, 0)), 1)
    return bool((seen == 1).all())


def plan(samples: int, shards: int, batch_size: int, world_size: int) -> dict[str, float]:
    """Cost of knowing the first batch of an epoch, to the last rank."""
    sizes = shard_sizes(samples, shards)
    share = Share(batch_size, world_size - 1, world_size)
    positions = share.part(*batch_range(0, samples, batch_size), 0)

    def first_batch() -> None:
        ShuffledOrder(sizes, seed=1)(3, *positions)

    start = time.perf_counter()
    first_batch()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    first_batch()
    return {"seconds": seconds, "mib": tracemalloc.get_traced_memory()[1] / 2**20}


def main() -> None:
    """Print the table; exit with 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--plan", nargs=2, type=int, metavar=("BATCH", "WORLD"), help="one plan, as JSON")
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(plan(arguments.samples, arguments.shards, *arguments.plan)))
        return
    print(f"{arguments.samples:,} samples in {arguments.shards:,} shards")
    print("| processes | global batch | plan, s | plan, MiB | every sample once | checked in, s |")
    print("|---" * 6 + "|")
    sizes = shard_sizes(arguments.samples, arguments.shards)
    fine = True
    for world_size, batch_size in WORLDS:
        command = [sys.executable, __file__, "--plan", str(batch_size), str(world_size)]
        options = ["--samples", str(arguments.samples), "--shards", str(arguments.shards)]
        cost = json.loads(subprocess.run([*command, *options], capture_output=True, check=True).stdout)
        start = time.perf_counter()
        once = every_sample_once(sizes, 3, batch_size, world_size)
        seconds = time.perf_counter() - start
        fine &= once and all(cost[key] < limit for key, limit in LIMITS.items())
        cells = (f"{world_size:,}", f"{batch_size:,}", f"{cost['seconds']:.3f}", f"{cost['mib']:.0f}")
        print("| " + " | ".join((*cells, "yes" if once else "NO", f"{seconds:.0f}")) + " |", flush=True)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
