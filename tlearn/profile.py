"""What a cluster wants to know of a job: slurm/*.yaml, typed and validated. Imports no torch."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from tlearn.config import Section
from tlearn.errors import TlearnError

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d{2})(?::(?P<seconds>\d{2}))?")


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
    """Limit as [days-]hours:minutes[:seconds]."""
    signal_delay_s: int = Field(120, ge=10)
    """So long before the limit a run is told to save; it is then queued again."""
    max_restarts: int = Field(3, ge=0)
    """A job is queued again unless so many restarts in a row have brought no step."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines before the processes start: `module load cuda`."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the processes: NCCL_SOCKET_IFNAME, say."""
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
        match = _TIME.fullmatch(self.time)
        assert match is not None
        days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
        return (days * 24 + hours) * 60 + minutes + (seconds > 0)


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
    if profile.gpus_per_node and profile.tasks_per_node:
        raise TlearnError(
            f"--profile {path}: tasks_per_node: has no effect beside gpus_per_node; every GPU has a process"
        )
    if not _TIME.fullmatch(profile.time):
        raise TlearnError(
            f"--profile {path}: time = {profile.time!r}: should be [days-]hours:minutes[:seconds], in quotes"
        )
    return profile


def _explain(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(key, sorted(Profile.model_fields), n=1)
        hint = f"did you mean {close[0]}?" if close else f"options here: {', '.join(Profile.model_fields)}"
        return f"{key}: no such option; {hint} (other options of sbatch go under `sbatch:`)"
    return f"{key}: {message}"
