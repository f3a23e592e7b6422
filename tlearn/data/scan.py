"""The files of a data set: which there are, and what decoding each of them once shows. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tlearn.console import progress_bar
from tlearn.data.decode import FORMATS, UnreadableImageError, frames_of, load_rgb, open_image
from tlearn.data.workers import on_all_cores

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")
_PASSING = "cannot be read"  # a reason that may be gone the next time


@dataclass(frozen=True)
class Found:
    """A file of the source: `split` is None where the folder leaves it to us."""

    file: str
    class_name: str
    split: str | None
    size: int
    mtime_ns: int


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


def list_images(source: Path) -> tuple[list[Found], dict[str, str]]:
    """Every file below `source`, sorted: those in a class folder, and the others with the reason.

    What `walk` leaves out is ignored.
    """
    split_of = split_folders(source)
    found, stray = [], {}
    for path in walk(source):
        parts = path.relative_to(source).parts
        file = "/".join(parts)
        split = split_of.get(parts[0]) if split_of else None
        below = parts[1:] if split_of else parts
        if split_of and split is None:
            stray[file] = "outside the train, val and test folders"
        elif len(below) < 2:
            stray[file] = "not in a class folder"
        else:
            try:
                status = path.stat()
            except OSError as error:
                stray[file] = f"cannot be read: {error.strerror}"
                continue
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                stray[file] = "not a regular file"
                continue
            found.append(Found(file, below[0], split, status.st_size, status.st_mtime_ns))
    return found, stray


def split_folders(source: Path) -> dict[str, str]:
    """{folder: split} where the source comes split, else {} (a class may well be called `train`)."""
    folders = _folders(source)
    splits = {name: _SPLIT_FOLDERS[name.lower()] for name in folders if name.lower() in _SPLIT_FOLDERS}
    train = [name for name, split in splits.items() if split == "train"]
    # of the others one may be empty, or flat: a test set without labels
    if not any(_folders(source / name) for name in train):
        return {}
    return splits if len(splits) == len(folders) or len(splits) > 1 else {}


def class_folders(source: Path) -> list[str]:
    """Names of the class folders, also of empty ones; where the source comes split, those of train."""
    split_of = split_folders(source)
    roots = [source / name for name, split in split_of.items() if split == "train"] if split_of else [source]
    return sorted({folder for root in roots for folder in _folders(root)})


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


def listing_fingerprint(found: Iterable[Found], stray: Iterable[str]) -> str:
    """Changes when a file comes, goes, grows, shrinks or is written again."""
    digest = hashlib.sha256()
    for f in found:
        digest.update(f"{f.file}\0{f.size}\0{f.mtime_ns}\n".encode(errors="surrogateescape"))
    for file in stray:
        digest.update(f"{file}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def examine_all(source: Path, found: list[Found], journal: Path) -> dict[str, Examined]:
    """Decode every file once, on all cores; what an interrupted run journalled is not done again."""
    examined = {e.file: e for e in _read_journal(journal)}
    todo = [f for f in found if (e := examined.get(f.file)) is None or (e.size, e.mtime_ns) != (f.size, f.mtime_ns)]
    with (
        journal.open("a", encoding="utf-8") as file,
        progress_bar("verifying images", total=len(found), done=len(found) - len(todo)) as advance,
    ):
        for result in on_all_cores(partial(_examine, source), todo):
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


def _examine(source: Path, found: Found) -> Examined:
    known = {"file": found.file, "size": found.size, "mtime_ns": found.mtime_ns}
    try:
        data = (source / found.file).read_bytes()
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
