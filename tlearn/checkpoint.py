"""Checkpoints that are whole or absent: safetensors and JSON, a manifest, written aside and renamed. No pickle.

checkpoints/step-00000123/model.safetensors      parameters and buffers
                          optimizer.safetensors  "parameter/state" -> tensor
                          progress.json          where the run is
                          manifest.json          size and SHA-256 of the others
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tlearn.console import show
from tlearn.errors import TlearnError
from tlearn.files import fsync, replace, sha256

FORMAT_VERSION = 1
KEPT = 2
_FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Progress:
    """Where a run is; with the model and the optimizer all that is needed to go on."""

    stage: int = 0
    """Stages finished."""
    stage_step: int = 0
    """Optimizer steps done in the current stage."""
    step: int = 0
    """Optimizer steps done in all."""
    samples: int = 0
    """Training images seen in all."""
    seconds: float = 0.0
    """Time spent in training steps."""
    rejected: int = 0
    """Steps in a row whose gradient was not finite; they were skipped."""
    rejected_in_all: int = 0
    """Steps of the run that were skipped."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the loss scaler (fp16 only)."""
    epoch_sums: dict[str, float] = field(default_factory=dict)
    """Sums over the current epoch so far: loss, weight, correct, samples."""
    best: dict[str, Any] = field(default_factory=dict)
    """Val measures of the best epoch so far, and where it was."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's options: it goes on with the same ones only."""
    data_fingerprint: str = ""
    """Of the prepared data: a run goes on with the same images only."""
    wandb_id: str | None = None
    """Of the W&B run that a resumed run continues."""


class Restored(NamedTuple):
    """A checkpoint that was read."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    progress: Progress


def save(root: Path, model: Tensors, optimizer: Tensors, progress: Progress) -> Path:
    """Write a checkpoint; older ones are pruned once it is in place."""
    final = root / f"step-{progress.step:08d}"
    for half_written in root.glob(".step-*"):  # by a process that was killed
        shutil.rmtree(half_written)
    temporary = root / f".{final.name}"
    temporary.mkdir(parents=True)
    save_file(_plain(model), temporary / "model.safetensors")
    save_file(_plain(optimizer), temporary / "optimizer.safetensors")
    (temporary / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    manifest = {
        "version": FORMAT_VERSION,
        "files": {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in _FILES
        },
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in temporary.iterdir():
        fsync(path)
    fsync(temporary)
    replaced = root / f".step-replaced-{progress.step}"
    if final.exists():  # the same step saved twice: at the end of an epoch, then by a signal
        final.rename(replaced)
    temporary.rename(final)
    fsync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    folders = _checkpoints(root)
    # what is newer than this was damaged: the run went on from before it
    abandoned = [folder for folder in folders if _step(folder) > progress.step]
    for old in abandoned + folders[len(abandoned) :][KEPT:]:
        shutil.rmtree(old)
    return final


def newest(root: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a message.

    Raises:
        TlearnError: a checkpoint of another format version.
    """
    for folder in _checkpoints(root):
        if reason := _damage(folder):
            show(f"{folder}: {reason}; trying the one before")
            continue
        return folder
    return None


def read_progress(folder: Path) -> Progress:
    """Where a run was when it wrote this checkpoint."""
    return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))


def load(folder: Path) -> Restored:
    """Read a checkpoint that `newest` has found whole."""
    return Restored(
        load_file(folder / "model.safetensors"),
        load_file(folder / "optimizer.safetensors"),
        read_progress(folder),
    )


def save_best(path: Path, model: Tensors, best: Mapping[str, Any]) -> None:
    """Replace the best weights in one step; what they scored stands in the file's own header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(_plain(model), temporary, metadata={"best": json.dumps(dict(best))})
    replace(temporary, path)


def load_best(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and score that `save_best` wrote.

    Raises:
        TlearnError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise TlearnError(f"{path}: not found; has this run finished an epoch?")
    try:
        with safe_open(path, framework="pt") as file:
            best = json.loads(file.metadata()["best"])
        return load_file(path), best
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise TlearnError(f"{path}: damaged ({error}); restore the file, or train again") from None


def _checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    folders = [p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version = manifest["version"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "its manifest is missing or damaged"
    if version != FORMAT_VERSION:
        raise TlearnError(
            f"{folder}: checkpoint format version {version}, this tlearn reads version {FORMAT_VERSION}; "
            "resume with the tlearn that wrote it, or start a new run"
        )
    if files.keys() != set(_FILES):
        return "its manifest is damaged"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or sha256(path) != digest:
            return f"{name} is damaged"
    return None


def _plain(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What safetensors can write: contiguous tensors that share no memory, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
