"""Rows of numbers on the disk, each with a checksum: a row is whole, or it is not there.

NAME.rows  n rows of one size, one behind the other
NAME.sums  a CRC-32 per row; 0: not written yet
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tlearn.data.order import Array

_BLOCK_BYTES = 2**24


class Store:
    """`n` tensors of one shape and type.

    Any number of processes may write the same rows, as long as they write the same.

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

    def allocate(self) -> None:
        """Make the files, where they are not there or have another size.

        Raises:
            OSError: the disk is full; found out here, since a write to a mapped file would end the process.
        """
        for file, size in zip(self._files, (self.n * self.row_bytes, self.n * 4), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, 0)
                    os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)

    def open(self) -> None:
        """Map the files; they have been allocated."""
        self._rows = np.memmap(self._files[0], np.uint8, "r+", shape=(self.n, self.row_bytes))
        self._sums = np.memmap(self._files[1], np.uint32, "r+", shape=(self.n,))

    def missing(self, start: int, stop: int) -> Array:
        """Rows of [start, stop) that are not there or not whole; all of them are read."""
        assert self._rows is not None
        assert self._sums is not None
        bad = []
        step = max(1, _BLOCK_BYTES // self.row_bytes)
        for first in range(start, stop, step):
            last = min(stop, first + step)
            block, sums = np.asarray(self._rows[first:last]), self._sums[first:last].tolist()
            bad += [first + i for i, want in enumerate(sums) if not want or _sum(block[i]) != want]
        return np.asarray(bad, dtype=np.int64)

    def write(self, rows: Array, values: torch.Tensor) -> None:
        """Put `values`, (b, *shape), into these rows."""
        assert self._rows is not None
        assert self._sums is not None
        content = values.detach().to("cpu", self.dtype).contiguous().view(len(rows), -1).view(torch.uint8).numpy()
        self._rows[rows] = content
        self._sums[rows] = [_sum(row) for row in content]

    def flush(self) -> None:
        """Make sure that other machines see what was written."""
        for mapped in (self._rows, self._sums):
            assert isinstance(mapped, np.memmap)
            mapped.flush()

    def read(self, rows: Array) -> torch.Tensor:
        """(b, *shape)."""
        assert self._rows is not None
        return torch.from_numpy(np.asarray(self._rows[rows])).view(self.dtype).view(len(rows), *self.shape)


def _sum(row: npt.NDArray[Any]) -> int:
    return zlib.crc32(row.data) or 1
