"""Where a run's images come from: prepared shards with an index, or a stream without one."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from tlearn.config import Config
from tlearn.data.loader import Loader, MicroBatches, Share, Steps, eval_loader, train_loader, train_transform
from tlearn.data.order import Array, ListedOrder
from tlearn.data.pairs import PairedSteps
from tlearn.data.prepare import open_or_prepare
from tlearn.data.stream import GIVEN_UP, StreamLoader, open_shards
from tlearn.data.transforms import Colour, EvalTransform, Preprocessing, TrainTransform, normalise
from tlearn.errors import TlearnError


class Source(Protocol):
    """The images of a run."""

    classes: tuple[str, ...]
    fingerprint: str
    """A run goes on with the same images only."""
    sizes: dict[str, int]
    """Images per split."""
    per_class: npt.NDArray[np.int64] | None
    """Train images per class; None where nobody has counted them."""
    colours: tuple[Colour, Colour] | None
    """Mean and standard deviation of the train images' pixels, RGB in 0..1; None where nobody has looked."""
    warning: str | None

    def train_loader(
        self, p: Preprocessing, share: Share, device: torch.device, dtype: torch.dtype, views: int | None = None
    ) -> Steps:
        """Augmented train images in a random order."""

    def eval_loader(
        self, split: str, p: Preprocessing, share: Share, device: torch.device, dtype: torch.dtype
    ) -> Steps:
        """Every image of a split once."""


class Indexed:
    """Prepared data; a bare folder is prepared first.

    Raises:
        TlearnError: no train or no val images.
    """

    def __init__(self, config: Config) -> None:
        index = open_or_prepare(config.data.path)
        self.data, self.seed = config.data, config.seed
        self.classes, self.fingerprint = index.classes, index.fingerprint
        self.splits = dict(index.splits)
        if not config.data.score_test:
            self.splits.pop("test", None)
        for name, limit in (("train", config.data.max_train), ("val", config.data.max_val)):
            if name not in self.splits:
                raise TlearnError(f"{index.root}: has no {name} images; prepare the data again, with --val 0.2, say")
            if limit is not None:
                self.splits[name] = self.splits[name].balanced(limit, config.seed)
        self.sizes = {name: len(split) for name, split in self.splits.items()}
        self.per_class: npt.NDArray[np.int64] | None = self.splits["train"].per_class(len(self.classes))
        self.colours: tuple[Colour, Colour] | None = tuple(index.meta["mean"]), tuple(index.meta["std"])
        leaks = index.meta["leaks"]
        self.warning = f"{leaks} leaks were found in the data; see {index.root / 'audit.json'}" if leaks else None

    def train_loader(
        self, p: Preprocessing, share: Share, device: torch.device, dtype: torch.dtype, views: int | None = None
    ) -> Steps:
        """See `Source`."""
        split = self.splits["train"]
        return train_loader(split, p, self.data, share, seed=self.seed, device=device, dtype=dtype, views=views)

    def eval_loader(
        self, split: str, p: Preprocessing, share: Share, device: torch.device, dtype: torch.dtype
    ) -> Steps:
        """See `Source`."""
        return eval_loader(self.splits[split], p, share, device=device, dtype=dtype, workers=self.data.workers)

    def listed_loader(
        self,
        split: str,
        rows: Array,
        views: int,
        p: Preprocessing,
        share: Share,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
    ) -> Loader:
        """These samples of a split in this order, as training (in epoch V: view V) or evaluation sees them."""
        transform = train_transform(p, self.data.augment, views) if split == "train" else EvalTransform(p)
        dataset = MicroBatches(self.splits[split], ListedOrder(rows), transform, share, self.seed, p.size_px, views)
        return Loader(dataset, partial(normalise, preprocessing=p, dtype=dtype), device=device, workers=workers)


