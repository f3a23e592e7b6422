"""Batches of this rank, by step number: decoded in worker processes, normalised on the device.

A loader worker makes whole micro-batches, and which samples form one is arithmetic (order.py): the batches do not
depend on the number of workers, and starting at step k reads nothing of the steps before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tlearn.data.decode import UnreadableImageError
from tlearn.data.mixing import Mixing, draw, mixed
from tlearn.data.order import (
    Array,
    BalancedOrder,
    SequentialOrder,
    ShuffledOrder,
    batch_range,
    mix,
    part_of,
    steps_per_epoch,
)
from tlearn.data.shards import Split
from tlearn.data.transforms import EvalTransform, Pixels, Preprocessing, TrainTransform, normalise
from tlearn.data.workers import no_fork, serve
from tlearn.dataconfig import Augment, Data
from tlearn.errors import TlearnError

START_METHOD = "fork" if sys.platform == "linux" else None
"""Of the loader workers. A fork takes milliseconds; other ways, Python's choice elsewhere, import torch each time."""

EVAL_IMAGES = 32
"""Images that a process evaluates at once."""


class Order(Protocol):
    """Position in an epoch -> sample index."""

    def __len__(self) -> int: ...
    def __call__(self, epoch: int, start: int, stop: int) -> Array: ...


class Transform(Protocol):
    """Encoded bytes and a seed -> (3, S, S) uint8."""

    def __call__(self, data: bytes, seed: int) -> Pixels: ...


@dataclass(frozen=True)
class Batch:
    """One rank's part of a micro-batch of a global batch of B samples."""

    images: torch.Tensor
    """(b, 3, S, S), normalised, on the device; or what the frozen beginning of the network makes of them."""
    labels: torch.Tensor
    """(b,) int64, on the device."""
    keys: torch.Tensor
    """(b,) int64: the samples' 64-bit keys, on the CPU."""
    global_labels: torch.Tensor
    """(B,) int64: labels of the whole global batch, which every rank knows without communication; on the CPU."""
    shares: torch.Tensor | None = None
    """(b,) on the device: what each image keeps of itself; the rest is its neighbour's (data/mixing.py)."""


