"""Frozen layers run once per image: their outputs are stored, and training reads them in place of images.

$TLEARN_CACHE/features/KEY/   (default: ~/.cache/tlearn/features); KEY is a hash of all on which the outputs depend
    about.json                what that is
    SPLIT.VIEW.rows, .sums    see data/store.py
    filled.lock, used.lock    held while it is filled, and while a run reads it
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tlearn.checkpoint import Progress
from tlearn.config import Config, Stage
from tlearn.console import progress_bar, show
from tlearn.data.loader import Batch, Loader, MicroBatches, Share, Steps
from tlearn.data.order import Array, SequentialOrder, ShuffledOrder, part_of
from tlearn.data.shards import Split
from tlearn.data.source import Indexed, Source
from tlearn.data.store import Store
from tlearn.data.transforms import Pixels
from tlearn.errors import TlearnError
from tlearn.files import write_json
from tlearn.models.build import Model
from tlearn.models.cut import NoCutError, find_cut, fingerprint, outputs, rest_only
from tlearn.runtime import Runtime

CACHED = "cached"
_VERSION = 1
_FILL_IMAGES = 64
_READ_ROWS = 256
_PROBES = 4
"""Rows of each rank that are computed again where all are there already."""


class Inputs(NamedTuple):
    """What a stage is fed."""

    train: Callable[[Share], Steps]
    val: Steps
    blank: Callable[[int], Batch]
    """So many inputs of class 0, all zeros."""


@contextmanager
def stored_inputs(
    config: Config, runtime: Runtime, model: Model, source: Source, progress: Progress, stage: Stage, images: Inputs
) -> Iterator[Inputs]:
    """Inside, the network is what is behind its frozen beginning, and fed with what that gives; or nothing is changed.

    Args:
        config, runtime, model, source: of the run; the model as `set_trainable` left it.
        progress: keeps what was decided.
        stage: with image size and views filled in.
        images: where the frozen layers compute in every step.

    Raises:
        TlearnError: `features.cache: on`, and why not.
        StoppedBySignalError: a signal came while the store was filled; what is there is used the next time.
    """
    decided = progress.features.get(stage.name)
    with ExitStack() as held:
        try:
            if config.features.cache == "off" or decided not in (None, CACHED):
                raise NoCutError(decided or "features.cache: off")
            if not isinstance(source, Indexed):
                raise NoCutError("a stream has no index")
            _check_use(config, model, stage, decided)
            cache = StageCache(config, runtime, model, source, stage)
            held.enter_context(cache.filled())
        except NoCutError as reason:
            frozen = any(not p.requires_grad for p in model.net.parameters())
            if config.features.cache == "on" and frozen:
                raise TlearnError(f"features.cache: on: stage {stage.name}: {reason}") from None
            if decided is None and config.features.cache == "auto" and frozen:
                show(f"stage {stage.name}: frozen layers run in every step: {reason}")
            progress.features[stage.name] = str(reason)
            yield images
            return
        progress.features[stage.name] = CACHED
        held.enter_context(rest_only(model.net, cache.cut))
        yield Inputs(cache.train_loader, cache.val_loader(), cache.blank)


def _check_use(config: Config, model: Model, stage: Stage, decided: str | None) -> None:
    """Raise where images do not come again."""
    if stage.views is None:
        raise NoCutError("new crops in every epoch; set data.augment.views=4, say")
    if stage.image_size != model.preprocessing.size_px:
        raise NoCutError("it trains at another size than it is evaluated at")
    if stage.views >= stage.epochs and config.features.cache == "auto" and decided is None:
        raise NoCutError(f"no view comes again in {stage.epochs} epochs")


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
        with runtime.accelerator.autocast():
            self.cut = find_cut(model, self._trial())
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

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Inside, every row is there.

        Raises:
            NoCutError: it would be too large, or the disk is full.
        """
        with ExitStack() as held:
            trouble = self.runtime.on_main(lambda: self._prepare(held))
            self._raise_if_stopped()
            if trouble:
                raise NoCutError(trouble)
            for store in self.stores.values():
                store.open()
            self._fill()
            self._raise_if_stopped()
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
        store = self.stores[split, 0]
        for rows in np.array_split(np.arange(store.n), -(-store.n // _READ_ROWS)):
            yield self._finish(store.read(rows).to(self.runtime.device))

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
        data, splits = self.config.data, self.source.splits
        return {
            "version": _VERSION,
            "backbone": self.model.backbone,
            "layer": self.cut.name,
            "shape": list(self.cut.shape),
            "weights": fingerprint(self.model.net, self.cut),
            "preprocessing": repr(self.model.preprocessing),
            "augment": [data.augment.scale, data.augment.ratio, data.augment.hflip] if self.views > 1 else None,
            "seed": self.config.seed if self.views > 1 else None,
            "data": self.source.fingerprint,
            "samples": {
                name: hashlib.sha256(splits[name].rows["key"].tobytes()).hexdigest() for name in ("train", "val")
            },
            "dtype": str(dtype),
            "precision": self.runtime.precision,
            "device": self.runtime.device.type,
        }

    def _prepare(self, held: ExitStack) -> str | None:
        """On rank 0: room, files and locks; what is wrong, or None."""
        needed = sum(store.nbytes for store in self.stores.values())
        limit = self.config.features.max_gib * 2**30
        if needed > limit:
            return f"{needed / 2**30:.2f} GiB are more than features.max_gib={self.config.features.max_gib:g}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._used = held.enter_context((self.folder / "used.lock").open("w"))
            fcntl.flock(self._used, fcntl.LOCK_SH)
            self._filling = held.enter_context((self.folder / "filled.lock").open("w"))
            if not self._locked():
                return None  # stopped
            _make_room(self.root, self.folder, limit - needed)
            write_json(self.folder / "about.json", self.about)
            for store in self.stores.values():
                store.allocate()
        except OSError as error:
            return f"{error.filename or self.folder}: {error.strerror}"
        return None

    def _locked(self) -> bool:
        """Wait for another run that fills the same; False: a signal came."""
        told = False
        while not self.runtime.stop:
            try:
                fcntl.flock(self._filling, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    show(f"waiting for another run that fills {self.folder}")
                told = True
                time.sleep(0.2)
            else:
                return True
        return False

    def _release(self) -> None:
        fcntl.flock(self._filling, fcntl.LOCK_UN)

    def _fill(self) -> None:
        """Every rank its part: read all that is there, compute what is not."""
        runtime, todo = self.runtime, dict[tuple[str, int], Array]()
        for key, store in self.stores.items():
            start, stop = part_of(0, store.n, runtime.rank, runtime.world_size)
            todo[key] = store.missing(start, stop)
            if not len(todo[key]) and not self._agrees(key, np.arange(start, min(stop, start + _PROBES))):
                show(f"{self.folder}: does not hold what the layers give; it is filled anew")
                todo[key] = np.arange(start, stop)
        with progress_bar("storing features", sum(map(len, todo.values()))) as advance:
            for key, rows in todo.items():
                for part, features in self._computed(key, rows):
                    self.stores[key].write(part, features)
                    advance(len(part))
                self.stores[key].flush()

    def _agrees(self, key: tuple[str, int], rows: Array) -> bool:
        """Whether some rows hold what would be computed now."""
        store = self.stores[key]
        for part, features in self._computed(key, rows):
            stored, now = store.read(part).double(), features.cpu().double()
            coarse = 2e-2 if torch.bfloat16 in (store.dtype, features.dtype) else 1e-3
            if (stored - now).abs().max() > coarse * now.abs().max():
                return False
        return True

    def _computed(self, key: tuple[str, int], rows: Array) -> Iterator[tuple[Array, torch.Tensor]]:
        """What the frozen beginning gives for these rows of a split, in one of its views; until a signal comes."""
        if not len(rows):
            return
        split, view = key
        share = Share(_FILL_IMAGES, 0, 1)
        workers = self.config.data.workers if len(rows) > _FILL_IMAGES else 0
        loader = self.source.listed_loader(
            split, rows, self.views, self.model.preprocessing, share, self.runtime.device, self.runtime.dtype, workers
        )
        self.model.train()
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


def _make_room(root: Path, mine: Path, limit: float) -> None:
    """Remove what was not used longest and nobody uses, until the rest of the cache is no larger than `limit` bytes."""
    others = sorted((path for path in root.iterdir() if path != mine and path.is_dir()), key=_last_use)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in others}
    for path in others:
        if sum(sizes.values()) <= limit:
            return
        with (path / "used.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(path)
            del sizes[path]


def _last_use(path: Path) -> float:
    lock = path / "used.lock"
    return lock.stat().st_mtime if lock.exists() else 0.0
