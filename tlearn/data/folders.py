"""A folder with one sub-folder of images per class, as a source of images. Imports no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tlearn.data.scan import SPLIT_NAMES, Found, Listing
from tlearn.errors import TlearnError

_IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Folder:
    """FOLDER/<class>/**/image, or FOLDER/{train,val,test}/<class>/**/image.

    Raises:
        TlearnError: no file in a class folder.
    """

    root: Path
    whole = False

    @property
    def name(self) -> str:
        """See `Origin`."""
        return str(self.root)

    def read(self, found: Found) -> bytes:
        """See `Origin`."""
        return (self.root / found.file).read_bytes()

    def listing(self) -> Listing:
        """Every file below the folder, sorted: those in a class folder, and the others with the reason.

        What `walk` leaves out is ignored. Empty folders are classes too; where it comes split, those of train.
        """
        split_of = _split_folders(self.root)
        found, stray = [], {}
        for path in walk(self.root):
            parts = path.relative_to(self.root).parts
            file = "/".join(parts)
            split = split_of.get(parts[0]) if split_of else None
            below = parts[1:] if split_of else parts
            if split_of and split is None:
                stray[file] = "outside the train, val and test folders"
            elif len(below) < 2:
                stray[file] = "not in a class folder"
            else:
                status = status_of(path)
                if status is not None and not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                    stray[file] = "not a regular file"
                else:  # of a link into nowhere the reading of it will say why
                    size_and_time = (status.st_size, status.st_mtime_ns) if status is not None else (0, 0)
                    found.append(Found(file, below[0], split, *size_and_time))
        if not found:
            raise TlearnError(self._nothing_found(stray))
        roots = [self.root / name for name, split in split_of.items() if split == "train"] if split_of else [self.root]
        return Listing(found, stray, sorted({folder for root in roots for folder in _folders(root)}))

    def _nothing_found(self, stray: dict[str, str]) -> str:
        layout = "expected one sub-folder of images per class (FOLDER/cat/1.jpg, FOLDER/dog/2.jpg)"
        if not stray:
            return f"{self.root}: the folder is empty; {layout}"
        file, reason = next(iter(stray.items()))
        return f"{self.root}: {len(stray)} files but none in a class folder (first: {file}: {reason}); {layout}"


def status_of(path: Path) -> os.stat_result | None:
    """Of a file or what a link leads to; None where it cannot be had."""
    try:
        return path.stat()
    except OSError:
        return None


def _split_folders(source: Path) -> dict[str, str]:
    """{folder: split} where the source comes split, else {} (a class may well be called `train`)."""
    folders = _folders(source)
    splits = {name: SPLIT_NAMES[name.lower()] for name in folders if name.lower() in SPLIT_NAMES}
    train = [name for name, split in splits.items() if split == "train"]
    # of the others one may be empty, or flat: a test set without labels
    if not any(_folders(source / name) for name in train):
        return {}
    return splits if len(splits) == len(folders) or len(splits) > 1 else {}


def _folders(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.is_dir() and not _hidden(p)}


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in _IGNORED


def walk(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Every file below a folder, sorted; hidden ones are left out, links followed, but not in circles."""
    real = folder.resolve()
    if real in above:  # a loop of links
        return
    for path in sorted(folder.iterdir()):
        if _hidden(path):
            continue
        if path.is_dir():
            yield from walk(path, above | {real})
        else:
            yield path
