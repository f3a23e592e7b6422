"""Batches by step number: the same with any number of workers, ranks and pieces, and from any step on."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from pictures import encode, noise

from tlearn.data import loader
from tlearn.data.loader import Batch, Loader, Share, eval_loader, train_loader
from tlearn.data.order import batch_range
from tlearn.data.shards import Sample, Split, read_index, write_index, write_split
from tlearn.data.transforms import EvalTransform, Preprocessing
from tlearn.dataconfig import Data
from tlearn.errors import TlearnError

N, BATCH = 23, 8  # batches of 7, 8 and 8
PREPROCESSING = Preprocessing(8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear")
SETTINGS: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


def write_samples(root: Path, data: list[bytes]) -> Split:
    """Several small shards; sample i has label i % 3."""
    samples = [
        Sample(hashlib.sha256(d).hexdigest()[:16], "png", d, i % 3, "abc"[i % 3], f"{i}.png")
        for i, d in enumerate(data)
    ]
    root.mkdir(parents=True)
    write_index(root, "abc", {"train": write_split(root, "train", samples, shard_bytes=3000)}, {})
    return read_index(root).splits["train"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    split = write_samples(
        tmp_path_factory.mktemp("loader") / "data", [encode(noise(i, 14, 11), "PNG") for i in range(N)]
    )
    assert len(split.shards) > 3
    return split


@pytest.fixture
def no_worker_stays() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    end = time.monotonic() + 5
    while left := set(psutil.Process().children(recursive=True)) - before:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.02)


def training(split: Split, *, workers: int = 0, seed: int = 5, **share: int) -> Loader:
    taken, data = Share(**{"batch_size": BATCH, **share}), Data(path="x", workers=workers)
    return train_loader(split, PREPROCESSING, data, taken, seed=seed, **SETTINGS)


def evaluation(split: Split, *, workers: int = 0, **share: int) -> Loader:
    return eval_loader(split, PREPROCESSING, Share(**{"batch_size": BATCH, **share}), workers=workers, **SETTINGS)


def take(loader: Loader, first: int, last: int, first_epoch: int = 0, *, close: bool = True) -> list[list[Batch]]:
    try:
        with loader.steps(first, last, first_epoch) as steps:
            return list(steps)
    finally:
        if close:
            loader.close()


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "labels", "keys", "global_labels")
    )


def same_steps(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    assert [len(step) for step in a] == [len(step) for step in b]
    return all(same(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def joined(parts: list[Batch]) -> Batch:
    """The micro-batches of all ranks put together."""
    assert all(torch.equal(part.global_labels, parts[0].global_labels) for part in parts)
    columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "keys"))
    return Batch(*columns, parts[0].global_labels)


def test_an_epoch_has_every_sample_once_with_its_own_label(split: Split) -> None:
    loader = training(split)
    assert (loader.steps_per_epoch, loader.samples_per_epoch) == (3, N)
    steps = take(loader, 0, 3)
    assert [len(step[0].labels) for step in steps] == [7, 8, 8]
    keys = split.rows["key"].astype(np.uint64).view(np.int64).tolist()
    label_of = dict(zip(keys, split.rows["label"].tolist(), strict=True))
    seen = [(key, label) for (b,) in steps for key, label in zip(b.keys.tolist(), b.labels.tolist(), strict=True)]
    assert sorted(seen) == sorted(label_of.items())
    assert all(torch.equal(b.labels, b.global_labels) for (b,) in steps)
    assert {(b.images.dtype, b.labels.dtype, b.keys.dtype) for (b,) in steps} == {
        (torch.float32, torch.int64, torch.int64)
    }


def test_evaluation_shows_every_picture_in_the_order_of_the_shards_normalised(split: Split) -> None:
    batches = [b for (b,) in take(evaluation(split), 0, 3)]
    transform = EvalTransform(PREPROCESSING)
    expected = torch.from_numpy(np.stack([transform(split.read(i)) for i in range(N)])).double() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    got = torch.cat([b.images for b in batches]).double()
    assert (got - (expected - mean) / std).abs().max() < 1e-5
    assert torch.cat([b.labels for b in batches]).tolist() == split.rows["label"].tolist()


@pytest.mark.usefixtures("no_worker_stays")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # on a machine with two cores
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_batches_that_one_process_makes(split: Split, workers: int) -> None:
    for build in (training, evaluation):
        assert same_steps(
            take(build(split, workers=workers, accumulate=2), 0, 5), take(build(split, accumulate=2), 0, 5)
        )


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_pieces_make_up_the_batch_of_a_single_process(split: Split, world_size: int, accumulate: int) -> None:
    whole = take(training(split), 0, 4)
    ranks = [
        take(training(split, rank=rank, world_size=world_size, accumulate=accumulate), 0, 4)
        for rank in range(world_size)
    ]
    for k, (expected,) in enumerate(whole):
        parts = [micro for rank in ranks for micro in rank[k]]
        assert len(parts) == world_size * accumulate
        assert same(joined(parts), expected)
        sizes = [sum(len(micro.labels) for micro in rank[k]) for rank in ranks]
        assert max(sizes) - min(sizes) <= 1


def test_starting_at_a_step_is_skipping_the_steps_before(split: Split) -> None:
    all_steps = take(training(split), 0, 8)
    for first in (1, 2, 3, 5, 7):
        assert same_steps(take(training(split), first, 8), all_steps[first:])
    assert take(training(split), 8, 8) == []


def test_steps_go_on_from_one_epoch_into_the_next(split: Split) -> None:
    all_steps = take(training(split), 0, 9)
    for epoch in range(3):
        assert same_steps(take(training(split), 0, 3, first_epoch=epoch), all_steps[3 * epoch : 3 * epoch + 3])
    epochs = [torch.cat([b.keys for (b,) in all_steps[3 * e : 3 * e + 3]]).tolist() for e in range(3)]
    assert len({tuple(keys) for keys in epochs}) == 3
    assert len({tuple(sorted(keys)) for keys in epochs}) == 1


def test_nothing_is_read_of_the_steps_before_the_first(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = Split.read
    monkeypatch.setattr(Split, "read", lambda self, i: read.append(i) or whole(self, i))
    (last,) = take(training(split), 2, 3)
    start, stop = batch_range(2, N, BATCH)
    assert len(read) == stop - start == len(last[0].labels)


def test_a_sample_is_augmented_differently_in_every_epoch_and_run(split: Split) -> None:
    def pictures(loader: Loader, epoch: int) -> dict[int, bytes]:
        batches = [b for (b,) in take(loader, 0, 3, first_epoch=epoch)]
        return {k: im.numpy().tobytes() for b in batches for k, im in zip(b.keys.tolist(), b.images, strict=True)}

    first = pictures(training(split), 0)
    for other in (pictures(training(split), 1), pictures(training(split, seed=6), 0)):
        assert first.keys() == other.keys()
        assert not any(first[key] == other[key] for key in first)
    assert pictures(training(split), 0) == first


def test_augmentation_of_a_sample_does_not_depend_on_the_batch_it_is_in(split: Split) -> None:
    def pictures(batch_size: int) -> dict[int, bytes]:
        loader = training(split, batch_size=batch_size)
        batches = [b for (b,) in take(loader, 0, loader.steps_per_epoch)]
        return {k: im.numpy().tobytes() for b in batches for k, im in zip(b.keys.tolist(), b.images, strict=True)}

    assert pictures(3) == pictures(23)


def test_a_rank_without_a_share_gets_an_empty_batch_that_knows_everyones_labels(split: Split) -> None:
    ranks = [take(evaluation(split, batch_size=2, rank=rank, world_size=3), 0, 2) for rank in range(3)]
    assert [len(rank[0][0].labels) for rank in ranks] == [0, 0, 1]
    empty = ranks[0][0][0]
    assert empty.images.shape == (0, 3, 8, 8)
    assert empty.images.dtype == torch.float32
    assert empty.labels.shape == empty.keys.shape == (0,)
    assert empty.labels.dtype == torch.int64
    assert all(torch.equal(rank[0][0].global_labels, empty.global_labels) for rank in ranks)
    assert len(empty.global_labels) == 1, "23 samples in 12 batches: the first has one"
    assert sum(len(rank[1][0].labels) for rank in ranks) == 2


def test_more_pieces_than_samples_are_legal(split: Split) -> None:
    (step,) = take(training(split, batch_size=2, accumulate=5), 1, 2)
    assert [len(micro.labels) for micro in step].count(0) == 3
    (whole,) = take(training(split, batch_size=2), 1, 2)
    assert same(joined(step), whole[0])


@pytest.mark.usefixtures("no_worker_stays")
def test_breaking_off_leaves_no_worker_behind(split: Split) -> None:
    before = set(psutil.Process().children())
    with training(split, workers=2).steps(0, 10_000) as steps:
        next(steps)
        workers = set(psutil.Process().children()) - before
        assert len(workers) == 2
    assert not workers & set(psutil.Process().children()), "gone, although `steps` is still referred to"
    del steps

    def fail() -> None:
        with training(split, workers=2).steps(0, 10_000) as steps:
            next(steps)
            raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _workers_left_by_a_killed_process(split: Split, batches: int) -> list[int]:
    """Start two workers in a process, take some batches, kill the process; which workers live 2 s later."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with training(split, workers=2).steps(0, 10_000) as steps:
                for _ in range(batches):
                    next(steps)
                workers = [p.pid for p in psutil.Process().children()]
                os.write(write_end, (" ".join(map(str, workers)) + "\n").encode())
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        workers = [int(pid) for pid in file.readline().split()]
    assert len(workers) == 2
    end = time.monotonic() + 2  # torch's own check is every 5 s
    while (left := [pid for pid in workers if _lives(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def test_workers_die_with_a_process_that_is_killed(split: Split) -> None:
    assert _workers_left_by_a_killed_process(split, batches=2) == []


def test_workers_that_were_just_being_started_die_with_it_too(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loader._init_worker

    def late(worker: int) -> None:
        time.sleep(0.5 * worker)  # the second starts after the end
        real(worker)

    monkeypatch.setattr(loader, "_init_worker", late)
    assert _workers_left_by_a_killed_process(split, batches=1) == []


@pytest.mark.usefixtures("no_worker_stays")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_decoded_names_its_shard_and_key(tmp_path: Path, workers: int) -> None:
    data = [encode(noise(i, 14, 11), "PNG") for i in range(9)]
    data[7] = data[7][:100]
    split = write_samples(tmp_path / "data", data)
    shard = split.shards[split.rows[7]["shard"]].name
    assert shard != "train-000000.tar"
    key = f"{split.rows[7]['key']:016x}"
    with pytest.raises(TlearnError, match=rf"data/{shard}: sample {key}: cannot be decoded: .*; prepare the data"):
        take(evaluation(split, workers=workers), 0, 2)
    assert len(take(evaluation(split, workers=workers, batch_size=3), 0, 2)) == 2, "the batches before are fine"


def test_a_balanced_part_is_loaded_like_a_whole_split(split: Split) -> None:
    part = split.balanced(9, seed=1)
    loader = training(part)
    steps = take(loader, 0, loader.steps_per_epoch)
    keys = torch.cat([b.keys for (b,) in steps]).numpy().view(np.uint64)
    assert sorted(keys.tolist()) == sorted(part.rows["key"].tolist())
    assert torch.bincount(torch.cat([b.labels for (b,) in steps])).tolist() == [3, 3, 3]


@pytest.mark.slow
def test_workers_that_are_not_forked_give_the_same(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is how Python 3.14 starts them on Linux, and every Python on macOS."""
    expected = take(training(split), 0, 3)
    monkeypatch.setattr(loader, "START_METHOD", "forkserver")
    found = take(training(split, workers=1), 0, 3)
    for (a,), (b,) in zip(expected, found, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.images, b.images)


def test_workers_of_evaluation_stay_until_it_is_closed(split: Split) -> None:
    def workers() -> set[int]:
        return {child.pid for child in multiprocessing.active_children()}

    before = workers()
    loader = evaluation(split, workers=2)
    first = take(loader, 0, loader.steps_per_epoch, close=False)
    kept = workers() - before
    assert len(kept) == 2
    again = take(loader, 0, loader.steps_per_epoch, close=False)
    assert workers() - before == kept
    assert [[b.keys.tolist() for b in step] for step in first] == [[b.keys.tolist() for b in step] for step in again]
    with loader.steps(0, loader.steps_per_epoch) as steps:
        next(steps)  # left before the end
    third = take(loader, 0, loader.steps_per_epoch, close=False)
    assert [[b.keys.tolist() for b in step] for step in third] == [[b.keys.tolist() for b in step] for step in first]
    loader.close()
    assert workers() - before == set()
