"""What a cluster wants to know of a job: slurm/*.yaml, typed and validated. Imports no torch."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tlearn.dataconfig import Section
from tlearn.errors import TlearnError

_NAME = re.compile(r"[A-Za-z_]\w*")
_OURS = {
    *("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time", "signal", "requeue"),
    *("partition", "account", "qos", "constraint", "job-name", "output", "error", "dependency", "kill-on-invalid-dep"),
}
"""Options of sbatch that we set ourselves, from other keys."""


class Profile(Section):
    """The resources of a job; one process per GPU, or `tasks_per_node` of them."""

    partition: str | None = None
    """Slurm's partition. Default: the cluster's."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have: `a100`, say."""
    nodes: int = Field(1, ge=1)
    """Machines."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs per machine, each with a process of its own."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Processes per machine, where they use no GPU."""
    cpus_per_task: int = Field(2, ge=1)
    """Cores per process: data.workers and one more."""
    mem: Annotated[str, Field(pattern=r"^\d+[KMGT]B?$")] | None = None
    """Memory per machine: `32G`."""
    time: str = "1:00:00"
    """Limit as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    signal_delay_s: int = Field(120, ge=10)
    """So long before the limit a run is told to save; it is then queued again."""
    max_restarts: int = Field(3, ge=0)
    """A job is queued again unless so many restarts in a row have brought no checkpoint."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines before the processes start, `module load cuda`; the first that fails ends the job."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the processes, as they stand: NCCL_SOCKET_IFNAME, say. With `$OTHERS` in it: a line of `setup`."""
    container: str | None = None
    """Put before the Python command: `apptainer exec --nv /images/torch.sif`."""
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Other options of sbatch, without the dashes: `{exclusive: true}`."""

    @property
    def processes_per_node(self) -> int:
        """One per GPU, else as many as asked for."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def time_min(self) -> int:
        """The limit in minutes, rounded up."""
        return -(-_seconds(self.time) // 60)

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: object) -> object:
        if isinstance(value, int):
            raise ValueError("needs quotes, as in '1:30:00': YAML takes it for a number without")
        return value

    @field_validator("time")
    @classmethod
    def _a_time(cls, value: str) -> str:
        if _seconds(value) <= 0:
            raise ValueError(f"is {value!r}, which is no limit")
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in value if not _NAME.fullmatch(name) or name == "PYTHONPATH"]:
            raise ValueError(f"{wrong[0]} cannot be set here (as a line of `setup` perhaps)")
        return value

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        if ours := [name for name in value if name.replace("_", "-") in _OURS]:
            raise ValueError(f"{ours[0]} follows from other options: {', '.join(Profile.model_fields)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Profile:
        if self.gpus_per_node and self.tasks_per_node:
            raise ValueError("tasks_per_node: has no effect beside gpus_per_node; every GPU has a process")
        if self.signal_delay_s >= _seconds(self.time):
            raise ValueError(f"signal_delay_s: {self.signal_delay_s} s are not before a limit of {self.time}")
        return self


def _seconds(time: str) -> int:
    """Of a time as sbatch takes it.

    Raises:
        ValueError: it is none.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]):
        raise ValueError(
            f"is {time!r}, should be like '1:30:00' (hours:minutes:seconds) or '2-12' (days-hours), in quotes"
        )
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def dump_profile(profile: Profile) -> str:
    """As YAML, without what was not said."""
    return yaml.safe_dump(profile.model_dump(exclude_unset=True), sort_keys=False)


def load_profile(path: Path) -> Profile:
    """Read a profile.

    Raises:
        TlearnError: every problem, with the file and the key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise TlearnError(f"--profile {path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise TlearnError(f"--profile {path}: not a valid YAML file: {error}") from None
    if not isinstance(raw, dict):
        raise TlearnError(f"--profile {path}: holds a {type(raw).__name__}, not options (`nodes: 2`, ...)")
    try:
        profile = Profile.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem["loc"], problem["type"], problem["msg"]) for problem in error.errors()]
        raise TlearnError("\n  ".join([f"--profile {path}:", *lines])) from None
    return profile


def _explain(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(key, sorted(Profile.model_fields), n=1)
        hint = f"did you mean {close[0]}?" if close else f"options here: {', '.join(Profile.model_fields)}"
        return f"{key}: no such option; {hint} (other options of sbatch go under `sbatch:`)"
    message = message.removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
