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

import fcntl
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal

from tlearn import checkpoint, console
from tlearn.config import Config
from tlearn.configfile import differing_keys, dump_config, load_config
from tlearn.errors import TlearnError
from tlearn.files import write_json, write_text
from tlearn.models.build import Model

Resume = Literal["auto", "never", "must"]

FREE_TO_CHANGE = ("data.path", "data.workers", "save_every.", "tracking.")
"""Options in which a run and its resumption may differ: they do not change the numbers. (That data at another place
are the same shows their fingerprint.)"""


class RunFolder:
    """Paths of a run, and what is written there once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best" / "model.safetensors"
        self.card = path / "best" / "model.json"
        self.result = path / "result.json"
        self.log = path / "log.txt"
        self._lock: IO[str] | None = None

    @classmethod
    def named(cls, path: str | Path | None, config: Config) -> RunFolder:
        """The folder a user named, or a new one."""
        return cls(Path(path) if path is not None else new_path(config))

    def precision_of(self, config: Config) -> str:
        """What the config asks for; `auto` is what the run in this folder began with, wherever it goes on."""
        if config.precision == "auto" and self.config.is_file():
            return load_config(self.config).precision
        return config.precision

    def newest_checkpoint(self, config: Config, data_fingerprint: str, resume: Resume) -> Path | None:
        """Where the run in this folder stopped; None: it starts from the beginning. Writes nothing.

        Raises:
            TlearnError: the folder holds something else, a run with other options, or not what `resume` asks for.
        """
        found = None
        if not self.config.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise TlearnError(f"{self.path}: is not empty and holds no run; choose another --run")
        elif resume == "never":
            raise TlearnError(f"{self.path}: holds a run; choose another --run, or --resume auto to go on with it")
        else:
            self.lock()
            found = checkpoint.newest(self.checkpoints)
            progress = checkpoint.read_progress(found) if found else None
            # not config.yaml, which somebody may have edited since
            began = Config.model_validate(progress.config) if progress else load_config(self.config)
            if differing := [d for d in differing_keys(began, config) if not d.startswith(FREE_TO_CHANGE)]:
                raise TlearnError(
                    "\n  ".join([f"{self.path}: holds a run with other options; choose another --run:", *differing])
                )
            if progress and progress.data_fingerprint != data_fingerprint:
                raise TlearnError(f"{self.path}: {config.data.path} holds other images than when this run began")
        if resume == "must" and found is None:
            raise TlearnError(f"{self.path}: no checkpoint to resume from")
        return found

    def open(
        self, config: Config, environment: dict[str, Any], model: Model, classes: tuple[str, ...], fingerprint: str
    ) -> None:
        """Make the folder and record what the run is made of; from here on what is shown is logged too."""
        card = {
            "backbone": model.backbone,
            "head": model.head,
            "weights": model.weights,
            "classes": list(classes),
            "data_fingerprint": fingerprint,
            "preprocessing": asdict(model.preprocessing),
        }
        self.card.parent.mkdir(parents=True, exist_ok=True)
        self.lock()
        write_json(self.card, card)
        write_json(self.path / "environment.json", environment)
        write_text(self.config, f"# tlearn train {self.config} --run NEW   runs this again\n{dump_config(config)}")
        console.configure(log=self.log)

    def lock(self) -> None:
        """Hold the folder until `close`, or until this process is gone, however it ends.

        Raises:
            TlearnError: another process holds it.
        """
        if self._lock is not None:
            return
        log = self.log.open("a", encoding="utf-8")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            raise TlearnError(f"{self.path}: another process is at work here; wait or choose another --run") from None
        self._lock = log

    def close(self) -> None:
        """Leave the folder to others; what is shown from here on is not logged there."""
        console.close_log()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def new_path(config: Config) -> Path:
    """`runs/<time>-<strategy>`, a folder that does not exist yet."""
    stem = time.strftime(f"%Y%m%d-%H%M%S-{config.strategy}")
    candidates = (Path("runs") / (stem if i == 0 else f"{stem}-{i}") for i in range(10**6))
    return next(path for path in candidates if not path.exists())
