"""Checkpoints that are whole or absent: safetensors and JSON, a manifest, written aside and renamed. No pickle.

checkpoints/step-00000123/model.safetensors      parameters and buffers
                          optimizer.safetensors  "parameter/state" -> tensor
                          progress.json          where the run is
                          manifest.json          size and SHA-256 of the others
            step-00000123.1/                     saved again at the same step: after the evaluation, say
            best-00000123.safetensors            weights of an epoch that a checkpoint counts among the best
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tlearn.console import show
from tlearn.errors import TlearnError
from tlearn.files import fsync, replace, sha256

FORMAT_VERSION = 2
_FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")
_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Progress:
    """Where a run is; with the model and the optimizer all that is needed to go on."""

    stage: int = 0
    """Stages finished."""
    stage_step: int = 0
    """Optimizer steps done in the current stage."""
    stage_epochs: int = 0
    """Epochs of the current stage that were evaluated; a checkpoint may stand between the last step and this."""
    stage_best: dict[str, Any] | None = None
    """Val measures of the best epoch of the current stage."""
    stage_stale: int = 0
    """Epochs of the current stage since then."""
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
    best: list[dict[str, Any]] = field(default_factory=list)
    """Val measures of the best epochs so far and where they were, the best first."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's options: it goes on with the same ones only."""
    overridden: list[str] = field(default_factory=list)
    """Options that were changed on the way, with --override."""
    data_fingerprint: str = ""
    """Of the prepared data: a run goes on with the same images only."""
    rests_on: str = ""
    """Of the objective's teacher, likewise."""
    features: dict[str, str] = field(default_factory=dict)
    """By stage: `cached`, or why its frozen layers compute in every step. A run that goes on does the same."""
    zero_shot: dict[str, Any] | None = None
    """Val measures before the first step, of a head that had answers then."""
    wandb_id: str | None = None
    """Of the W&B run that a resumed run continues."""


class State(NamedTuple):
    """What a checkpoint holds."""

    model: Tensors
    optimizer: Tensors
    progress: Progress


def copied(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What safetensors can write: contiguous tensors of their own memory, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save(root: Path, state: State, kept: int, after: Path | None) -> Path:
    """Write a checkpoint; what is older than the newest `kept` is pruned once it is in place.

    Args:
        root: where the checkpoints lie.
        state: tensors as `copied` gives them.
        kept: 2 or more.
        after: the checkpoint that this one follows. What else is newer was damaged: the run went on from before it.

    Raises:
        OSError, SafetensorError: the disk is full, say; what was there before is still there, and nothing else.
    """
    final = _free_name(root, state.progress.step)
    for half_written in root.glob(".step-*"):  # by a process that was killed
        shutil.rmtree(half_written)
    for half_written in root.glob(".best-*"):
        half_written.unlink()
    temporary = root / f".{final.name}"
    temporary.mkdir(parents=True)
    try:
        _write(temporary, state)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # room for the next attempt
        raise
    fsync(root)
    folders = _checkpoints(root)
    abandoned = [f for f in folders if f != final and (after is None or _position(f) > _position(after))]
    valid = [f for f in folders if f not in abandoned]
    for old in abandoned + valid[kept:]:
        shutil.rmtree(old)
    named = {path for folder in valid[:kept] for path in _named_weights(folder)}
    for weights in set(root.glob("best-*.safetensors")) - named:
        weights.unlink()
    return final


def _write(folder: Path, state: State) -> None:
    save_file(dict(state.model), folder / "model.safetensors")
    save_file(dict(state.optimizer), folder / "optimizer.safetensors")
    (folder / "progress.json").write_text(json.dumps(asdict(state.progress)), encoding="utf-8")
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in _FILES}
    manifest = {"version": FORMAT_VERSION, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)


