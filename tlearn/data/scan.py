"""The images of a data set: what an origin says of them, and what decoding each once shows. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from tlearn.console import progress_bar, show
from tlearn.data.decode import FORMATS, UnreadableImageError, frames_of, load_rgb, open_image
from tlearn.data.workers import on_all_cores
from tlearn.errors import TlearnError

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What people call the splits, in lower case."""
_PASSING = "cannot be read"  # a reason that may be gone the next time


@dataclass(frozen=True)
class Found:
    """An image of an origin: `split` is None where the origin leaves it to us."""

    file: str
    """Its name, which no other one has."""
    class_name: str
    split: str | None
    size: int
    mtime_ns: int
    place: tuple[int, ...] = ()
    """Where its origin finds it, where the name does not say so."""


@dataclass(frozen=True)
class Listing:
    """What an origin holds."""

    found: list[Found]
    stray: dict[str, str]
    """{file: why it is not used}."""
    classes: list[str]
    """In the order of their labels, also those without an image."""

    def fingerprint(self) -> str:
        """Changes when a file comes, goes, grows, shrinks, is written again, or has another class or split."""
        digest = hashlib.sha256()
        for f in self.found:
            line = f"{f.file}\0{f.class_name}\0{f.split}\0{f.size}\0{f.mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        for file in self.stray:
            digest.update(f"{file}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


class Origin(Protocol):
    """Where labelled images come from. All behind it, from the check of every image to the shards, is the same."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def whole(self) -> bool:
        """It is held in memory as one: only the process that has it reads from it."""

    def listing(self) -> Listing:
        """Every image with its label, in a fixed order; no image is decoded where that can be helped.

        Raises:
            TlearnError: something is missing or contradicts itself.
        """

    def read(self, found: Found) -> bytes:
        """The file of an image.

        Raises:
            OSError: it cannot be read.
        """


@dataclass(frozen=True)
class Examined:
    """What decoding a file showed; `reason` is set where it cannot be used."""

    file: str
    size: int
    mtime_ns: int
    sha256: str = ""
    ending: str = ""
    width: int = 0
    height: int = 0
    sums: tuple[float, ...] = ()
    """Sum of x and of x^2 per RGB channel, x in 0..1."""
    frames: int = 1
    """Pictures in the file, of which the first is used."""
    reason: str = ""


def class_names(numbers: AbstractSet[int], names: Sequence[str], where: str) -> dict[int, str]:
    """{number: name} of the classes that have an image, in the order of the numbers.

    Args:
        numbers: the labels.
        names: of the classes from 0 on; without them the numbers are the names.
        where: what messages call the origin.

    Raises:
        TlearnError: a number that has no name.
    """
    if names and (beyond := sorted(n for n in numbers if not 0 <= n < len(names))):
        raise TlearnError(
            f"{where}: label {beyond[0]}, but there are {len(names)} names of classes, which count from 0"
        )
    if unused := [name for i, name in enumerate(names) if i not in numbers]:
        show(f"{where}: no image of {len(unused)} of {len(names)} classes, left out: {', '.join(unused[:5])}")
    return {n: names[n] if names else str(n) for n in sorted(numbers)}


def examine_all(origin: Origin, found: list[Found], journal: Path) -> dict[str, Examined]:
    """Decode every image once, on all cores; what an interrupted run journalled is not done again."""
    examined = {e.file: e for e in _read_journal(journal)}
    todo = [f for f in found if (e := examined.get(f.file)) is None or (e.size, e.mtime_ns) != (f.size, f.mtime_ns)]
    with (
        journal.open("a", encoding="utf-8") as file,
        progress_bar("verifying images", total=len(found), done=len(found) - len(todo)) as advance,
    ):
        examine = partial(_examine, origin)
        for result in map(examine, todo) if origin.whole else on_all_cores(examine, todo):
            examined[result.file] = result
            # the newline comes first: a line that a kill cut short ends there
            file.write("\n" + json.dumps(asdict(result)))
            advance()
    return examined


def _read_journal(journal: Path) -> Iterator[Examined]:
    if not journal.exists():
        return
    for line in journal.read_text(encoding="utf-8").split("\n"):
        try:
            known = Examined(**json.loads(line))
        except (ValueError, TypeError):  # the line that a kill cut short
            continue
        if not known.reason.startswith(_PASSING):
            yield known


def _examine(origin: Origin, found: Found) -> Examined:
    known = {"file": found.file, "size": found.size, "mtime_ns": found.mtime_ns}
    try:
        data = origin.read(found)
        image = open_image(data)
        ending = FORMATS[str(image.format)]
        rgb = load_rgb(image)
        frames = frames_of(data)
    except UnreadableImageError as error:
        return Examined(**known, reason=str(error))  # type: ignore[arg-type]
    except OSError as error:
        return Examined(**known, reason=f"{_PASSING}: {error.strerror}")  # type: ignore[arg-type]
    histogram = np.array(rgb.histogram(), dtype=np.float64).reshape(3, 256)
    levels = np.arange(256) / 255
    return Examined(
        **known,  # type: ignore[arg-type]
        sha256=hashlib.sha256(data).hexdigest(),
        ending=ending,
        width=rgb.width,
        height=rgb.height,
        sums=(*(histogram @ levels).tolist(), *(histogram @ levels**2).tolist()),
        frames=frames,
    )
