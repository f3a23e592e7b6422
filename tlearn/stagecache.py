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
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlearn.config import Config, Stage
from tlearn.console import progress_bar, show
from tlearn.data.loader import Batch, Loader, MicroBatches, Share, Steps, train_order
from tlearn.data.order import Array, SequentialOrder, part_of
from tlearn.data.room import discard, reserve
from tlearn.data.shards import Split
from tlearn.data.source import Indexed
from tlearn.data.store import Store
from tlearn.data.transforms import Pixels
from tlearn.errors import TlearnError
from tlearn.files import cache_folder, write_json, write_text
from tlearn.models.build import Model
from tlearn.models.cut import Cut, NoCutError, find_cut, fingerprint, outputs, rest_only
from tlearn.runtime import Runtime

_VERSION = 1
_FILL_IMAGES = 64
_ROUNDS = 16
"""Between two agreements of the ranks whether to stop, in blocks of _FILL_IMAGES."""
_READ_ROWS = 256
_RESERVE_BYTES = 2**30
_PROBES = 4
"""Rows of each rank that are computed again where all are there already."""


Start = Callable[[ExitStack], "StageCache | None"]


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
        self.root = cache_folder() / "features"
        self.folder, self.about = self.root / digest[:24], about
        self.stores = {
            (split, view): Store(self.folder / f"{split}.{view}", source.sizes[split], self.cut.shape, dtype)
            for split, views in (("train", self.views), ("val", 1))
            for view in range(views)
        }

    def can_start(self, other: StageCache) -> bool:
        """Whether what `other` is to hold can be computed from this, whose frozen layers are among its own."""
        is_exact = all(store.dtype == self.cut.dtype for store in self.stores.values())
        has_views = self.views >= other.views and self.about["augment"] == other.about["augment"]
        passed_over = list(self.cut.layers)[:-1]
        is_behind = not any(f"{other.cut.name}.".startswith(f"{name}.") for name in passed_over)
        return is_exact and has_views and is_behind

    def is_there(self) -> bool:
        """Whether somebody has begun to fill it."""
        return self.runtime.on_main(self.folder.exists)

    @property
    def nbytes(self) -> int:
        """On the disk."""
        return sum(store.nbytes for store in self.stores.values())

    @contextmanager
    def filled(self, start: Start = lambda held: None) -> Iterator[None]:
        """Inside, every row is there.

        Args:
            start: asked where rows are missing: outputs of earlier layers, all of them, as long as the stack is open.

        Raises:
            NoCutError: it would be too large, or the disk is full.
        """
        runtime = self.runtime
        with ExitStack() as held:
            _raise_if(runtime.on_main(lambda: self._reserve(held)))
            self._wait_for_others()
            _raise_if(runtime.on_main(self._allocate))
            token = runtime.on_main(self._leave_token)
            if token is None:
                raise NoCutError(f"{self.folder}: nothing can be written there")
            if not all(runtime.gather_lists([_content(self.folder / "token") == token])):
                runtime.on_main(self._discard)
                raise NoCutError(f"not all machines see {self.root}; set TLEARN_CACHE to a folder on a shared disk")
            with ExitStack() as starting:
                trouble = self._fill(lambda: start(starting))
            # and wait until all rows are there
            if troubles := [t for t in runtime.gather_lists([trouble]) if t]:
                runtime.on_main(self._discard)
                raise NoCutError(troubles[0])
            self._raise_if_stopped()
            for store in self.stores.values():
                store.open()
            runtime.on_main(self._release)
            yield

    def train_loader(self, share: Share) -> Steps:
        """As `Source.train_loader`: the same samples in the same order."""
        split = self.source.splits["train"]
        order = train_order(split, self.config.data.sampling, self.config.seed)
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
            "augment": data.augment.model_dump(exclude={"views"}) if self.views > 1 else None,
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

    def _reserve(self, held: ExitStack) -> str | None:
        """On rank 0: room in the cache; what is wrong, or None."""
        limit = self.config.features.max_gib * 2**30
        if self.nbytes > limit:
            return f"{self.nbytes / 2**30:.3g} GiB are more than features.max_gib={self.config.features.max_gib:g}"
        try:
            self._used = reserve(self.folder, self.nbytes, limit, held)
            self._filling = held.enter_context((self.folder / "filled.lock").open("a+"))
        except TlearnError as full:
            return f"features.max_gib={self.config.features.max_gib:g}: {full}"
        except OSError as error:
            return f"{error.filename or self.folder}: {error.strerror}"
        return None

    def _allocate(self) -> str | None:
        """On rank 0, which alone fills it: the files; what is wrong, or None."""
        try:
            is_new = [store.allocate() for store in self.stores.values()]
            if any(is_new) and shutil.disk_usage(self.root).free < _RESERVE_BYTES:
                raise OSError(errno.ENOSPC, "less than 1 GiB would be left for checkpoints")
            if any(is_new):
                write_json(self.folder / "about.json", self.about)
        except OSError as error:
            self._discard()
            return f"{error.filename or self.folder}: {error.strerror}"
        return None

    def _leave_token(self) -> str | None:
        """By which other machines tell that it is this folder that they see, and not their own of the same name."""
        token = secrets.token_hex(16)
        try:
            write_text(self.folder / "token", token)
        except OSError:
            return None
        return token

    def _release(self) -> None:
        self._filling.close()

    def _discard(self) -> None:
        """Nothing of it is of use."""
        discard(self.folder, self._used)

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

    def _fill(self, start: Callable[[], StageCache | None]) -> str | None:
        """Read all that is there, compute what is not: every rank its part of both. What went wrong on this one."""
        runtime, todo = self.runtime, dict[tuple[str, int], Array]()
        for key, store in self.stores.items():
            store.open()
            first, last = part_of(0, store.n, runtime.rank, runtime.world_size)
            missing = store.missing(first, last)
            if not len(missing) and not self._agrees(key, np.arange(first, min(last, first + _PROBES))):
                show(f"{self.folder}: does not hold what the layers give; it is filled anew")
                missing = np.arange(first, last)
            everyones = np.array(runtime.gather_lists(missing.tolist()), dtype=np.int64)
            if len(everyones):
                todo[key] = everyones
        earlier, trouble = start() if todo else None, None
        with progress_bar("storing features", sum(map(len, todo.values()))) as advance:
            for key, everyones in todo.items():
                first, last = part_of(0, len(everyones), runtime.rank, runtime.world_size)
                rounds = -(-len(everyones) // runtime.world_size // _FILL_IMAGES)
                with closing(self._computed(key, everyones[first:last], earlier)) as parts:
                    for i in range(rounds):  # as many on every rank, so that they can agree on a stop
                        for part, features in islice(parts, 1):
                            try:
                                self.stores[key].write(part, features)
                            except OSError as error:  # a quota, or a disk that cannot allocate beforehand
                                trouble = trouble or f"{error.filename or self.folder}: {error.strerror}"
                            advance(len(part) * runtime.world_size)
                        if i % _ROUNDS == 0:
                            self._raise_if_stopped()
        return trouble

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
    ) -> Generator[tuple[Array, torch.Tensor]]:
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


def _raise_if(trouble: str | None) -> None:
    if trouble:
        raise NoCutError(trouble)


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


class _Stored(MicroBatches):
    """Reads rows in place of images; one store per view."""

    def __init__(self, split: Split, order: Any, share: Share, stores: list[Store]) -> None:
        super().__init__(split, order, _no_image, share, 0, 0, len(stores))
        self.stores = stores

    def _inputs(self, samples: Array, view: int, first: int) -> torch.Tensor:
        return self.stores[view].read(samples)


def _no_image(data: bytes, seed: int) -> Pixels:
    raise AssertionError("rows are read in place of images")
