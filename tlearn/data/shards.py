"""Prepared data on disk: WebDataset tar shards, an index.json, and a memory-mapped table of samples per split.

OUT/index.json          classes, counts, statistics, shards with bytes and checksums
OUT/train-000000.tar    <key>.jpg <key>.cls <key>.json: readable by any `wds.WebDataset`
OUT/train.samples.npy   one row a sample: where its bytes lie, its label, its key
OUT/audit.json          what happened to every file of the source
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tlearn.data.decode import BACKGROUND, FORMATS
from tlearn.data.order import mix, mix_array
from tlearn.errors import TlearnError
from tlearn.files import sha256, write_json

INDEX = "index.json"
FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
UNLABELLED = -100
"""Label of an image that has none; torch's losses leave it out too."""
SAMPLE = np.dtype([("key", "<u8"), ("offset", "<i8"), ("size", "<u4"), ("shard", "<i4"), ("label", "<i4")])
"""A row of the sample table; `key` is the first 8 bytes of the SHA-256 of the source file."""

_ENDINGS = frozenset(FORMATS.values())


class Sample(NamedTuple):
    """What goes into a shard."""

    key: str
    ending: str
    data: bytes
    label: int
    class_name: str
    file: str


@dataclass(frozen=True)
class Shard:
    """One tar file of a split."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The samples of train, val or test. Cheap to copy, and shared with forked loader processes."""

    name: str
    root: Path
    shards: tuple[Shard, ...]
    rows: npt.NDArray[Any]
    """Structured array of SAMPLE, ordered by shard."""
    _files: OpenFiles = field(default_factory=lambda: OpenFiles(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> bytes:
        """The encoded image of sample i."""
        row = self.rows[i]
        path = self.root / self.shards[row["shard"]].name
        data = os.pread(self._files.descriptor(path), int(row["size"]), int(row["offset"]))
        if len(data) < row["size"]:
            raise TlearnError(f"{path}: ends before sample {row['key']:016x}; prepare the data again")
        return data

    def shard_sizes(self) -> npt.NDArray[np.int64]:
        """Samples per shard."""
        return np.bincount(self.rows["shard"], minlength=len(self.shards)).astype(np.int64)

    def per_class(self, classes: int) -> npt.NDArray[np.int64]:
        """Samples per class."""
        return np.bincount(self.rows["label"], minlength=classes).astype(np.int64)

    def relabelled(self, labels: Sequence[int]) -> Split:
        """Label i becomes labels[i]: data whose classes are some of a model's."""
        rows = np.array(self.rows)
        rows["label"] = np.asarray(labels, dtype=np.int32)[rows["label"]]
        return replace(self, rows=rows)

    def balanced(self, limit: int, seed: int) -> Split:
        """At most `limit` samples, the classes as equal as they can be; which ones is a function of (seed, key)."""
        if limit >= len(self):
            return self
        labels = np.asarray(self.rows["label"])
        counts = np.bincount(labels)
        by_rank = np.lexsort((mix_array(mix(seed), np.asarray(self.rows["key"])), labels))
        rank = np.empty(len(labels), dtype=np.int64)
        rank[by_rank] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
        # the first of every class, then the second of every class, ... until the limit is reached
        chosen = np.sort(np.lexsort((labels, rank))[:limit])
        return replace(self, rows=self.rows[chosen])


@dataclass(frozen=True)
class Index:
    """What `read_index` returns: the prepared data set."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]
    fingerprint: str
    """Hash of the classes, and of every sample's split, label and content."""
    meta: dict[str, Any]
    """index.json as it is."""


class OpenFiles:
    """File descriptors of recently read shards. A forked or unpickled copy may share or reopen them safely."""

    LIMIT = 64

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """To read from."""
        if path not in self._open:
            if len(self._open) >= self.LIMIT:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return self._open[path]

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def read_index(root: Path) -> Index:
    """Open prepared data; shard sizes are checked against the index (stat only, nothing is read).

    Raises:
        TlearnError: no index, another format version, a shard missing or of another size.
    """
    path = root / INDEX
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TlearnError(f"{path}: not found; `tlearn prepare SRC {root}` makes it") from None
    except ValueError as error:
        raise TlearnError(f"{path}: not valid JSON ({error}); prepare the data again") from None
    written = (meta.get("format"), meta.get("version")) if isinstance(meta, dict) else (None, None)
    if written != ("tlearn-shards", FORMAT_VERSION):
        raise TlearnError(
            f"{path}: format {written[0]} version {written[1]}, this tlearn reads 'tlearn-shards' version "
            f"{FORMAT_VERSION}; prepare the data again"
        )
    splits = {}
    try:
        for name, entry in meta["splits"].items():
            shards = tuple(Shard(**shard) for shard in entry["shards"])
            for shard in shards:
                _check_size(root / shard.name, shard.bytes)
            table = root / entry["samples"]
            _check_size(table, entry["samples_bytes"])
            splits[name] = Split(name, root, shards, np.load(table, mmap_mode="r"))
        return Index(root, tuple(meta["classes"]), splits, meta["fingerprint"], meta)
    except (KeyError, TypeError, AttributeError) as error:
        raise TlearnError(f"{path}: damaged ({type(error).__name__}: {error}); prepare the data again") from None


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise TlearnError(f"{path}: missing; prepare the data again") from None
    if found != expected:
        raise TlearnError(f"{path}: {found:,} bytes, the index says {expected:,}; prepare the data again")


def write_split(root: Path, name: str, samples: Iterable[Sample], shard_bytes: int) -> dict[str, Any]:
    """Write one split's shards and sample table into `root`; returns its entry for index.json."""
    import webdataset as wds  # its import takes a second, and reading shards does not need it

    file: IO[bytes]

    def opened(filename: str) -> IO[bytes]:
        # webdataset's own opener would read a ':' or '%' in the folder's name as a URL or a pattern
        nonlocal file
        file = (root / filename).open("wb")
        return file

    with wds.ShardWriter(
        f"{name}-%06d.tar",
        maxsize=shard_bytes,
        maxcount=10**9,
        verbose=0,
        opener=opened,
        post=lambda _: file.close(),
        mtime=0,
        user="",
        group="",
    ) as writer:
        for sample in samples:
            about = {"class": sample.class_name, "file": sample.file}
            writer.write({"__key__": sample.key, sample.ending: sample.data, "cls": str(sample.label), "json": about})
    paths = sorted(root.glob(f"{name}-*.tar"))
    tables = [_table_of(path, number) for number, path in enumerate(paths)]
    rows = np.concatenate([np.empty(0, dtype=SAMPLE), *tables])
    table = root / f"{name}.samples.npy"
    np.save(table, rows)
    return {
        "samples": table.name,
        "samples_bytes": table.stat().st_size,
        "n": len(rows),
        "shards": [
            {"name": path.name, "samples": len(part), "bytes": path.stat().st_size, "sha256": sha256(path)}
            for path, part in zip(paths, tables, strict=True)
        ],
    }


def _table_of(path: Path, shard: int) -> npt.NDArray[Any]:
    """The sample table of one shard, from its tar headers."""
    rows, labels = [], {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            if ending in _ENDINGS:
                rows.append((int(key, 16), member.offset_data, member.size, shard, -1))
            elif ending == "cls":
                content = tar.extractfile(member)
                assert content is not None
                labels[int(key, 16)] = int(content.read())
    table = np.array(rows, dtype=SAMPLE)
    table["label"] = [labels[key] for key in table["key"].tolist()]
    return table


def write_index(root: Path, classes: Sequence[str], splits: dict[str, Any], about: dict[str, Any]) -> None:
    """Write index.json: last, so that its presence means that all the rest is there."""
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for name, entry in splits.items():
        rows = np.load(root / entry["samples"])
        entry["per_class"] = np.bincount(rows["label"], minlength=len(classes)).tolist()
        # the key is the source file's; the size tells a picture from the same one scaled down
        content = np.sort(rows[["key", "label", "size"]])
        digest.update(name.encode())
        for column in ("key", "label", "size"):
            digest.update(np.ascontiguousarray(content[column]).tobytes())
    meta = {
        "format": "tlearn-shards",
        "version": FORMAT_VERSION,
        "fingerprint": digest.hexdigest(),
        "classes": list(classes),
        "background": list(BACKGROUND),
        "splits": splits,
        **about,
    }
    write_json(root / INDEX, meta)
