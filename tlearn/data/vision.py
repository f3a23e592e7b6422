"""The data sets of torchvision, downloaded into the cache, as a source of images."""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tlearn.data.decode import as_bmp
from tlearn.data.scan import Found, Listing, class_names
from tlearn.errors import TlearnError
from tlearn.files import cache_folder

PREFIX = "torchvision:"
_SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}  # what its classes call them


class Vision:
    """`torchvision:NAME`: a class of torchvision.datasets whose samples are (picture, class number).

    What has `train=True` and `train=False` gives train and test, what has `split=` the splits of its own; others are
    split by content. Where the class takes a `loader` its files are stored as they are, elsewhere pictures as BMP.

    Args:
        name: with the prefix.
        classes: names of the labels, in their order; default: those of the data set, or the numbers.

    Raises:
        TlearnError: no such class.
    """

    whole = True

    def __init__(self, name: str, classes: Sequence[str] = ()) -> None:
        from torchvision import datasets  # takes seconds, which other sources do not pay for

        self.name, self.classes = name, tuple(classes)
        self.kind = name.removeprefix(PREFIX)
        if self.kind not in datasets.__all__:
            near = get_close_matches(self.kind, datasets.__all__, 1)
            meant = f"did you mean {PREFIX}{near[0]}?" if near else "its names stand in torchvision.datasets"
            raise TlearnError(f"{name}: torchvision has no such data set; {meant}")
        self.make: Callable[..., Any] = getattr(datasets, self.kind)
        cache = cache_folder()
        self.root = cache / "torchvision" / self.kind
        self._parts: list[Any] = []

    def read(self, found: Found) -> bytes:
        """See `Origin`."""
        part, row = found.place
        image = self._parts[part][row][0]
        return image if isinstance(image, bytes) else as_bmp(image)

    def listing(self) -> Listing:
        """Every sample; what is not there yet is downloaded.

        Raises:
            TlearnError: it cannot be downloaded, or its samples are no pictures with a class.
        """
        parts = self._open()
        self._parts = list(parts.values())
        labels = {split: self._labels(part) for split, part in parts.items()}
        given = self.classes or _own_names(self._parts[0])
        names = class_names({n for numbers in labels.values() for n in numbers}, given, self.name)
        found = [
            Found(f"{self.kind}/{split or 'all'}/{row:06d}", names[number], split, 0, 0, (part, row))
            for part, (split, numbers) in enumerate(labels.items())
            for row, number in enumerate(numbers)
        ]
        return Listing(found, {}, list(names.values()))

    def _open(self) -> dict[str | None, Any]:
        """{split: data set}."""
        takes = inspect.signature(self.make).parameters
        if "train" in takes:
            return {"train": self._made(train=True), "test": self._made(train=False)}
        if "split" not in takes:
            return {None: self._made()}
        found = {
            split: next((part for own in names if (part := self._made(split=own)) is not None), None)
            for split, names in _SPLITS.items()
        }
        if found["train"] is None:
            raise TlearnError(f"{self.name}: none of its splits is called {' or '.join(_SPLITS['train'])}")
        return {split: part for split, part in found.items() if part is not None}

    def _made(self, **which: Any) -> Any:
        """None: it has no split of this name."""
        takes = inspect.signature(self.make).parameters
        options = {"root": str(self.root), "download": True, "loader": _bytes_of}
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            with redirect_stdout(sys.stderr):  # stdout belongs to results
                return self.make(**which, **{name: value for name, value in options.items() if name in takes})
        except ImportError as error:
            raise TlearnError(f"{self.name}: {error}; install what it needs") from None
        except (TypeError, ValueError) as error:
            if "split" in which and isinstance(error, ValueError):
                return None
            raise TlearnError(f"{self.name}: {error}; prepare its files as a folder or a table") from None
        except (OSError, EOFError, RuntimeError) as error:
            raise TlearnError(
                f"{self.name}: cannot be had: {error}\n  Its files are looked for in {self.root}, and downloaded where "
                "they are missing. Without a network run\n"
                f'    python -c "from torchvision.datasets import *; {self._call(which)}"\n'
                f"  on a machine that has one, and copy what it leaves in FOLDER to {self.root}"
            ) from None

    def _call(self, which: dict[str, Any]) -> str:
        arguments = "".join(f", {name}={value!r}" for name, value in which.items())
        return f"{self.kind}('FOLDER'{arguments}, download=True)"

    def _labels(self, part: Any) -> list[int]:
        targets = getattr(part, "targets", None)
        if targets is None or len(targets) != len(part):
            targets = (part[i][1] for i in range(len(part)))  # by way of every image
        try:
            image = part[0][0]
            if not (isinstance(image, bytes) or hasattr(image, "mode")):
                raise TypeError(f"its images are {type(image).__name__}")
            return [operator.index(target) for target in targets]
        except (TypeError, IndexError, ValueError) as error:
            raise TlearnError(f"{self.name}: its samples are not pictures with one class each ({error})") from None


def _own_names(part: Any) -> list[str]:
    """Of the classes; a name that several have is told apart by the number."""
    given = getattr(part, "classes", None) or ()
    names = [name if isinstance(name, str) else ", ".join(name) for name in given]
    return [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names)]


def _bytes_of(path: str | Path) -> bytes:
    return Path(path).read_bytes()
