"""What the commands share: a config file and options in any order, JSON on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tlearn.errors import TlearnError

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def files_and_options(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """[CONFIG.yaml ...] [a.b=c ...] in any order."""
    files = [a for a in arguments if "=" not in a.partition("/")[0]]
    return [Path(file) for file in files], [a for a in arguments if a not in files]


def split_arguments(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """[CONFIG.yaml] [a.b=c ...] in any order."""
    files, options = files_and_options(arguments)
    if len(files) > 1:
        raise TlearnError(f"one config file at most, got {', '.join(map(str, files))}; options are written a.b=c")
    return files[0] if files else None, options


def recipe(arguments: list[str] | None, run: Path | None) -> tuple[Path | None, list[str]]:
    """Config file and options; without either a file or images those of the run that goes on."""
    file, overrides = split_arguments(arguments or [])
    if file is not None or run is None:
        return file, overrides
    from tlearn.jobs import last_submission

    names_data = any(o.partition("=")[0] in ("data", "data.path") for o in overrides)
    if (run / "config.yaml").is_file():
        return None if names_data else run / "config.yaml", overrides
    submission = last_submission(run)  # it has not begun
    if submission is not None:
        return submission / "config.yaml", overrides
    if names_data:
        return None, overrides
    raise TlearnError(f"{run}: holds no run to go on with; to begin one, name its images: data.path=FOLDER")


def print_json(document: Any) -> None:
    """One document on stdout."""
    typer.echo(json.dumps(document, allow_nan=False))
