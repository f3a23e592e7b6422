"""Rows of numbers on the disk, each with a checksum: a row is whole, or it is not there.

NAME.rows  n rows of one size, one behind the other
NAME.sums  a CRC-32 per row; 0: not written yet

They are written with pwrite, not through the map: on a network disk a map writes whole pages, and with them what other
machines have there.
"""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tlearn.data.order import Array
from tlearn.errors import TlearnError

_BLOCK_BYTES = 2**24


class Store:
    """`n` tensors of one shape and type.

    Any number of processes may write the same rows, as long as they write the same; `open` shows what they wrote.

    Args:
        path: of the files, without their endings.
        n: rows.
        shape: of a row.
        dtype: of its numbers.
    """

    def __init__(self, path: Path, n: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.n, self.shape, self.dtype = n, shape, dtype
        self.row_bytes = int(np.prod(shape)) * dtype.itemsize
        self._files = path.with_name(f"{path.name}.rows"), path.with_name(f"{path.name}.sums")
        self._rows: npt.NDArray[Any] | None = None
        self._sums: npt.NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        """On the disk."""
        return self.n * (self.row_bytes + 4)

    def allocate(self) -> bool:
        """Make the files, where they are not there or have another size.

        Returns:
            Whether one was made.

        Raises:
            OSError: the disk is full, as far as the file system tells beforehand.
        """
        made = False
        for file, size in zip(self._files, (self.n * self.row_bytes, self.n * 4), strict=True):
            if file.exists() and file.stat().st_size == size:
                continue
            made = True
            with file.open("wb") as opened:
                try:
                    os.posix_fallocate(opened.fileno(), 0, size)
                except (AttributeError, OSError) as error:  # not on macOS, nor on every file system
                    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    opened.truncate(size)
        return made

    def open(self) -> None:
        """See what is there now."""
        self._rows = np.memmap(self._files[0], np.uint8, "r", shape=(self.n, self.row_bytes))
        self._sums = np.fromfile(self._files[1], np.uint32)

    def missing(self, start: int, stop: int) -> Array:
        """Rows of [start, stop) that are not there or not whole; all of them are read."""
        assert self._rows is not None
        bad = []
        step = max(1, _BLOCK_BYTES // self.row_bytes)
        for first in range(start, stop, step):
            rows = np.arange(first, min(stop, first + step))
            bad.append(rows[self._damaged(rows, np.asarray(self._rows[rows]))])
        return np.concatenate([np.empty(0, dtype=np.int64), *bad])

    def write(self, rows: Array, values: torch.Tensor) -> None:
        """Put `values`, (b, *shape), into these rows."""
        content = values.detach().to("cpu", self.dtype).contiguous().view(len(rows), -1).view(torch.uint8).numpy()
        with self._files[0].open("r+b") as file, self._files[1].open("r+b") as sums:
            for i, row in zip(rows.tolist(), content, strict=True):
                if os.pwrite(file.fileno(), row.data, i * self.row_bytes) < len(row):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._files[0]))
                os.pwrite(sums.fileno(), np.uint32(_sum(row)).tobytes(), i * 4)

    def read(self, rows: Array) -> torch.Tensor:
        """(b, *shape).

        Raises:
            TlearnError: a row is not there, or not whole.
        """
        assert self._rows is not None
        content = np.asarray(self._rows[rows])
        if self._damaged(rows, content).any():
            raise TlearnError(f"{self._files[0]}: is damaged; start the run again, which fills it anew")
        return torch.from_numpy(content).view(self.dtype).view(len(rows), *self.shape)

    def _damaged(self, rows: Array, content: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        assert self._sums is not None
        sums = self._sums[rows].tolist()
        return np.array([not want or _sum(row) != want for row, want in zip(content, sums, strict=True)], dtype=bool)


def _sum(row: npt.NDArray[Any]) -> int:
    return zlib.crc32(row.data) or 1
