"""How the processes of a run find each other: one reader of the environment, whoever started them.

torchrun, accelerate and `--nproc` set the variables of RENDEZVOUS. srun and submitit's local executor set their own,
from which they follow.
This module imports no torch: it has to be read before torch is, which looks at OMP_NUM_THREADS once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from tlearn.errors import TlearnError

RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which processes find each other; torchrun, accelerate and `--nproc` set all of them."""

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""The interface for processes of one machine. gloo's default is the one of the address that the host's name resolves
to, which may not be there without a network."""

_FIRST_PORT, _PORTS = 12_000, 8_000
"""Below the ports that the kernel gives out (from 32768 on), any of which may be taken."""


def resolved(environment: Mapping[str, str]) -> dict[str, str]:
    """What a task of srun or submitit has to add to its environment; nothing elsewhere, or where a launcher was first.

    Raises:
        TlearnError: variables that contradict each other.
    """
    if any(environment.get(name) for name in RENDEZVOUS):
        return {}
    if is_local(environment):
        return _from_submitit(environment)
    # the batch script and an interactive shell have SLURM_NTASKS too, but are no task of a step
    return _from_slurm(environment) if "SLURM_STEP_ID" in environment else {}


def is_local(environment: Mapping[str, str]) -> bool:
    """Whether this is a task of `tlearn submit --local`, perhaps inside of a Slurm job."""
    return environment.get("SUBMITIT_EXECUTOR") == "local"


def job_id(environment: Mapping[str, str]) -> str:
    """Slurm's; of a local job the id of the process that started its tasks; empty outside of jobs."""
    return environment.get("SUBMITIT_LOCAL_JOB_ID" if is_local(environment) else "SLURM_JOB_ID", "")


def _from_submitit(environment: Mapping[str, str]) -> dict[str, str]:
    rank, world_size = environment["SUBMITIT_LOCAL_GLOBALID"], environment["SUBMITIT_LOCAL_NTASKS"]
    if world_size == "1":
        return {}
    return {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_FIRST_PORT + int(job_id(environment)) % _PORTS),
        "GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME") or LOOPBACK,
    }


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Rank 0 is on the first node of the step. The port follows from job and step, so that all tasks agree on it."""
    try:
        rank, world_size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        node, local_rank = int(environment["SLURM_NODEID"]), environment["SLURM_LOCALID"]
        nodes = environment["SLURM_STEP_NODELIST"]
        here = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
        # another one at every restart: it may be taken
        turn = int(environment["SLURM_STEP_ID"]) + int(environment.get("SLURM_RESTART_COUNT") or 0)
        port = _FIRST_PORT + (int(environment["SLURM_JOB_ID"]) * 31 + turn) % _PORTS
    except (KeyError, ValueError, IndexError) as error:
        raise TlearnError(
            f"the environment of this Slurm step cannot be read ({error!r}); start tasks with srun"
        ) from None
    if world_size == 1:
        return {}
    seen = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES") or ""
    devices = len(seen.split(","))
    if seen and devices < int(environment.get("SLURM_GPUS_ON_NODE") or 0):
        # --gpus-per-task, --gpu-bind: every task sees its own devices only
        local_rank, here = str(int(local_rank) % devices), min(here, devices)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or environment.get("SLURM_CPUS_PER_TASK") or "1",
    }


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: `gpu[07-09,12],login` -> `gpu07`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Raise where only some of the variables are set by which processes find each other.

    `accelerate launch --cpu --num_processes 2`, for one, sets two of them and starts a single process.

    Raises:
        TlearnError: which are set and which are missing.
    """
    missing = [name for name in RENDEZVOUS if not environment.get(name)]
    if len(missing) == len(RENDEZVOUS):
        return
    if missing:
        present = [name for name in RENDEZVOUS if name not in missing]
        raise TlearnError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}: a launcher set it up by half, and "
            "this process would train alone. Use --nproc N, torchrun, or accelerate launch with a file of launch/; "
            f"or unset {', '.join(present)}"
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise TlearnError(f"the environment has {name}={environment[name]}, which is no number")
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        rank, world_size = environment["RANK"], environment["WORLD_SIZE"]
        raise TlearnError(f"the environment has RANK={rank} of WORLD_SIZE={world_size}; ranks count from 0")
