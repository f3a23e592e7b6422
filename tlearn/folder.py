"""The run folder: a record of one run from which it can be repeated, resumed and used.

config.yaml       expanded; `tlearn train RUN/config.yaml` runs it again
plan.json         of `strategy: auto`: what was chosen, and why
environment.json  versions, machine, devices
metrics.jsonl     one object per step, epoch and stage
result.json       final scores of the best weights
log.txt           what people were shown
checkpoints/      the last two, and the weights of the epochs that these count among the best
best/             model.safetensors and model.json: what `load` needs; top-2.safetensors, ... on request (keep.best)
"""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import IO, Any, Literal

from tlearn import checkpoint, console
from tlearn.checkpoint import Progress
from tlearn.config import Config
from tlearn.configfile import differing_keys, dump_config, load_config
from tlearn.errors import TlearnError
from tlearn.files import new_run, write_json, write_text
from tlearn.models.backbones import full_name
from tlearn.models.build import Card, Model
from tlearn.planner import Plan, Reason

Resume = Literal["auto", "never", "must"]

FREE_TO_CHANGE = (
    "data.path",
    "data.workers",
    "data.score_test",
    "save_every.",
    "keep.",
    "tracking.",
    "run.audit",
    "quick.",
    "features.cache",
    "features.max_gib",
)
"""Options in which a run and its resumption may differ: they do not change the numbers. (That data at another place
are the same shows their fingerprint.)"""

SAFE_TO_CHANGE = (
    *("batch.micro", "batch.find", "clip_norm", "precision", "data.augment.", "model.dropout"),
    *(
        f"objective.{name}"
        for name in ("label_smoothing", "class_weight", "alpha", "temperature", "strength", "teacher")
    ),
    *("optimizer.", "schedule.", "strategy", "epochs"),  # for stages that name no other
)
"""Options that a run may change on the way, with --override: what was trained and where it stands keep their meaning.
Stages that have not ended are as safe."""


_BEFORE = {"slurm", "quick"}

PATIENCE_S = 5.0
"""The loader workers of a run that was killed hold its folder until they notice, some milliseconds later."""


