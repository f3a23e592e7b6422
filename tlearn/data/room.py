"""A folder on the disk that is bounded: what was not used longest makes room for what comes.

ROOT/room.lock         held while room is made
ROOT/NAME/used.lock    held, shared, while somebody uses what is in this folder
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from tlearn.errors import TlearnError


def reserve(folder: Path, needed: int, limit: float, held: ExitStack) -> IO[str]:
    """Make room for a folder, and the folder where it is not there; it is in use until `held` is closed.

    Args:
        folder: its parent is the one that is bounded.
        needed: bytes that will be in it.
        limit: bytes of all of them together.
        held: keeps the lock.

    Returns:
        The lock.

    Raises:
        OSError: the disk does not want to.
        TlearnError: what is in use leaves no room.
    """
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):  # else another run might remove what is not yet held
        if not _make_room(root, folder, limit - needed):
            raise TlearnError(f"other runs use the rest of {root}")
        folder.mkdir(exist_ok=True)
        used: IO[str] = held.enter_context((folder / "used.lock").open("a+"))
        fcntl.flock(used, fcntl.LOCK_SH)
        os.utime(used.fileno())
    return used


def discard(folder: Path, used: IO[str]) -> None:
    """Remove a folder that was reserved, unless somebody else uses it too."""
    with _alone(folder.parent), suppress(BlockingIOError):
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    with (root / "room.lock").open("a+") as room:
        fcntl.flock(room, fcntl.LOCK_EX)
        yield


def _make_room(root: Path, mine: Path, limit: float) -> bool:
    """Remove what was not used longest and nobody uses, until all but `mine` is no larger than `limit` bytes; nothing
    where that is not enough."""
    others = sorted((path for path in root.iterdir() if path != mine and path.is_dir()), key=_last_use)
    excess = sum(_size(path) for path in others) - limit
    with ExitStack() as locks:
        leave = []
        for path in others:
            if excess <= 0:
                break
            lock = locks.enter_context((path / "used.lock").open("a+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            leave.append(path)
            excess -= _size(path)
        if excess > 0:
            return False
        for path in leave:
            shutil.rmtree(path)
    return True


def _size(path: Path) -> int:
    total = 0
    for file in path.iterdir():
        with suppress(FileNotFoundError):  # it was written aside, and is in its place now
            total += file.stat().st_size
    return total


def _last_use(path: Path) -> float:
    lock = path / "used.lock"
    return lock.stat().st_mtime if lock.exists() else 0.0
