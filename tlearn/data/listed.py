"""A table of image files and labels, CSV or TSV, as a source of images. Imports no torch."""

from __future__ import annotations

import csv
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlearn.data.folders import status_of
from tlearn.data.scan import SPLIT_NAMES, Found, Listing
from tlearn.errors import TlearnError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""By the ending of the table."""
_SHOWN = 8  # problems named in one message


@dataclass(frozen=True)
class Listed:
    """A table with a header: `path` (relative to the table, or absolute), `label` and, if wanted, `split`.

    Other columns are left alone. Rows without a split are split by content.
    """

    table: Path
    whole = False

    @property
    def name(self) -> str:
        """See `Origin`."""
        return str(self.table)

    def read(self, found: Found) -> bytes:
        """See `Origin`."""
        return (self.table.parent / found.file).read_bytes()

    def listing(self) -> Listing:
        """The rows, in the order of the table.

        Raises:
            TlearnError: every row that cannot be used, with its line.
        """
        found: dict[str, tuple[Found, int]] = {}
        problems = []
        line = 1
        try:
            with self.table.open(encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, delimiter=DELIMITERS[self.table.suffix.lower()], strict=True)
                self._check_header(rows.fieldnames or ())
                for row in rows:
                    line = rows.line_num
                    path = (row["path"] or "").strip()
                    if path in found:
                        problems.append(f"line {line}: {path} stands in line {found[path][1]} too")
                        continue
                    try:
                        found[path] = (self._found(path, row), line)
                    except ValueError as error:
                        problems.append(f"line {line}: {error}")
        except UnicodeDecodeError as error:
            raise TlearnError(
                f"{self.table}: after line {line}: not UTF-8 ({error.reason}); save it as UTF-8"
            ) from None
        except csv.Error as error:
            raise TlearnError(f"{self.table}: after line {line}: {error}") from None
        if problems:
            more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
            listed = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
            raise TlearnError(
                f"{self.table}: {len(problems):,} rows cannot be used; mend or remove them:{listed}{more}"
            )
        if not found:
            raise TlearnError(f"{self.table}: has no rows below its header")
        images = [f for f, _ in found.values()]
        return Listing(images, {}, sorted({f.class_name for f in images}))

    def _check_header(self, names: Sequence[str]) -> None:
        if missing := sorted({"path", "label"} - set(names)):
            raise TlearnError(
                f"{self.table}: line 1: no column {' and '.join(missing)} (there are: {', '.join(names) or 'none'}); "
                "the first line names the columns path, label and, if wanted, split"
            )

    def _found(self, path: str, row: dict[str | None, str | None]) -> Found:
        """Raises ValueError with what is wrong in the row."""
        if None in row:
            raise ValueError("more fields than the first line names")
        label, split = ((row.get(column) or "").strip() for column in ("label", "split"))
        if not path:
            raise ValueError("no path")
        if not label:
            raise ValueError(f"no label for {path}")
        if split and split.lower() not in SPLIT_NAMES:
            raise ValueError(f"split {split!r}: train, val or test")
        status = status_of(self.table.parent / path)
        if status is None:
            raise ValueError(f"{path}: no such file (paths are relative to the table, or absolute)")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: not a regular file")
        return Found(path, label, SPLIT_NAMES[split.lower()] if split else None, status.st_size, status.st_mtime_ns)