def newest(root: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a message. None: there are none.

    Raises:
        TlearnError: none of those that are there is whole, or one has another format version.
    """
    damaged = []
    for folder in _checkpoints(root):
        if reason := _damage(folder):
            damaged.append(f"{folder}: {reason}")
            continue
        for message in damaged:
            show(f"{message}; trying the one before")
        return folder
    if damaged:
        raise TlearnError(
            "\n  ".join([f"{root}: no checkpoint is whole; restore one, or choose another --run:", *damaged])
        )
    return None


def read_progress(folder: Path) -> Progress:
    """Where a run was when it wrote this checkpoint."""
    return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))


def load(folder: Path) -> State:
    """Read a checkpoint that `newest` has found whole."""
    return State(
        load_file(folder / "model.safetensors"),
        load_file(folder / "optimizer.safetensors"),
        read_progress(folder),
    )


def save_best(root: Path, model: Tensors, score: Mapping[str, Any]) -> None:
    """Keep the weights of an epoch, with what they scored in the file's own header.

    Args:
        root: where the checkpoints lie; there it stays as long as one of them names it in `Progress.best`.
        model: tensors as `copied` gives them.
        score: an entry of `Progress.best`.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = _best(root, score)
    temporary = path.with_name(f".{path.name}")
    try:
        about = {"score": dict(score), "sha256": _digest(model, score)}
        # one entry: of several safetensors writes the first one first or not
        save_file(dict(model), temporary, metadata={"best": json.dumps(about)})
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish_best(root: Path, folder: Path, best: Sequence[Mapping[str, Any]]) -> None:
    """Make `folder` show the weights of these epochs, each in one step: model.safetensors, top-2.safetensors, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["model.safetensors", *(f"top-{i}.safetensors" for i in range(2, len(best) + 1))]
    for name, score in zip(names, best, strict=False):
        temporary = folder / f".{name}"
        temporary.unlink(missing_ok=True)
        try:
            os.link(_best(root, score), temporary)
        except OSError:  # no hard links in this file system
            shutil.copyfile(_best(root, score), temporary)
        replace(temporary, folder / name)
        temporary.unlink(missing_ok=True)  # renaming a file to a second name of its own does nothing
    for path in folder.glob("top-*.safetensors"):
        if path.name not in names:
            path.unlink()


def mended_best(root: Path, folder: Path, best: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of the best epochs whose weights are still there; where somebody deleted them in one place they come from
    the other, and `folder` shows them again."""
    there = []
    for score in map(dict, best):
        if not _best(root, score).is_file():
            shown = [path for path in folder.glob("*.safetensors") if load_best(path)[1] == score]
            if not shown:
                show(f"WARNING: {_best(root, score)} is gone; step {score['step']} no longer counts among the best")
                continue
            shutil.copyfile(shown[0], _best(root, score))
        there.append(score)
    publish_best(root, folder, there)
    return there


def load_best(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and score that `save_best` wrote.

    Raises:
        TlearnError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise TlearnError(f"{path}: not found; has this run finished an epoch?")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["best"])
        model, score = load_file(path), about["score"]
        if _digest(model, score) != about["sha256"]:
            raise ValueError("other bytes than were written")
        return model, score
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise TlearnError(f"{path}: damaged ({error}); restore the file, or train again") from None


def _named_weights(folder: Path) -> list[Path]:
    try:
        return [_best(folder.parent, score) for score in read_progress(folder).best]
    except (OSError, ValueError, TypeError, LookupError):  # damaged meanwhile: nobody can go on from it
        return []


def _digest(tensors: Tensors, score: Mapping[str, Any]) -> str:
    """SHA-256 of names, values and score."""
    digest = hashlib.sha256(json.dumps(score, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _best(root: Path, score: Mapping[str, Any]) -> Path:
    return root / f"best-{score['step']:08d}.safetensors"


def _free_name(root: Path, step: int) -> Path:
    there = [serial for found, serial in map(_position, _checkpoints(root)) if found == step]
    return root / (f"step-{step:08d}.{max(there) + 1}" if there else f"step-{step:08d}")


def _checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    return sorted((p for p in root.glob("step-*") if _NAME.fullmatch(p.name)), key=_position, reverse=True)


def _position(folder: Path) -> tuple[int, int]:
    """Step, and how many were saved at it before."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


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