class Streamed:
    """Shards that are read from start to end, as the config describes them.

    Raises:
        TlearnError: a shard that does not exist.
    """

    def __init__(self, config: Config) -> None:
        stream = config.data.stream
        assert stream is not None
        self.data, self.seed = config.data, config.seed
        self.classes = tuple(stream.classes)
        self.sizes = {"train": stream.train_samples, "val": stream.val_samples}
        self.per_class: npt.NDArray[np.int64] | None = None
        self.colours: tuple[Colour, Colour] | None = None
        self.fingerprint = hashlib.sha256(f"{config.data.path}\n{stream.model_dump_json()}".encode()).hexdigest()
        self.warning: str | None = GIVEN_UP
        patterns = {"train": config.data.path, "val": stream.val}
        self.shards = {name: open_shards(pattern, len(self.classes)) for name, pattern in patterns.items()}

    def train_loader(
        self, p: Preprocessing, share: Share, device: torch.device, dtype: torch.dtype, views: int | None = None
    ) -> Steps:
        """See `Source`."""
        assert views is None
        return self._loader("train", TrainTransform(p, self.data.augment), p, share, device, dtype, self.seed)

    def eval_loader(
        self, split: str, p: Preprocessing, share: Share, device: torch.device, dtype: torch.dtype
    ) -> Steps:
        """See `Source`."""
        return self._loader(split, EvalTransform(p), p, share, device, dtype, None)

    def _loader(
        self,
        split: str,
        transform: TrainTransform | EvalTransform,
        p: Preprocessing,
        share: Share,
        device: torch.device,
        dtype: torch.dtype,
        seed: int | None,
    ) -> Steps:
        return StreamLoader(
            self.shards[split],
            self.sizes[split],
            transform,
            p,
            share,
            seed=seed,
            device=device,
            dtype=dtype,
            workers=self.data.workers,
        )


class WithTarget:
    """Labelled images, and those of another domain that are trained on without their labels.

    Where the target's classes are those of the source too, its own val images (or all of them) are scored as `target`.

    Raises:
        TlearnError: as `Indexed`; too few target images.
    """

    def __init__(self, config: Config, target: str) -> None:
        if not Path(target).expanduser().is_dir():
            raise TlearnError(f"objective.target: {target}: no such folder; give one as for data.path")
        self.source = Indexed(config)
        data = config.data.model_copy(
            update={"path": target, "max_train": None, "max_val": None, "sampling": "natural"}
        )
        self.target = Indexed(config.model_copy(update={"data": data}))
        if self.target.sizes["train"] < config.batch.size:
            raise TlearnError(
                f"objective.target: {target} has {self.target.sizes['train']} train images, fewer than "
                f"batch.size = {config.batch.size}"
            )
        source = self.source
        self.classes, self.per_class, self.colours = source.classes, source.per_class, source.colours
        self.fingerprint = hashlib.sha256(f"{source.fingerprint} {self.target.fingerprint}".encode()).hexdigest()
        self.warning, self.sizes = source.warning, dict(source.sizes)
        if set(self.target.classes) <= set(self.classes):
            labels = [self.classes.index(name) for name in self.target.classes]
            source.splits["target"] = self.target.splits["val"].relabelled(labels)
            self.sizes["target"] = len(source.splits["target"])

    def train_loader(
        self, p: Preprocessing, share: Share, device: torch.device, dtype: torch.dtype, views: int | None = None
    ) -> Steps:
        """See `Source`."""
        return PairedSteps(*(s.train_loader(p, share, device, dtype, views) for s in (self.source, self.target)))

    def eval_loader(
        self, split: str, p: Preprocessing, share: Share, device: torch.device, dtype: torch.dtype
    ) -> Steps:
        """See `Source`."""
        return self.source.eval_loader(split, p, share, device, dtype)


READERS: dict[str, type[Indexed] | type[Streamed]] = {"indexed": Indexed, "stream": Streamed}


def open_source(config: Config) -> Source:
    """The configured source.

    Raises:
        TlearnError: images or shards that cannot be had.
    """
    target = getattr(config.objective, "target", None)
    return WithTarget(config, target) if target else READERS[config.data.reader](config)
