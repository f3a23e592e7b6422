"""The order of samples as a pure function of (seed, epoch), and every rank's share of it by arithmetic.

Nothing here keeps state: which samples form step k of epoch e is computed, so a run resumes anywhere without
reading what it skips, and any number of processes and loader workers sees the same batches.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]

WINDOW_SHARDS = 16
"""Samples are shuffled within windows of this many shards: mixed well, yet read from few files at a time."""

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of integers. Chained splitmix64 finaliser (Steele, Lea & Flood 2014)."""
    state = 0
    for value in values:
        state = (state ^ value) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def mix_array(key: int, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`mix(key, value)` of every value."""
    state = (values ^ np.uint64(mix(key))) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permutation(n: int, key: int) -> Array:
    """A random-looking permutation of range(n) that depends on `key` alone, not on a library's generator."""
    return np.argsort(mix_array(key, np.arange(n, dtype=np.uint64)), kind="stable")


class ShuffledOrder:
    """Positions of an epoch -> sample indices: shards shuffled, then samples within a window of shards.

    Args:
        shard_sizes: samples per shard; sample indices count through the shards in this order.
        seed: of the run.
    """

    def __init__(self, shard_sizes: npt.ArrayLike, seed: int) -> None:
        self.sizes: Array = np.asarray(shard_sizes, dtype=np.int64)
        self.starts: Array = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed = seed
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def __reduce__(self) -> tuple[type[ShuffledOrder], tuple[Array, int]]:
        return ShuffledOrder, (self.sizes, self.seed)  # without the caches, which cannot be pickled

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __call__(self, epoch: int, start: int, stop: int) -> Array:
        """Sample indices at positions [start, stop) of an epoch."""
        _, window_starts = self._plan(epoch)
        parts: list[Array] = [np.empty(0, dtype=np.int64)]
        window = int(np.searchsorted(window_starts, start, side="right")) - 1
        while start < stop:
            samples = self._window(epoch, window)
            first = int(window_starts[window])
            parts.append(samples[start - first : stop - first])
            start = min(stop, first + len(samples))
            window += 1
        return np.concatenate(parts)

    def _make_plan(self, epoch: int) -> tuple[Array, Array]:
        """The epoch's order of shards, and the position at which each window of them starts."""
        shards = permutation(len(self.sizes), mix(self.seed, epoch))
        ends = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        return shards, ends[:-1:WINDOW_SHARDS]

    def _make_window(self, epoch: int, window: int) -> Array:
        shards, _ = self._plan(epoch)
        members = shards[window * WINDOW_SHARDS : (window + 1) * WINDOW_SHARDS]
        samples = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in members])
        # `window + 1`: the key of window 0 must differ from the key of the shards' own order
        return samples[permutation(len(samples), mix(self.seed, epoch, window + 1))]


class BalancedOrder:
    """As many positions of an epoch for every class as for any other, give or take one.

    Each class has an endless row of its samples, shuffled anew whenever all had their turn, of which every epoch takes
    the next piece: so all samples of a class come equally often in the long run.

    Args:
        labels: (n,) of all samples.
        seed: of the run.
    """

    def __init__(self, labels: npt.ArrayLike, seed: int) -> None:
        self.labels: Array = np.asarray(labels, dtype=np.int64)
        self.seed = seed
        self._plan = lru_cache(maxsize=2)(self._make_plan)

    def __reduce__(self) -> tuple[type[BalancedOrder], tuple[Array, int]]:
        return BalancedOrder, (self.labels, self.seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __call__(self, epoch: int, start: int, stop: int) -> Array:
        """Sample indices at positions [start, stop) of an epoch."""
        return self._plan(epoch)[start:stop]

    def _make_plan(self, epoch: int) -> Array:
        classes, parts = np.unique(self.labels), []
        for i, label in enumerate(classes.tolist()):
            members = np.flatnonzero(self.labels == label)
            first, last = part_of(0, len(self), i, len(classes))
            at = epoch * (last - first) + np.arange(last - first)
            rounds = {
                r: permutation(len(members), mix(self.seed, label, r)) for r in np.unique(at // len(members)).tolist()
            }
            parts.append(members[[rounds[p // len(members)][p % len(members)] for p in at.tolist()]])
        return np.concatenate(parts)[permutation(len(self), mix(self.seed, epoch))]


class ListedOrder:
    """Given sample indices, the same in every epoch."""

    def __init__(self, samples: Array) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, epoch: int, start: int, stop: int) -> Array:
        """Sample indices at positions [start, stop)."""
        return self.samples[start:stop]


class SequentialOrder:
    """Every sample at its own position: evaluation."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __call__(self, epoch: int, start: int, stop: int) -> Array:
        """Sample indices at positions [start, stop); the epoch does not matter."""
        return np.arange(start, stop, dtype=np.int64)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Global batches in an epoch of n samples."""
    return -(-n // batch_size)


def batch_range(step: int, n: int, batch_size: int) -> tuple[int, int]:
    """Positions [start, stop) of global batch `step`: as few batches as `batch_size` allows, cut evenly.

    Sizes differ by one at most, so no epoch ends in a batch of one (which a train-mode BatchNorm cannot take).
    """
    steps = steps_per_epoch(n, batch_size)
    return step * n // steps, (step + 1) * n // steps


def part_of(start: int, stop: int, part: int, parts: int) -> tuple[int, int]:
    """Part `part` of `parts` of the positions [start, stop): sizes differ by one at most, none is lost."""
    length = stop - start
    return start + part * length // parts, start + (part + 1) * length // parts
