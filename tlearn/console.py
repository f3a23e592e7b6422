"""What people see: everything goes to stderr (stdout belongs to results) and, once a run has started, to its log.

Ranks above 0 are silent.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_console = Console(stderr=True, highlight=False)
if not _console.is_terminal:
    _console.width = 120
_log: Path | None = None


def configure(*, quiet: bool = False, log: Path | None = None) -> None:
    """Silence this process (ranks above 0), and append what is shown to a log file."""
    global _log
    _console.quiet = quiet
    _log = None if quiet else log


def close_log() -> None:
    """What is shown from here on belongs to something else."""
    global _log
    _log = None


def show(message: RenderableType) -> None:
    """Print a line of text (no markup) or a table."""
    _console.print(message, markup=False, soft_wrap=isinstance(message, str))
    note(message)


def note(message: RenderableType) -> None:
    """Write to the log only."""
    if _log is not None:
        plain = Console(file=io.StringIO(), width=120, highlight=False)
        plain.print(message, markup=False, soft_wrap=isinstance(message, str))
        with _log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(plain.file.getvalue())  # type: ignore[attr-defined]


def print_result(message: RenderableType) -> None:
    """Print what the command was called for, on stdout."""
    Console(highlight=False, width=_console.width).print(message, markup=False)


@contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, nothing elsewhere; yields `advance(steps=1, note="")`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal)
    with bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bar.update(task, advance=steps, note=note)

        yield advance
