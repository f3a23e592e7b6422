"""A folder of idx files, as MNIST and its likes come, as a source of images. Imports no torch.

The format: http://yann.lecun.com/exdb/mnist ("FILE FORMATS FOR THE MNIST DATABASE").
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlearn.data.decode import as_bmp
from tlearn.data.scan import Found, Listing, class_names
from tlearn.errors import TlearnError

_PARTS = {"train": "train", "t10k": "test"}  # what their names begin with -> split
_UNSIGNED_BYTES = 8

Bytes = npt.NDArray[np.uint8]


class Idx:
    """train-images-idx3-ubyte, train-labels-idx1-ubyte and, if wanted, t10k-...; each may be gzipped (.gz).

    Args:
        root: the folder. Train is split by content into train and val; t10k is test.
        classes: names of the labels, in their order; without them the numbers are the names.
    """

    whole = True

    def __init__(self, root: Path, classes: Sequence[str] = ()) -> None:
        self.root, self.name, self.classes = root, str(root), tuple(classes)
        self._images: list[Bytes] = []

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Whether idx files of images lie in a folder."""
        return any(_file(folder, f"{part}-images?idx3-ubyte") is not None for part in _PARTS)

    def read(self, found: Found) -> bytes:
        """See `Origin`."""
        part, row = found.place
        return as_bmp(Image.fromarray(self._images[part][row]))

    def listing(self) -> Listing:
        """Every image of the files.

        Raises:
            TlearnError: a file that is missing or damaged, or holds another number of labels than of images.
        """
        self._images = []
        labels: list[tuple[str, Path, list[int]]] = []
        for part, split in _PARTS.items():
            path = _file(self.root, f"{part}-images?idx3-ubyte")
            if path is None:
                continue
            beside = _file(self.root, f"{part}-labels?idx1-ubyte")
            if beside is None:
                raise TlearnError(f"{self.root}: no {part}-labels-idx1-ubyte beside {path.name}")
            images, numbers = _read(path, 3), _read(beside, 1).tolist()
            if len(images) != len(numbers):
                raise TlearnError(f"{beside}: {len(numbers):,} labels for the {len(images):,} images of {path.name}")
            self._images.append(images)
            labels.append((split, path, numbers))
        names = class_names({n for _, _, numbers in labels for n in numbers}, self.classes, self.name)
        found = [
            Found(f"{path.name}/{row:05d}", names[number], split, images[0].size, path.stat().st_mtime_ns, (part, row))
            for part, ((split, path, numbers), images) in enumerate(zip(labels, self._images, strict=True))
            for row, number in enumerate(numbers)
        ]
        return Listing(found, {}, list(names.values()))


def _file(folder: Path, pattern: str) -> Path | None:
    """The file, unpacked where both are there; some unpackers write `.idx3` for `-idx3`."""
    return next((path for end in ("", ".gz") for path in sorted(folder.glob(pattern + end))), None)


def _read(path: Path, dimensions: int) -> Bytes:
    """The array of an idx file; one that is not packed is mapped, not read."""
    packed = path.suffix == ".gz"
    try:
        data = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) if packed else np.memmap(path, np.uint8, "r")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise TlearnError(f"{path}: cannot be read: {error}; fetch it again") from None
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4].tolist() != [0, 0, _UNSIGNED_BYTES, dimensions]:
        raise TlearnError(f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", data[4:start].tobytes())
    if len(data) != start + math.prod(shape):
        expected = start + math.prod(shape)
        raise TlearnError(f"{path}: {len(data):,} bytes instead of the {expected:,} that it announces; fetch it again")
    return data[start:].reshape(shape)
