"""The run folder: a record of one run from which it can be repeated, resumed and used.

config.yaml       expanded; `tlearn train RUN/config.yaml` runs it again
environment.json  versions, machine, devices
metrics.jsonl     one object per step, epoch and stage
result.json       final scores of the best weights
log.txt           what people were shown
checkpoints/      the last two
best/             model.safetensors and model.json: what `load` needs
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tlearn import checkpoint, console
from tlearn.checkpoint import Restored
from tlearn.config import Config
from tlearn.configfile import differing_keys, dump_config, load_config
from tlearn.errors import TlearnError
from tlearn.models.build import Model
from tlearn.runtime import Runtime

Resume = Literal["auto", "never", "must"]

FREE_TO_CHANGE = ("data.workers", "save_every.", "tracking.")
"""Options in which a run and its resumption may differ: they do not change the numbers."""


class RunFolder:
    """Paths of a run, and what is written there once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best" / "model.safetensors"
        self.card = path / "best" / "model.json"
        self.result = path / "result.json"

    def restore(self, config: Config, data_fingerprint: str, resume: Resume) -> Restored | None:
        """Where the run in this folder stopped; None: it starts from the beginning. Writes nothing.

        Raises:
            TlearnError: the folder holds something else, a run with other options, or not what `resume` asks for.
        """
        if not self.config.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise TlearnError(f"{self.path}: is not empty and holds no run; choose another --run")
            restored = None
        elif resume == "never":
            raise TlearnError(f"{self.path}: holds a run; choose another --run, or --resume auto to go on with it")
        else:
            differing = differing_keys(load_config(self.config), config)
            if differing := [d for d in differing if not d.startswith(FREE_TO_CHANGE)]:
                raise TlearnError(
                    "\n  ".join([f"{self.path}: holds a run with other options; choose another --run:", *differing])
                )
            restored = checkpoint.load_newest(self.checkpoints)
            if restored and restored.progress.data_fingerprint != data_fingerprint:
                raise TlearnError(f"{self.path}: {config.data.path} holds other images than when this run began")
        if resume == "must" and restored is None:
            raise TlearnError(f"{self.path}: no checkpoint to resume from")
        return restored

    def open(self, config: Config, runtime: Runtime, model: Model, classes: tuple[str, ...]) -> None:
        """Make the folder and record what the run is made of; from here on what is shown is logged too."""
        card = {
            "backbone": model.backbone,
            "head": model.head,
            "weights": model.weights,
            "classes": list(classes),
            "preprocessing": asdict(model.preprocessing),
        }
        self.card.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.card, card)
        write_json(self.path / "environment.json", runtime.environment())
        write_text(self.config, f"# tlearn train {self.config} --run NEW   runs this again\n{dump_config(config)}")
        console.configure(log=self.path / "log.txt")


def new_path(config: Config) -> Path:
    """`runs/<time>-<strategy>`, a folder that does not exist yet."""
    stem = time.strftime(f"%Y%m%d-%H%M%S-{config.strategy}")
    candidates = (Path("runs") / (stem if i == 0 else f"{stem}-{i}") for i in range(10**6))
    return next(path for path in candidates if not path.exists())


def write_json(path: Path, content: Any) -> None:
    """Readable JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
