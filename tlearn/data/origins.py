"""What can be prepared: which kind of origin a name on the command line means. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tlearn.data.folders import Folder
from tlearn.data.idx import Idx
from tlearn.data.listed import DELIMITERS, Listed
from tlearn.data.scan import Origin
from tlearn.data.tars import Tars
from tlearn.data.vision import PREFIX, Vision
from tlearn.errors import TlearnError

KINDS = """give one of
  FOLDER                  with one sub-folder of images per class, perhaps below train, val and test
  TABLE.csv, TABLE.tsv    with the columns path, label and, if wanted, split
  'x-{000000..000127}.tar'  WebDataset shards
  FOLDER                  of idx files (train-images-idx3-ubyte, ...)
  torchvision:NAME        a data set of torchvision"""


def open_origin(source: str | Path, classes: Sequence[str] = (), val_from: str | None = None) -> Origin:
    """What a source is, by its form.

    Args:
        source: one of KINDS.
        classes: names of numbered classes, in their order.
        val_from: shards of the validation images.

    Raises:
        TlearnError: none of KINDS, or an option that has no effect on it.
    """
    text, path = str(source), Path(source).expanduser()
    classes = [name.strip() for name in classes]
    if len(set(classes)) < len(classes) or not all(classes):
        raise TlearnError(f"--classes {','.join(classes)}: every name once, with commas between them")
    is_tars = not path.is_dir() and re.search(r"\.(tar|tgz)\b", text) is not None
    if val_from is not None and not is_tars:
        raise TlearnError(f"--val-from: has no effect on {text}, which is no pattern of tar shards")
    if is_tars:
        return Tars(text, classes, val_from)
    if text.startswith(PREFIX):
        return Vision(text, classes)
    if path.is_dir() and Idx.is_one(path):
        return Idx(path, classes)
    if classes:
        raise TlearnError(f"--classes: has no effect on {text}, whose classes have names")
    if path.is_dir():
        inside = list(path.iterdir())
        if any(p.suffix == ".tar" for p in inside) and not any(p.is_dir() for p in inside):
            raise TlearnError(f"{text}: is a folder of tar shards; name them as '{path}/x-{{000000..000127}}.tar'")
        return Folder(path)
    if path.is_file() and path.suffix.lower() in DELIMITERS:
        return Listed(path)
    what = "cannot be prepared" if path.exists() else "no such folder or file"
    raise TlearnError(f"{text}: {what}; {KINDS}")