class RunFolder:
    """Paths of a run, and what is written there once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.plan = path / "plan.json"
        self.checkpoints = path / "checkpoints"
        self.best = path / "best" / "model.safetensors"
        self.card = path / "best" / "model.json"
        self.result = path / "result.json"
        self.log = path / "log.txt"
        self._lock: IO[str] | None = None

    @classmethod
    def named(cls, path: str | Path | None, config: Config) -> RunFolder:
        """The folder a user named, or a new one."""
        return cls(Path(path) if path is not None else new_run(config.strategy))

    def precision_of(self, config: Config) -> str:
        """What the config asks for; `auto` is what the run in this folder began with, wherever it goes on."""
        if config.precision == "auto" and self.config.is_file():
            return load_config(self.config).precision
        return config.precision

    def newest_checkpoint(self, resume: Resume) -> Path | None:
        """Where the run in this folder stopped; None: it starts from the beginning. Holds the folder until `close`.

        Raises:
            TlearnError: the folder holds something else, or not what `resume` asks for; no checkpoint is whole.
        """
        found = None
        if not self.config.exists():
            # what `tlearn submit` and `--quick-first` put there is no run yet
            if self.path.exists() and not (self.path.is_dir() and {p.name for p in self.path.iterdir()} <= _BEFORE):
                raise TlearnError(f"{self.path}: is not empty and holds no run; choose another --run")
        elif resume == "never":
            raise TlearnError(f"{self.path}: holds a run; choose another --run, or --resume auto to go on with it")
        else:
            self.lock()
            found = checkpoint.newest(self.checkpoints)
            if self.best.exists() and not self.checkpoints.exists():
                raise TlearnError(f"{self.checkpoints}: is gone; restore it, or choose another --run to start over")
        if resume == "must" and found is None:
            raise TlearnError(f"{self.path}: no checkpoint to resume from")
        return found

    def recorded_plan(self) -> Plan | None:
        """What `strategy: auto` has chosen for the run in this folder; None: there is no run yet.

        Raises:
            TlearnError: it was begun in another way, or the file is damaged.
        """
        if not self.config.exists():
            return None
        try:
            plan = json.loads(self.plan.read_text(encoding="utf-8"))
            return Plan(plan["options"], [Reason(**reason) for reason in plan["reasons"]])
        except FileNotFoundError:
            reason = "holds a run that was not begun with strategy=auto"
        except (ValueError, LookupError, TypeError) as error:
            reason = f"its plan.json is damaged ({error})"
        raise TlearnError(f"{self.path}: {reason}; go on with: tlearn train --run {self.path}")

    def recorded_model(self, config: Config, found: Path | None) -> Card | None:
        """What is known of the model that the checkpoint holds; None: there is none, or the config names another.

        With it a run goes on where the pretrained weights cannot be had any more.
        """
        if found is None:
            return None
        try:
            card = Card.read(self.card)
        except (TlearnError, OSError):  # it is written anew
            return None
        same = full_name(config.model.backbone) == card.backbone and config.model.weights in (card.weights, card.asked)
        return card if same else None

    def changes(
        self, found: Path | None, config: Config, data_fingerprint: str, rests_on: str, *, override: bool
    ) -> list[str]:
        """Options that the run in this folder is to go on with instead of those it began with, as `key: old -> new`.

        Raises:
            TlearnError: options that cannot change any more, or not without `override`; other images, another teacher.
        """
        if not self.config.exists():
            return []
        progress = checkpoint.read_progress(found) if found else None
        # not config.yaml, which somebody may have edited since
        began = Config.model_validate(progress.config) if progress else load_config(self.config)
        changes = [d for d in differing_keys(began, config) if not d.startswith(FREE_TO_CHANGE)]
        unsafe = [d for d in changes if not _is_safe(d, began, config, progress or Progress())]
        if unsafe or (changes and not override):
            lines = [
                f"{d} ({'cannot change once a run has begun' if d in unsafe else 'goes on with --override'})"
                for d in changes
            ]
            header = f"{self.path}: holds a run with other options; go on with those, or choose another --run:"
            raise TlearnError("\n  ".join([header, *lines]))
        if progress and progress.data_fingerprint != data_fingerprint:
            raise TlearnError(f"{self.path}: {config.data.path} holds other images than when this run began")
        if progress and progress.rests_on != rests_on:
            raise TlearnError(f"{self.path}: objective.teacher holds other weights than when this run began")
        return changes

    def open(
        self,
        config: Config,
        environment: dict[str, Any],
        model: Model,
        asked: str,
        classes: tuple[str, ...],
        fingerprint: str,
        plan: Plan | None,
    ) -> None:
        """Make the folder and record what the run is made of; from here on what is shown is logged too.

        Args:
            asked: for which weights, before a tag was known.
            plan: what `strategy: auto` has chosen.

        Raises:
            TlearnError: another process has made one here meanwhile.
        """
        options = config.model.stem, config.model.attention, model.text_width
        card = Card(
            model.backbone, model.head, model.weights, asked, classes, fingerprint, model.preprocessing, *options
        )
        self.card.parent.mkdir(parents=True, exist_ok=True)
        is_new = self._lock is None
        self.lock()
        if is_new and self.config.exists():
            raise TlearnError(f"{self.path}: another process began a run here meanwhile; choose another --run")
        write_json(self.card, card.content())
        write_json(self.path / "environment.json", environment)
        if plan is not None:
            write_json(self.plan, {"options": plan.options, "reasons": [reason._asdict() for reason in plan.reasons]})
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
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                log.close()
                raise TlearnError(
                    f"{self.path}: another process is at work here; wait or choose another --run"
                ) from None
            self._lock = log
            return

    def close(self) -> None:
        """Leave the folder to others; what is shown from here on is not logged there."""
        console.close_log()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _is_safe(difference: str, began: Config, config: Config, progress: Progress) -> bool:
    """Whether a run may go on with this difference, `key: old -> new`."""
    key = difference.partition(":")[0]
    section, _, rest = key.partition(".")
    if section != "stages":
        return key.startswith(SAFE_TO_CHANGE)
    number, _, option = rest.partition(".")
    old, new = began.stages or [], config.stages or []
    if int(number) == progress.stage < len(old):  # it runs: it can become longer, but not end before where it stands
        if progress.stage >= len(new):
            return False
        longer = new[progress.stage].epochs > old[progress.stage].epochs
        return option != "epochs" or longer or progress.stage_step == 0
    return int(number) >= progress.stage
