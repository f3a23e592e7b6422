"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Readable JSON."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written aside, then put in place: after a crash the file is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Put a file that is complete in place of another."""
    fsync(temporary)
    temporary.rename(path)
    fsync(path.parent)


def cache_folder() -> Path:
    """$TLEARN_CACHE, or ~/.cache/tlearn: what can be made again."""
    return Path(os.environ.get("TLEARN_CACHE") or "~/.cache/tlearn").expanduser()


def new_run(name: str) -> Path:
    """`runs/<time>-<name>`, a folder that does not exist yet."""
    stem = time.strftime(f"%Y%m%d-%H%M%S-{name}")
    candidates = (Path("runs") / (stem if i == 0 else f"{stem}-{i}") for i in range(10**6))
    return next(path for path in candidates if not path.exists())


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
