"""The stored outputs of the frozen layers of a stage: filled by all processes, read in place of images.

$TLEARN_CACHE/features/KEY/   (default: ~/.cache/tlearn/features); KEY is a hash of all on which the outputs depend
    about.json                what that is
    SPLIT.VIEW.rows, .sums    see data/store.py
    filled.lock               held while it is filled
    used.lock                 see data/room.py
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlearn.config import Config, Stage
from tlearn.console import progress_bar, show
from tlearn.data.loader import Batch, Loader, MicroBatches, Share, Steps
from tlearn.data.order import Array, SequentialOrder, ShuffledOrder, part_of
from tlearn.data.room import reserve
from tlearn.data.shards import Split
from tlearn.data.source import Indexed
from tlearn.data.store import Store
from tlearn.data.transforms import Pixels
from tlearn.errors import TlearnError
from tlearn.files import write_json
from tlearn.models.build import Model
from tlearn.models.cut import Cut, NoCutError, find_cut, fingerprint, outputs, rest_only
from tlearn.runtime import Runtime

_VERSION = 1
_FILL_IMAGES = 64
_READ_ROWS = 256
_RESERVE_BYTES = 2**30
_PROBES = 4
"""Rows of each rank that are computed again where all are there already."""


class StageCache:
    """The stored outputs of the frozen layers of a stage.

    Args:
        config, runtime, source: of the run.
        model: as `set_trainable` left it.
        stage: with views filled in.

    Raises:
        NoCutError: no frozen layer gives all that the rest needs.
    """

    def __init__(self, config: Config, runtime: Runtime, model: Model, source: Indexed, stage: Stage) -> None:
        assert stage.views is not None
        self.config, self.runtime, self.model, self.source, self.views = config, runtime, model, source, stage.views
        self.cut = self._agreed_cut()
        dtype = torch.bfloat16 if config.features.dtype == "bf16" else self.cut.dtype
        about = self._about(dtype)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.root = Path(os.environ.get("TLEARN_CACHE") or "~/.cache/tlearn").expanduser() / "features"
        self.folder, self.about = self.root / digest[:24], about
        self.stores = {
            (split, view): Store(self.folder / f"{split}.{view}", source.sizes[split], self.cut.shape, dtype)
            for split, views in (("train", self.views), ("val", 1))
            for view in range(views)
        }

    def holds_all_for(self, other: StageCache) -> bool:
        """Whether what `other` is to hold can be computed from this; its layers must begin with those of this one."""
        is_exact = all(store.dtype == self.cut.dtype for store in self.stores.values())
        return is_exact and self.views >= other.views and self.about["augment"] == other.about["augment"]

    @contextmanager
    def filled(self, start: Callable[[], StageCache | None] = lambda: None) -> Iterator[None]:
        """Inside, every row is there.

        Args:
            start: asked where rows are missing: the outputs of earlier layers, if they are stored, all of them.

        Raises:
            NoCutError: it would be too large, or the disk is full.
        """
        with ExitStack() as held:
            if trouble := self.runtime.on_main(lambda: self._prepare(held)):
                raise NoCutError(trouble)
            self._wait_for_others()
            if not all(self.runtime.gather_lists([(self.folder / "about.json").exists()])):
                raise NoCutError(f"not all machines see {self.root}; set TLEARN_CACHE to a folder on a shared disk")
            self._fill(start)
            self._raise_if_stopped()  # and wait until all rows are there
            for store in self.stores.values():
                store.open()
            self.runtime.on_main(self._release)
            yield

    def train_loader(self, share: Share) -> Steps:
        """As `Source.train_loader`: the same samples in the same order."""
        split = self.source.splits["train"]
        order = ShuffledOrder(split.shard_sizes(), self.config.seed)
        stores = [self.stores["train", view] for view in range(self.views)]
        return Loader(_Stored(split, order, share, stores), self._finish, device=self.runtime.device, workers=0)

    def val_loader(self) -> Steps:
        """As `Source.eval_loader`."""
        split = self.source.splits["val"]
        share = Share(1, self.runtime.rank, self.runtime.world_size).for_evaluation()
        dataset = _Stored(split, SequentialOrder(len(split)), share, [self.stores["val", 0]])
        return Loader(dataset, self._finish, device=self.runtime.device, workers=0)

    def in_order(self, split: str) -> Iterator[torch.Tensor]:
        """What is stored of a split's images, (b, *shape) on the device, in their order; of their first view."""
        n = self.stores[split, 0].n
        for rows in np.array_split(np.arange(n), -(-n // _READ_ROWS)):
            yield self.read((split, 0), rows)

    def read(self, key: tuple[str, int], rows: Array) -> torch.Tensor:
        """What is stored of these rows of a split, in one of its views: (b, *shape) on the device."""
        return self._finish(self.stores[key].read(rows).to(self.runtime.device))

    def blank(self, n: int) -> Batch:
        """See `Inputs`."""
        labels = torch.zeros(n, dtype=torch.int64)
        features = torch.zeros(n, *self.cut.shape, device=self.runtime.device)
        return Batch(self._finish(features), labels.to(self.runtime.device), labels, labels)

    def _finish(self, features: torch.Tensor) -> torch.Tensor:
        features = features.to(self.cut.dtype)
        return features.contiguous(memory_format=torch.channels_last) if self.cut.channels_last else features

    def _trial(self) -> torch.Tensor:
        """Two images of noise."""
        size_px = self.model.preprocessing.size_px
        noise = torch.randn(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
        return noise.to(self.runtime.device, self.runtime.dtype, memory_format=torch.channels_last)

    def _about(self, dtype: torch.dtype) -> dict[str, Any]:
        data, splits, environment = self.config.data, self.source.splits, self.runtime.environment()
        return {
            "version": _VERSION,
            "backbone": self.model.backbone,
            "stem": self.config.model.stem,
            "layer": self.cut.name,
            "shape": list(self.cut.shape),
            "weights": fingerprint(self.model),
            "preprocessing": repr(self.model.preprocessing),
            "augment": [data.augment.scale, data.augment.ratio, data.augment.hflip] if self.views > 1 else None,
            "seed": self.config.seed if self.views > 1 else None,
            "data": self.source.fingerprint,
            "samples": {
                name: hashlib.sha256(splits[name].rows["key"].tobytes()).hexdigest() for name in ("train", "val")
            },
            "dtype": str(dtype),
            **{key: environment[key] for key in ("versions", "device", "precision")},
        }

    def _agreed_cut(self) -> Cut:
        """The same on all ranks, or an error on all."""
        try:
            with self.runtime.accelerator.autocast():
                cut = find_cut(self.model, self._trial())
            found = cut.name
        except NoCutError as error:
            found = f"!{error}"
        if len(everyones := set(self.runtime.gather_lists([found]))) > 1:
            raise NoCutError(f"the processes do not agree where to cut it: {', '.join(sorted(everyones))}")
        if found.startswith("!"):
            raise NoCutError(found.removeprefix("!"))
        return cut

    def _prepare(self, held: ExitStack) -> str | None:
        """On rank 0: room and files; what is wrong, or None."""
        needed = sum(store.nbytes for store in self.stores.values())
        limit = self.config.features.max_gib * 2**30
        if needed > limit:
            return f"{needed / 2**30:.2f} GiB are more than features.max_gib={self.config.features.max_gib:g}"
        try:
            is_new = reserve(self.folder, needed, limit, held)
            self._filling = held.enter_context((self.folder / "filled.lock").open("a+"))
            try:
                for store in self.stores.values():
                    store.allocate()
                if shutil.disk_usage(self.root).free < _RESERVE_BYTES:
                    raise OSError(errno.ENOSPC, "less than 1 GiB would be left for checkpoints")
            except OSError:
                if is_new:
                    shutil.rmtree(self.folder)
                raise
            write_json(self.folder / "about.json", self.about)
        except TlearnError as full:
            return f"features.max_gib={self.config.features.max_gib:g}: {full}"
        except OSError as error:
            return f"{error.filename or self.folder}: {error.strerror}"
        return None

    def _wait_for_others(self) -> None:
        """Until no other run fills the same."""
        told = False
        while not self.runtime.on_main(self._is_mine):
            if not told:
                show(f"waiting for another run that fills {self.folder}")
            told = True
            time.sleep(0.2)
            self._raise_if_stopped()

    def _is_mine(self) -> bool:
        try:
            fcntl.flock(self._filling, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _release(self) -> None:
        self._filling.close()

    def _fill(self, start: Callable[[], StageCache | None]) -> None:
        """Read all that is there, compute what is not: every rank its part of both."""
        runtime, todo, n = self.runtime, dict[tuple[str, int], Array](), 0
        for key, store in self.stores.items():
            store.open()
            first, last = part_of(0, store.n, runtime.rank, runtime.world_size)
            missing = store.missing(first, last)
            if not len(missing) and not self._agrees(key, np.arange(first, min(last, first + _PROBES))):
                show(f"{self.folder}: does not hold what the layers give; it is filled anew")
                missing = np.arange(first, last)
            everyones = np.array(runtime.gather_lists(missing.tolist()), dtype=np.int64)
            first, last = part_of(0, len(everyones), runtime.rank, runtime.world_size)
            todo[key] = everyones[first:last]
            n += len(everyones)
        earlier = start() if n else None
        with progress_bar("storing features", sum(map(len, todo.values()))) as advance:
            for key, rows in todo.items():
                if runtime.stop:
                    return
                for part, features in self._computed(key, rows, earlier):
                    self.stores[key].write(part, features)
                    advance(len(part))

    def _agrees(self, key: tuple[str, int], rows: Array) -> bool:
        """Whether some rows hold what would be computed now."""
        store = self.stores[key]
        for part, features in self._computed(key, rows):
            stored, now = store.read(part).double(), features.cpu().double()
            coarse = 2e-2 if torch.bfloat16 in (store.dtype, features.dtype) else 1e-3
            if not (stored - now).abs().max() <= coarse * now.abs().max():  # also where it is not a number
                return False
        return True

    def _computed(
        self, key: tuple[str, int], rows: Array, earlier: StageCache | None = None
    ) -> Iterator[tuple[Array, torch.Tensor]]:
        """What the frozen beginning gives for these rows of a split, in one of its views; until a signal comes.

        Args:
            key: split and view.
            rows: of it.
            earlier: holds the outputs of the first of these layers.
        """
        if not len(rows):
            return
        self.model.train()
        if earlier is not None:
            with self.runtime.accelerator.autocast(), rest_only(self.model.net, earlier.cut):
                for part in np.array_split(rows, -(-len(rows) // _FILL_IMAGES)):
                    if self.runtime.stop:
                        return
                    features = earlier.read(key, part)
                    yield part, outputs(self.model.net, self.cut, features)
            return
        split, view = key
        share = Share(_FILL_IMAGES, 0, 1)
        workers = self.config.data.workers if len(rows) > _FILL_IMAGES else 0
        loader = self.source.listed_loader(
            split, rows, self.views, self.model.preprocessing, share, self.runtime.device, self.runtime.dtype, workers
        )
        done = 0
        with self.runtime.accelerator.autocast(), loader.steps(0, loader.steps_per_epoch, view) as steps:
            for (batch,) in steps:
                if self.runtime.stop:
                    return
                n = len(batch.labels)
                yield rows[done : done + n], outputs(self.model.net, self.cut, batch.images)
                done += n

    def _raise_if_stopped(self) -> None:
        stopped = torch.tensor(float(bool(self.runtime.stop)), device=self.runtime.device)
        if self.runtime.sum(stopped):
            raise self.runtime.stop.error()


class _Stored(MicroBatches):
    """Reads rows in place of images; one store per view."""

    def __init__(self, split: Split, order: Any, share: Share, stores: list[Store]) -> None:
        super().__init__(split, order, _no_image, share, 0, 0, len(stores))
        self.stores = stores

    def _inputs(self, samples: Array, view: int) -> torch.Tensor:
        return self.stores[view].read(samples)


def _no_image(data: bytes, seed: int) -> Pixels:
    raise AssertionError("rows are read in place of images")
