"""A folder on the disk that is bounded: what was not used longest makes room for what comes.

ROOT/room.lock         held while room is made
ROOT/NAME/used.lock    held, shared, while somebody uses what is in this folder
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from tlearn.errors import TlearnError


def reserve(folder: Path, needed: int, limit: float, held: ExitStack) -> bool:
    """Make room for a folder, and the folder where it is not there; it is in use until `held` is closed.

    Args:
        folder: its parent is the one that is bounded.
        needed: bytes that will be in it.
        limit: bytes of all of them together.
        held: keeps the lock.

    Returns:
        Whether the folder is new.

    Raises:
        OSError: the disk does not want to.
        TlearnError: what is in use leaves no room.
    """
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    with (root / "room.lock").open("a+") as room:  # else another run might remove what is not yet held
        fcntl.flock(room, fcntl.LOCK_EX)
        is_new = not folder.exists()
        folder.mkdir(exist_ok=True)
        used: IO[str] = held.enter_context((folder / "used.lock").open("a+"))
        fcntl.flock(used, fcntl.LOCK_SH)
        os.utime(used.fileno())
        if not _make_room(root, folder, limit - needed):
            raise TlearnError(f"other runs use the rest of {root}")
    return is_new


def _make_room(root: Path, mine: Path, limit: float) -> bool:
    """Remove what was not used longest and nobody uses, until all but `mine` is no larger than `limit` bytes."""
    others = sorted((path for path in root.iterdir() if path != mine and path.is_dir()), key=_last_use)
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in others}
    for path in others:
        if sum(sizes.values()) <= limit:
            break
        with (path / "used.lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(path)
            del sizes[path]
    return sum(sizes.values()) <= limit


def _last_use(path: Path) -> float:
    lock = path / "used.lock"
    return lock.stat().st_mtime if lock.exists() else 0.0
