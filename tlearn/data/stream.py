"""Shards without an index, read from start to end: for sources that are too large to be cached.

What is given up compared with the indexed reader: the same batches at any number of processes, an exact resume within
an epoch, every training sample exactly once per epoch. What stays: the same number of steps on every rank, and every
validation sample exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from tlearn.data.decode import UnreadableImageError
from tlearn.data.loader import Batch, Fetcher, Positions, Share, Transform, grouped, to_batch
from tlearn.data.order import batch_range, mix, permutation, steps_per_epoch
from tlearn.data.tars import IMAGE_ENDINGS, expand, samples
from tlearn.data.transforms import Preprocessing, normalise
from tlearn.errors import TlearnError

GIVEN_UP = (
    "data.reader: stream gives up: equal batches at any number of processes, exact resume within an epoch, every "
    "training image exactly once per epoch; it keeps equal steps on all ranks and exact evaluation"
)
SHUFFLED = 1000
"""Samples in the buffer from which the next one is drawn."""


class Encoded(NamedTuple):
    """A sample as it lies in its shard."""

    image: bytes
    label: int
    key: int
    where: str


@dataclass(frozen=True)
class Shards:
    """Tar shards in WebDataset's layout: <key>.jpg (or .png, ...) and <key>.cls, the number of the class."""

    urls: tuple[str, ...]
    classes: int

    def read(self, numbers: Sequence[int]) -> Iterator[Encoded]:
        """Every sample of some of the shards; nothing is decoded by its ending.

        Raises:
            TlearnError: a shard that cannot be read, a sample without image or class.
        """
        for url in (self.urls[i] for i in numbers):
            for sample in samples(url):
                yield self._encoded(f"{url}: sample {sample['__key__']}", sample)

    def _encoded(self, where: str, sample: dict[str, Any]) -> Encoded:
        image = next((sample[ending] for ending in IMAGE_ENDINGS if ending in sample), None)
        label = sample.get("cls", b"").strip()
        if image is None or not label.isdigit():
            raise TlearnError(
                f"{where}: needs an image (.{', .'.join(IMAGE_ENDINGS)}) and the number of its class in .cls"
            )
        if int(label) >= self.classes:
            raise TlearnError(f"{where}: class {int(label)}, but data.stream.classes names {self.classes}")
        return Encoded(image, int(label), int.from_bytes(hashlib.sha256(where.encode()).digest()[:8]), where)


def open_shards(pattern: str, classes: int) -> Shards:
    """The shards of a pattern, as `tars.expand` takes it.

    Raises:
        TlearnError: a file that does not exist.
    """
    return Shards(tuple(expand(pattern)), classes)


