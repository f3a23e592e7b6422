"""Checkpoints that are whole or absent: safetensors and JSON, a manifest, written aside and renamed. No pickle.

checkpoints/step-00000123/model.safetensors      parameters and buffers
                          optimizer.safetensors  "parameter/state" -> tensor
                          progress.json          where the run is
                          manifest.json          size and SHA-256 of the others
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlearn.console import show
from tlearn.errors import TlearnError

FORMAT_VERSION = 1
KEPT = 2

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
    """Steps in a row whose gradient was not finite."""
    epoch_sums: dict[str, float] = field(default_factory=dict)
    """Sums over the current epoch so far: loss, weight, correct, samples."""
    best: dict[str, Any] = field(default_factory=dict)
    """Val measures of the best epoch so far, and where it was."""
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
    temporary = root / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_plain(model), temporary / "model.safetensors")
    save_file(_plain(optimizer), temporary / "optimizer.safetensors")
    (temporary / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    manifest = {
        "version": FORMAT_VERSION,
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())},
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in temporary.iterdir():
        _fsync(path)
    _fsync(temporary)
    if final.exists():  # the same step saved twice: at the end of an epoch, then by a signal
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync(root)
    for old in _checkpoints(root)[KEPT:]:
        shutil.rmtree(old)
    return final


def load_newest(root: Path) -> Restored | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a message.

    Raises:
        TlearnError: a checkpoint of another format version.
    """
    for folder in _checkpoints(root):
        if reason := _damage(folder):
            show(f"{folder}: {reason}; trying the one before")
            continue
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        return Restored(
            load_file(folder / "model.safetensors"),
            load_file(folder / "optimizer.safetensors"),
            Progress(**progress),
        )
    return None


def save_best(path: Path, model: Tensors, best: Mapping[str, Any]) -> None:
    """Replace the best weights in one step; what they scored stands in the file's own header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(_plain(model), temporary, metadata={"best": json.dumps(dict(best))})
    _fsync(temporary)
    temporary.rename(path)
    _fsync(path.parent)


def load_best(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and score that `save_best` wrote.

    Raises:
        TlearnError: no such file.
    """
    if not path.is_file():
        raise TlearnError(f"{path}: not found; has this run finished an epoch?")
    with safe_open(path, framework="pt") as file:
        best = json.loads(file.metadata()["best"])
    return load_file(path), best


def _checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir()), reverse=True)


def _damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version, files = manifest["version"], manifest["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest is missing or damaged"
    if version != FORMAT_VERSION:
        raise TlearnError(
            f"{folder}: checkpoint format version {version}, this tlearn reads version {FORMAT_VERSION}; "
            "resume with the tlearn that wrote it, or start a new run"
        )
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            return f"{name} is damaged"
    return None


def _plain(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What safetensors can write: contiguous tensors that share no memory, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
