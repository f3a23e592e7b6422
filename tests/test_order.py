"""The order of samples: every one once, the same anywhere, and shared out by arithmetic."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from conftest import load_script
from hypothesis import given, settings
from hypothesis import strategies as st

from tlearn.data.order import (
    WINDOW_SHARDS,
    SequentialOrder,
    ShuffledOrder,
    batch_range,
    mix,
    mix_array,
    part_of,
    permutation,
    steps_per_epoch,
)

moderately = settings(max_examples=60, deadline=None)
shard_sizes = st.lists(st.integers(0, 7), max_size=3 * WINDOW_SHARDS + 5)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 10**6)
word = st.integers(0, 2**64 - 1)

PINNED_START: list[int] = [46, 38, 11, 37, 45, 48, 47, 49, 10, 35, 27, 1]
PINNED_END: list[int] = [26, 33, 52, 5, 42, 53, 23, 31, 30, 21, 41, 32]
PINNED_PERMUTATION: list[int] = [6, 0, 7, 3, 5, 2, 4, 1]
PINNED_MIX = 15020427595393229491


@moderately
@given(shard_sizes, seeds, epochs)
def test_an_epoch_has_every_sample_exactly_once(sizes: list[int], seed: int, epoch: int) -> None:
    order = ShuffledOrder(sizes, seed)
    assert len(order) == sum(sizes)
    assert sorted(order(epoch, 0, len(order)).tolist()) == list(range(sum(sizes)))


@moderately
@given(shard_sizes, seeds, epochs, st.data())
def test_any_range_of_positions_is_a_slice_of_the_epoch(
    sizes: list[int], seed: int, epoch: int, data: st.DataObject
) -> None:
    n = sum(sizes)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    whole = ShuffledOrder(sizes, seed)(epoch, 0, n)
    assert ShuffledOrder(sizes, seed)(epoch, start, stop).tolist() == whole[start:stop].tolist()


def test_epochs_may_be_asked_for_in_any_order() -> None:
    order, n = ShuffledOrder([5] * 40, seed=3), 200
    straight = {epoch: ShuffledOrder([5] * 40, seed=3)(epoch, 0, n).tolist() for epoch in range(5)}
    for epoch in (4, 0, 3, 0, 1, 4, 2):
        got = [i for start in range(0, n, 7) for i in order(epoch, start, min(n, start + 7)).tolist()]
        assert got == straight[epoch]


def test_the_order_is_another_one_in_every_epoch_and_with_every_seed() -> None:
    orders = {tuple(ShuffledOrder([4] * 20, seed)(epoch, 0, 80).tolist()) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_one_shard_alone_is_shuffled_differently_in_every_epoch() -> None:
    order = ShuffledOrder([50], seed=0)
    assert len({tuple(order(epoch, 0, 50).tolist()) for epoch in range(20)}) == 20


def test_the_order_of_this_version_is_pinned() -> None:
    """Whoever changes the order changes every run: say so in the changelog, then change these numbers."""
    order = ShuffledOrder([3, 0, 4, 2] * 6, seed=7)
    assert order(2, 0, 12).tolist() == PINNED_START
    assert order(2, 42, 54).tolist() == PINNED_END
    assert permutation(8, 1).tolist() == PINNED_PERMUTATION
    assert mix(1, 2, 3) == PINNED_MIX


def test_the_pinned_order_does_not_change_with_the_way_it_is_asked() -> None:
    order = ShuffledOrder(np.array([3, 0, 4, 2] * 6, dtype=np.int32), seed=7)
    assert [int(order(2, i, i + 1)[0]) for i in range(12)] == PINNED_START


def test_neighbours_in_an_epoch_are_not_neighbours_on_disk() -> None:
    order = ShuffledOrder([50] * 64, seed=1)
    samples = order(0, 0, len(order))
    steps = np.abs(np.diff(samples))
    assert np.mean(steps == 1) < 0.01, "chance within a window of 800 is 2 / 800"
    assert np.median(steps) > 300
    # the place within a shard is forgotten: no correlation with the position in the epoch
    assert abs(np.corrcoef(samples % 50, np.arange(len(samples)))[0, 1]) < 0.06


def test_an_epoch_reads_from_one_window_of_shards_at_a_time() -> None:
    order = ShuffledOrder([50] * 64, seed=1)
    shards = order(0, 0, len(order)) // 50
    windows = shards.reshape(4, 800)
    assert [len(set(window.tolist())) for window in windows] == [WINDOW_SHARDS] * 4
    # and within it from all of them at once
    assert all(len(set(part.tolist())) >= 12 for part in shards.reshape(-1, 100))
    neighbours = np.diff(np.sort(windows, axis=1)[:, ::50], axis=1)
    assert neighbours.max() > 1, "the shards of a window are themselves drawn from everywhere"


def test_every_sample_comes_first_about_equally_often() -> None:
    order = ShuffledOrder([5] * 4, seed=0)
    first = np.bincount([int(order(epoch, 0, 1)[0]) for epoch in range(2000)], minlength=20)
    assert ((first > 50) & (first < 160)).all(), "100 expected, standard deviation 10"


@moderately
@given(st.integers(0, 2000), word)
def test_a_permutation_is_one(n: int, key: int) -> None:
    assert sorted(permutation(n, key).tolist()) == list(range(n))


@moderately
@given(word, st.lists(word, max_size=20))
def test_mix_array_is_mix_of_every_element(key: int, values: list[int]) -> None:
    assert mix_array(key, np.array(values, dtype=np.uint64)).tolist() == [mix(key, v) for v in values]


@moderately
@given(word, word)
def test_mix_tells_the_order_and_the_number_of_its_arguments(a: int, b: int) -> None:
    assert 0 <= mix(a, b) < 2**64
    assert mix(a, b) != mix(a)
    assert a == b or mix(a, b) != mix(b, a)


def test_one_changed_bit_changes_half_of_a_mix() -> None:
    flips = [(mix(5, v) ^ mix(5, v ^ (1 << bit))).bit_count() for v in range(20) for bit in range(64)]
    assert 31 < np.mean(flips) < 33
    assert min(flips) > 8


@moderately
@given(st.integers(1, 10**9), st.integers(1, 10**5))
def test_batches_cover_an_epoch_in_as_few_steps_as_possible(n: int, batch_size: int) -> None:
    steps = steps_per_epoch(n, batch_size)
    assert (steps - 1) * batch_size < n <= steps * batch_size
    some = sorted({s for s in (0, 1, steps // 3, steps // 2, steps - 2, steps - 1) if 0 <= s < steps})
    sizes = {stop - start for start, stop in (batch_range(step, n, batch_size) for step in some)}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert max(sizes) <= batch_size
    assert batch_range(0, n, batch_size)[0] == 0
    assert batch_range(steps - 1, n, batch_size)[1] == n
    assert all(batch_range(s, n, batch_size)[0] == batch_range(s - 1, n, batch_size)[1] for s in some if s)


def test_no_epoch_ends_in_a_batch_of_one() -> None:
    assert [batch_range(step, 65, 32) for step in range(3)] == [(0, 21), (21, 43), (43, 65)]


@moderately
@given(st.integers(0, 10**6), st.integers(0, 200), st.integers(1, 300))
def test_parts_cover_a_range_without_overlap(start: int, length: int, parts: int) -> None:
    bounds = [part_of(start, start + length, part, parts) for part in range(parts)]
    assert bounds[0][0] == start
    assert bounds[-1][1] == start + length
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    sizes = [b - a for a, b in bounds]
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n", [0, 1, 17])
def test_the_sequential_order_is_the_order_of_the_shards(n: int) -> None:
    order = SequentialOrder(n)
    assert len(order) == n
    assert order(5, 0, n).tolist() == list(range(n))
    assert order(0, n // 2, n).tolist() == list(range(n // 2, n))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 999), (7, 1000), (4096, 32768)])
def test_all_ranks_together_meet_every_sample_once(world_size: int, batch_size: int) -> None:
    """The same check as benchmarks/order_scale.py, which makes it for 100 million samples."""
    scale = load_script("order_scale")
    assert scale.every_sample_once(scale.shard_sizes(300_000, 200), 2, batch_size, world_size)


def test_the_check_of_the_order_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = load_script("order_scale")
    monkeypatch.setattr(scale, "batch_range", lambda step, n, size: (step * size, min(n, step * size + size - 1)))
    assert not scale.every_sample_once(scale.shard_sizes(3000, 10), 2, 100, 2)