class Position(NamedTuple):
    """Micro-batch `micro` of global batch `step` of epoch `epoch`."""

    epoch: int
    step: int
    micro: int


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process takes, and in how many pieces."""

    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    unit: int = 1
    """So many neighbours are never cut apart."""

    def part(self, start: int, stop: int, micro: int) -> tuple[int, int]:
        """Of positions [start, stop), a global batch, those of micro-batch `micro` of this process."""
        units = -(-(stop - start) // self.unit)
        first, last = part_of(*part_of(0, units, self.rank, self.world_size), micro, self.accumulate)
        return start + first * self.unit, min(stop, start + last * self.unit)

    def in_parts_of(self, micro: int | None, n: int) -> Share:
        """The share cut into micro-batches of at most `micro` images (or one unit), in an epoch of n; None: not cut."""
        units = replace(self, accumulate=1).largest_part(n) // self.unit
        return replace(self, accumulate=-(-units // max(1, (micro or n) // self.unit)))

    def largest_part(self, n: int) -> int:
        """Images in the largest micro-batch of any process in an epoch of n."""
        batch = -(-n // steps_per_epoch(n, self.batch_size))
        return -(-batch // self.unit // self.world_size // self.accumulate) * self.unit

    def check(self, n: int, stage: str, needed: int) -> None:
        """Raise where a process would have fewer than `needed` images in a micro-batch.

        Raises:
            TlearnError: with what to change.
        """
        smallest = self.smallest_part(n)
        if smallest < needed:
            why = "the BatchNorm layers that it trains need two" if needed == 2 else "every process needs one"
            frozen = ", or set model.batch_norm=frozen" if needed == 2 else ""
            raise TlearnError(
                f"batch.size = {self.batch_size}: stage {stage} would have micro-batches of {smallest} images "
                f"({self.world_size} processes, {self.accumulate} parts each); {why}: raise batch.size or "
                f"batch.micro{frozen}"
            )

    def for_evaluation(self) -> Share:
        """EVAL_IMAGES per process at once: without gradients memory is no question."""
        return Share(EVAL_IMAGES * self.world_size, self.rank, self.world_size)

    def smallest_part(self, n: int) -> int:
        """Images in the smallest micro-batch of any process in an epoch of n."""
        batch = n // steps_per_epoch(n, self.batch_size)
        return batch // self.unit // self.world_size // self.accumulate * self.unit


class Steps(Protocol):
    """What the loop and the evaluation take: the micro-batches of this rank, step by step."""

    steps_per_epoch: int
    samples_per_epoch: int

    def steps(self, first: int, last: int, first_epoch: int = 0) -> AbstractContextManager[Iterator[list[Batch]]]:
        """The micro-batches of each step in [first, last), counted from the start of epoch `first_epoch`.

        Leaving the context ends the workers, also those that are still decoding, unless they are kept for another pass.
        """

    def close(self) -> None:
        """End workers that were kept."""


@dataclass(frozen=True)
class Positions:
    """The micro-batches of a range of steps, made one by one: a long stage has millions."""

    first: int
    last: int
    first_epoch: int
    steps_per_epoch: int
    accumulate: int

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulate

    def __iter__(self) -> Iterator[Position]:
        for step in range(self.first, self.last):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            for micro in range(self.accumulate):
                yield Position(self.first_epoch + epoch, step_in_epoch, micro)


class MicroBatches(Dataset[Any]):
    """Map-style data set from a Position to tensors; lives in the loader workers."""

    def __init__(
        self,
        split: Split,
        order: Order,
        transform: Transform,
        share: Share,
        seed: int,
        size_px: int,
        views: int | None,
        mixing: Mixing | None = None,
    ) -> None:
        self.split, self.order, self.transform, self.share = split, order, transform, share
        self.seed, self.size_px, self.views, self.mixing = seed, size_px, views, mixing
        # so that an image that comes twice in an epoch is changed in two ways
        self.by_position = isinstance(order, BalancedOrder) and views is None

    def __getitem__(self, at: Position) -> tuple[torch.Tensor, ...] | TlearnError:
        try:
            return self._micro_batch(at)
        except TlearnError as error:
            return error  # raised by `fetch`: torch would bury it in a worker's traceback

    def _micro_batch(self, at: Position) -> tuple[torch.Tensor, ...]:
        start, stop = batch_range(at.step, len(self.order), self.share.batch_size)
        mine = self.share.part(start, stop, at.micro)
        everyones = self.order(at.epoch, start, stop)
        samples = everyones[mine[0] - start : mine[1] - start]
        rows = self.split.rows[samples]
        batch = (
            self._inputs(samples, at.epoch % self.views if self.views else at.epoch, mine[0]),
            torch.from_numpy(rows["label"].astype(np.int64)),
            torch.from_numpy(rows["key"].astype(np.uint64).view(np.int64)),
            torch.from_numpy(self.split.rows["label"][everyones].astype(np.int64)),
        )
        if self.mixing is None:
            return batch
        key = mix(self.seed, at.epoch, at.step)
        return *batch, *draw(self.mixing, key, mine[0] - start, mine[1] - start, stop - start, self.size_px)

    def _inputs(self, samples: Array, view: int, first: int) -> torch.Tensor:
        """What the network is given of these samples, the first at this position: (b, 3, S, S) uint8."""
        images = np.empty((len(samples), 3, self.size_px, self.size_px), dtype=np.uint8)
        keys = self.split.rows["key"][samples]
        for j, (i, key) in enumerate(zip(samples.tolist(), keys.tolist(), strict=True)):
            images[j] = self._image(i, mix(self.seed, view, key, *([first + j] if self.by_position else [])))
        return torch.from_numpy(images)

    def _image(self, i: int, seed: int) -> Pixels:
        try:
            return self.transform(self.split.read(i), seed)
        except UnreadableImageError as error:
            key = f"{self.split.rows[i]['key']:016x}"
            shard = self.split.root / self.split.shards[self.split.rows[i]["shard"]].name
            raise TlearnError(f"{shard}: sample {key}: {error}; prepare the data again") from None


class Loader:
    """Iterates over steps of an epoch order.

    Args:
        dataset: makes the micro-batches.
        finish: inputs as the data set gives them, on the device -> as the network takes them.
        device: where batches go.
        workers: processes; 0: decode here.
        keep_workers: from one pass to the next.
    """

    def __init__(
        self,
        dataset: MicroBatches,
        finish: Callable[[torch.Tensor], torch.Tensor],
        *,
        device: torch.device,
        workers: int,
        keep_workers: bool = False,
    ) -> None:
        self.fetcher = Fetcher(device, keep=keep_workers)
        self.dataset, self.finish, self.device, self.workers = dataset, finish, device, workers
        self.steps_per_epoch = steps_per_epoch(len(dataset.order), dataset.share.batch_size)
        self.samples_per_epoch = len(dataset.order)

    @contextmanager
    def steps(self, first: int, last: int, first_epoch: int = 0) -> Iterator[Iterator[list[Batch]]]:
        """See `Steps`."""
        accumulate = self.dataset.share.accumulate
        positions = Positions(first, last, first_epoch, self.steps_per_epoch, accumulate)
        workers = min(self.workers, len(positions))
        with self.fetcher.fetch(self.dataset, positions, workers) as batches:
            yield grouped((to_batch(t, self.finish, self.device) for t in batches), accumulate)

    def close(self) -> None:
        """See `Steps`."""
        self.fetcher.close()


class Fetcher:
    """Worker processes that make what a data set gives.

    Args:
        device: where it goes.
        keep: they stay for the next pass over the same positions, until `close`. Evaluation comes after every epoch,
            and a fork while other threads run can lock up (Python before 3.12), so it is done once.
    """

    def __init__(self, device: torch.device, *, keep: bool) -> None:
        self.device, self.keep = device, keep
        self._loader: DataLoader[Any] | None = None
        self._positions: Positions | None = None
        self._batches: Any = None

    @contextmanager
    def fetch(
        self, dataset: Dataset[Any], positions: Positions | None, workers: int
    ) -> Iterator[Iterator[tuple[torch.Tensor, ...]]]:
        """One pass; the workers end with the context, also when still decoding, unless they are kept."""
        loader, forks = self._loader, False
        if loader is None or positions != self._positions:
            self.close()
            self._positions, forks = positions, workers > 0
            loader = self._loader = DataLoader(
                dataset,
                batch_size=None,
                sampler=positions,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_init_worker,
                prefetch_factor=4 if workers else None,
                multiprocessing_context=START_METHOD if workers else None,
                persistent_workers=self.keep and workers > 0,
            )
        with no_fork if forks else nullcontext():
            self._batches = iter(loader)
        try:
            yield _raised(self._batches)
        finally:
            if not self.keep:
                self.close()

    def close(self) -> None:
        """End the workers."""
        if self._loader is not None and self._loader.num_workers:
            self._batches._shutdown_workers()
            for process in self._batches._workers:  # they ignore SIGTERM, by which torch would end a slow one
                process.kill()
        self._loader = self._batches = None


def _raised(batches: Iterator[tuple[torch.Tensor, ...] | TlearnError]) -> Iterator[tuple[torch.Tensor, ...]]:
    for batch in batches:
        if isinstance(batch, TlearnError):
            raise batch
        yield batch


def grouped(batches: Iterator[Batch], accumulate: int) -> Iterator[list[Batch]]:
    """The micro-batches of one step after the other."""
    while group := list(islice(batches, accumulate)):
        yield group


def to_batch(
    tensors: tuple[torch.Tensor, ...], finish: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> Batch:
    """Inputs, labels, keys, global labels, and how to mix them, as a data set gives them -> a batch on the device."""
    inputs, labels, keys, global_labels, *mixing = tensors
    inputs = finish(inputs.to(device, non_blocking=True))
    labels = labels.to(device, non_blocking=True)
    if not mixing:
        return Batch(inputs, labels, keys, global_labels)
    shares, boxes = (tensor.to(device, non_blocking=True) for tensor in mixing)
    return Batch(mixed(inputs, shares, boxes), labels, keys, global_labels, shares)


def _init_worker(worker: int) -> None:
    serve()
    torch.set_num_threads(1)


def train_loader(
    split: Split,
    preprocessing: Preprocessing,
    data: Data,
    share: Share,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    views: int | None = None,
) -> Loader:
    """Augmented images in a shuffled order, both functions of (seed, epoch)."""
    transform, order = train_transform(preprocessing, data.augment, views), train_order(split, data.sampling, seed)
    mixing = Mixing(data.augment.mixup, data.augment.cutmix) or None
    dataset = MicroBatches(split, order, transform, share, seed, preprocessing.size_px, views, mixing)
    finish = partial(normalise, preprocessing=preprocessing, dtype=dtype)
    return Loader(dataset, finish, device=device, workers=data.workers)


def train_order(split: Split, sampling: str, seed: int) -> Order:
    """Positions of an epoch -> train samples; see `data.sampling`."""
    if sampling == "balanced":
        return BalancedOrder(split.rows["label"], seed)
    return ShuffledOrder(split.shard_sizes(), seed)


def train_transform(preprocessing: Preprocessing, augment: Augment, views: int | None) -> Transform:
    """What training sees of an image; a single view is what evaluation sees."""
    if views == 1:
        return EvalTransform(preprocessing)
    return TrainTransform(preprocessing, augment)


def eval_loader(
    split: Split,
    preprocessing: Preprocessing,
    share: Share,
    *,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
) -> Loader:
    """Every image once, as it is, in the order of the shards."""
    transform, order = EvalTransform(preprocessing), SequentialOrder(len(split))
    dataset = MicroBatches(split, order, transform, share, 0, preprocessing.size_px, None)
    finish = partial(normalise, preprocessing=preprocessing, dtype=dtype)
    return Loader(dataset, finish, device=device, workers=workers, keep_workers=True)
