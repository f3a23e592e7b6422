"""What tests do with the Slurm of the fixture `cluster`, whose value is the environment of its clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Cluster = dict[str, str]


def run(cluster: Cluster, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """A command that is over soon."""
    return subprocess.run(command, env=cluster, capture_output=True, text=True, check=False, timeout=60)


def tlearn(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Our program."""
    return run(cluster, sys.executable, "-m", "tlearn", *arguments)


def srun(cluster: Cluster, options: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    """Python in every task."""
    return subprocess.run(
        ["srun", "--mem-per-cpu=1000", "--kill-on-bad-exit=1", *options, sys.executable, *command],
        env={**cluster, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


def slurm(cluster: Cluster, *command: str) -> str:
    """What a tool of Slurm says; it must succeed."""
    done = run(cluster, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(cluster: Cluster, job: str) -> str:
    return slurm(cluster, "scontrol", "show", "job", job).partition("JobState=")[2].split()[0]


def submitted(cluster: Cluster, *arguments: str) -> str:
    """The job's id."""
    done = tlearn(cluster, "submit", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def write_profile(path: Path, **options: Any) -> str:
    path.write_text(json.dumps({"cpus_per_task": 1, "mem": "2G", "environment": {"OMP_NUM_THREADS": "1"}, **options}))
    return str(path)


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def reached(run: Path, step: int) -> Callable[[], bool]:
    """Whether a checkpoint of this step or a later one is there."""
    return lambda: any(int(path.name[5:13]) >= step for path in (run / "checkpoints").glob("step-*"))


def last_code(folder: Path) -> Path:
    """The copy of tlearn that the job which was submitted last runs."""
    return max((folder / "slurm").glob("submission-*")) / "tlearn"


def tasks(variable: str, value: str, python_only: bool = True) -> list[int]:
    """Processes with this variable: the ranks of a job, say."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"{variable}={value}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if mine and (not python_only or b"submitit.core._submit" in (folder / "cmdline").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@contextmanager
def frozen(job: str) -> Iterator[None]:
    """The ranks of a job stand still inside, and until Slurm has sent them SIGUSR2."""
    ranks = tasks("SLURM_JOB_ID", job)
    assert ranks
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        yield
        wait_for(lambda: not any(_waits_for_sigusr2(rank) for rank in ranks))
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGCONT)


def _waits_for_sigusr2(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False  # Slurm wakes them too, and they have saved and left
    pending = int(status.partition("ShdPnd:")[2].split()[0], 16)
    return status.partition("State:")[2].split()[0] == "T" and not pending & 1 << (signal.SIGUSR2 - 1)


def power_off(cluster: Cluster, node: str) -> None:
    """Kill a node: its daemon, what that started, and the tasks."""
    place = Path(cluster["SLURM_CONF"]).parent
    os.kill(int((place / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
    ours = tasks("SLURM_CONF", cluster["SLURM_CONF"], python_only=False)  # another cluster may have such a node too
    doomed = set(ours) & set(tasks("SLURMD_NODENAME", node, python_only=False))
    for process in set(doomed):
        with suppress(OSError):
            parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
            if Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd":
                doomed.add(int(parent))
    # all at once: none shall tell Slurm how another one ended
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in doomed:
            with suppress(ProcessLookupError):
                os.kill(process, number)