class StreamLoader:
    """Micro-batches of this rank from a stream; see `loader.Steps`.

    Args:
        shards: split by rank, then by loader worker.
        n: samples per epoch over all ranks.
        transform: bytes, seed -> (3, S, S) uint8.
        preprocessing, share, device, dtype, workers: as in `loader.Loader`.
        seed: of order and augmentation; None: every sample once, in order.

    Raises:
        TlearnError: fewer shards than processes that train.
    """

    def __init__(
        self,
        shards: Shards,
        n: int,
        transform: Transform,
        preprocessing: Preprocessing,
        share: Share,
        *,
        seed: int | None,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
    ) -> None:
        if seed is not None and len(shards.urls) < share.world_size:
            raise TlearnError(
                f"data.path: {len(shards.urls)} shards for {share.world_size} processes; "
                "data.reader: stream needs one for each"
            )
        self.samples_per_epoch, self.steps_per_epoch = n, steps_per_epoch(n, share.batch_size)
        self.shards, self.transform, self.share, self.seed = shards, transform, share, seed
        self.preprocessing, self.device, self.dtype = preprocessing, device, dtype
        self.fetcher = Fetcher(device, keep=seed is None)
        # a worker without a shard would have nothing to give
        self.workers = min(workers, len(shards.urls) // share.world_size)

    @contextmanager
    def steps(self, first: int, last: int, first_epoch: int = 0) -> Iterator[Iterator[list[Batch]]]:
        """See `loader.Steps`; within an epoch it starts the epoch over, and evaluation ends where the shards do."""
        size_px = self.preprocessing.size_px
        dataset: _MicroBatches
        if self.seed is None:
            accumulate = 1
            dataset = _EvalBatches(self.shards, self.transform, self.share, size_px)
        else:
            accumulate = self.share.accumulate
            positions = Positions(first, last, first_epoch, self.steps_per_epoch, accumulate)
            dataset = _TrainBatches(
                self.shards, self.transform, self.share, size_px, positions, self.samples_per_epoch, self.seed
            )
        with self.fetcher.fetch(dataset, None, self.workers) as batches:
            finish = partial(normalise, preprocessing=self.preprocessing, dtype=self.dtype)
            yield grouped((to_batch(t, finish, self.device) for t in batches), accumulate)

    def close(self) -> None:
        """See `loader.Steps`."""
        self.fetcher.close()


class _MicroBatches(IterableDataset[Any]):
    """Lives in the loader workers: samples decoded and stacked."""

    def __init__(self, shards: Shards, transform: Transform, share: Share, size_px: int) -> None:
        self.shards, self.transform, self.share, self.size_px = shards, transform, share, size_px

    def mine(self, numbers: Sequence[int]) -> Sequence[int]:
        """Of the shards in this order, those of this worker of this rank."""
        worker, workers = _worker()
        return numbers[self.share.rank :: self.share.world_size][worker::workers]

    def collate(self, samples: list[Encoded], seed: int, global_size: int) -> tuple[torch.Tensor, ...]:
        """As `loader.MicroBatches` gives them, but the labels of other ranks are not known: -1."""
        images = np.empty((len(samples), 3, self.size_px, self.size_px), dtype=np.uint8)
        for i, sample in enumerate(samples):
            try:
                images[i] = self.transform(sample.image, mix(seed, sample.key))
            except UnreadableImageError as error:
                raise TlearnError(f"{sample.where}: {error}") from None
        return (
            torch.from_numpy(images),
            torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            torch.from_numpy(np.array([sample.key for sample in samples], dtype=np.uint64).view(np.int64)),
            torch.full((global_size,), -1, dtype=torch.int64),
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...] | TlearnError]:
        try:
            yield from self.batches()
        except TlearnError as error:
            yield error  # raised by `fetch`

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """The micro-batches of this worker."""
        raise NotImplementedError


class _TrainBatches(_MicroBatches):
    """As many micro-batches as the steps need, whatever the shards hold."""

    def __init__(
        self,
        shards: Shards,
        transform: Transform,
        share: Share,
        size_px: int,
        positions: Positions,
        samples_per_epoch: int,
        seed: int,
    ) -> None:
        super().__init__(shards, transform, share, size_px)
        self.positions, self.samples_per_epoch, self.seed = positions, samples_per_epoch, seed

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        epoch = -1
        samples: Iterator[Encoded] = iter(())
        worker, workers = _worker()
        # the DataLoader asks its workers in turn, each for the next micro-batch
        for at in islice(self.positions, worker, None, workers):
            if at.epoch != epoch:
                epoch, samples = at.epoch, self._endless(at.epoch)
            start, stop = batch_range(at.step, self.samples_per_epoch, self.share.batch_size)
            first, last = self.share.part(start, stop, at.micro)
            yield self.collate(list(islice(samples, last - first)), mix(self.seed, epoch), stop - start)

    def _endless(self, epoch: int) -> Iterator[Encoded]:
        """This worker's shards again and again: they are uneven, and no rank may run dry before the others."""
        numbers = self.mine(permutation(len(self.shards.urls), mix(self.seed, epoch)).tolist())
        random = np.random.default_rng([self.seed, epoch, self.share.rank, _worker()[0]])
        buffer: list[Encoded] = []
        while True:
            empty = True
            for sample in self.shards.read(numbers):
                empty = False
                buffer.append(sample)
                if len(buffer) > SHUFFLED:
                    yield buffer.pop(int(random.integers(len(buffer))))
            if empty:
                raise TlearnError(f"{self.shards.urls[numbers[0]]}: holds no sample")
            while buffer:
                yield buffer.pop(int(random.integers(len(buffer))))


class _EvalBatches(_MicroBatches):
    """Every sample of this worker's shards once."""

    def batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        samples = self.shards.read(self.mine(range(len(self.shards.urls))))
        while group := list(islice(samples, -(-self.share.batch_size // self.share.world_size))):
            yield self.collate(group, 0, 0)


def _worker() -> tuple[int, int]:
    """Number of this loader worker, and of how many."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
