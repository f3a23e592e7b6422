"""Tar shards in WebDataset's layout, written by anybody. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tlearn.console import progress_bar
from tlearn.data.decode import FORMATS
from tlearn.data.scan import Found, Listing, class_names
from tlearn.data.shards import OpenFiles
from tlearn.errors import TlearnError

IMAGE_ENDINGS = (*sorted(set(FORMATS.values())), "jpeg", "tiff")
"""Endings of the member that is the image, without the dot."""
_LABEL_KEYS = ("label", "class", "cls")
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset leaves out too

_Span = tuple[int, int]  # offset and size of a member in its shard, bytes


class Tars:
    """Shards on this machine: <key>.jpg (.png, ...) and its label, the first of <key>.cls, <key>.json and <key>.txt.

    A label is a name, or a number that counts the classes from 0. In .json it stands under `label`, `class` or `cls`.

    Args:
        pattern: `x-{000000..000127}.tar`; the shards are split by content, unless `val_from` names others for val.
        classes: names of the numbers, in their order; without them the numbers are the names.
        val_from: another such pattern.

    Raises:
        TlearnError: a shard that does not exist, or is on another machine.
    """

    whole = False

    def __init__(self, pattern: str, classes: Sequence[str] = (), val_from: str | None = None) -> None:
        self.name, self.classes = pattern, tuple(classes)
        train, val = _local(pattern), _local(val_from) if val_from is not None else []
        if both := sorted(set(train) & set(val)):
            raise TlearnError(f"--val-from {val_from}: {both[0]} is also among {pattern}")
        self.paths = [*train, *val]
        self.splits = [*(["train" if val else None] * len(train)), *["val"] * len(val)]
        self._files = OpenFiles()

    def read(self, found: Found) -> bytes:
        """See `Origin`."""
        shard, offset, size = found.place
        return self._bytes(shard, (offset, size))

    def _bytes(self, shard: int, span: _Span) -> bytes:
        offset, size = span
        return os.pread(self._files.descriptor(self.paths[shard]), size, offset)

    def listing(self) -> Listing:
        """From the headers of the shards and the labels; no image is read.

        Raises:
            TlearnError: a shard that cannot be read, no sample with an image and a label, a label without a name.
        """
        labels: dict[str, str] = {}
        places: dict[str, tuple[int, int, int]] = {}
        stray: dict[str, str] = {}
        with progress_bar("listing shards", total=len(self.paths)) as advance:
            for shard, path in enumerate(self.paths):
                for sample in _spans(path):
                    ending = next((e for e in IMAGE_ENDINGS if e in sample), None)
                    file = f"{path}/{sample['__key__']}{'.' + ending if ending else ''}"
                    if file in labels or file in stray:  # the same name once more, further on
                        file += f" (byte {min(span[0] for span in sample.values() if isinstance(span, tuple))})"
                    try:
                        if ending is None:
                            raise ValueError(f"no image beside it (.{', .'.join(IMAGE_ENDINGS)})")
                        labels[file] = self._label(shard, sample)
                        places[file] = (shard, *sample[ending])
                    except ValueError as error:
                        stray[file] = str(error)
                advance()
        if not labels:
            file, reason = next(iter(stray.items()), (self.name, "there is none"))
            raise TlearnError(f"{self.name}: no sample with an image and a label (first: {file}: {reason})")
        names = self._names(labels)
        times_ns = [path.stat().st_mtime_ns for path in self.paths]
        found = [
            Found(file, names[labels[file]], self.splits[shard], size, times_ns[shard], (shard, offset, size))
            for file, (shard, offset, size) in places.items()
        ]
        return Listing(found, stray, list(dict.fromkeys(names.values())))

    def _label(self, shard: int, sample: dict[str, Any]) -> str:
        """Raises ValueError with the reason where there is none."""
        for member in ("cls", "json", "txt"):
            if member not in sample:
                continue
            try:
                text = self._bytes(shard, sample[member]).decode().strip()
                if member == "json":
                    values = json.loads(text)
                    given = [values[k] for k in _LABEL_KEYS if k in values] if isinstance(values, dict) else []
                    text = str(given[0]).strip() if given and isinstance(given[0], str | int) else ""
            except ValueError as error:
                raise ValueError(f"its .{member} cannot be read: {error}") from None
            if text:
                return str(int(text)) if text.isascii() and text.isdecimal() else text
        raise ValueError(f"no label in its .cls, .json ({', '.join(_LABEL_KEYS)}) or .txt")

    def _names(self, labels: dict[str, str]) -> dict[str, str]:
        """{label: class}, in the order of the classes, of {file: label}."""
        first = {label: file for file, label in reversed(labels.items())}
        numbers = {int(label) for label in first if label.isdecimal()}
        others = sorted(label for label in first if not label.isdecimal())
        if self.classes and (unknown := [label for label in others if label not in self.classes]):
            raise TlearnError(f"{first[unknown[0]]}: label {unknown[0]!r} is none of --classes")
        if self.classes:
            numbers |= {self.classes.index(label) for label in others}
        named = {str(n): name for n, name in class_names(numbers, self.classes, self.name).items()}
        return named | {label: label for label in others}


def _local(pattern: str) -> list[Path]:
    urls = expand(pattern)
    for url in urls:
        if not Path(url).is_file():
            raise TlearnError(
                f"{url}: shards are prepared from files on this machine; copy them here, or read them as they are: "
                "tlearn train data.reader=stream"
            )
    return [Path(url) for url in urls]


def _spans(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a shard as webdataset groups them, with (offset, size) in place of every member's bytes."""
    from webdataset.tariterators import group_by_keys

    def members() -> Iterator[dict[str, Any]]:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not _META.match(member.name):
                    span = (member.offset_data, member.size)
                    yield {"fname": member.name, "data": span, "__url__": str(path)}

    try:
        yield from group_by_keys(members())
    except tarfile.ReadError as error:
        raise TlearnError(f"{path}: cannot be read: {error}; compressed shards have to be unpacked first") from None
    except (ValueError, OSError, tarfile.TarError) as error:
        raise TlearnError(f"{path}: cannot be read: {error.args[0]}") from None


def expand(pattern: str) -> list[str]:
    """`x-{000000..000127}.tar`: 128 files or URLs; `pipe:COMMAND` and http URLs as webdataset takes them.

    Raises:
        TlearnError: a file that does not exist.
    """
    from webdataset.shardlists import expand_urls

    try:
        urls: list[str] = expand_urls(pattern)
    except ValueError as error:
        raise TlearnError(f"{pattern}: not a pattern of shards, such as x-{{000000..000127}}.tar: {error}") from None
    for url in urls:
        if ":" not in url and not Path(url).is_file():
            raise TlearnError(f"{url}: no such shard (of {pattern!r})")
    return urls


def samples(url: str) -> Iterator[dict[str, Any]]:
    """What `wds.WebDataset` makes of a shard, by its own parts; unlike there, the file is closed at the end."""
    from webdataset.gopen import gopen  # its import takes a second, and the indexed reader does not need it
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    stream = gopen(url)
    try:
        yield from group_by_keys({**member, "__url__": url} for member in tar_file_iterator(stream))
        stream.close()  # the end of a program that failed shows here
    except ValueError as error:  # of webdataset: a name that stands there twice
        raise TlearnError(f"{url}: cannot be read: {error.args[0]}") from None
    except (OSError, tarfile.TarError) as error:
        raise TlearnError(f"{url}: cannot be read: {error}") from None
    finally:
        with suppress(OSError):
            stream.close()
