"""What the processes of a run see of each other and of their machines, and what is wrong with it."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tlearn.data.workers import available_cores
from tlearn.errors import TlearnError
from tlearn.rendezvous import RENDEZVOUS
from tlearn.runtime import Runtime

Report = dict[str, Any]

_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SETTINGS = (*RENDEZVOUS, "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", *_INTERFACES)
_SHM_NEEDED_MIB = 256
_DISK_NEEDED_GIB = 2


def examine(folder: Path | None = None) -> Report:
    """Start as a run would, sum a number over all ranks, and gather what every rank sees; the same on every rank.

    Args:
        folder: where runs shall lie; it has to be the same one for all ranks.

    Raises:
        TlearnError: processes that do not find each other.
    """
    runtime = Runtime()
    token = runtime.on_main(lambda: _left_in(folder)) if folder is not None else None
    start = time.perf_counter()
    total = float(runtime.sum(torch.tensor(float(runtime.rank + 1), device=runtime.device)))
    seconds = time.perf_counter() - start
    runtime.set_precision("fp32")
    ranks: list[Report] = runtime.gather_lists([_about_this_rank(runtime) | _about_folder(folder, token)])
    if folder is not None and token is not None:
        runtime.on_main(lambda: (folder / token).unlink())
    expected = runtime.world_size * (runtime.world_size + 1) / 2
    report = {
        "scontrol": shutil.which("scontrol") is not None if "SUBMITIT_EXECUTOR" in os.environ else None,
        "world_size": runtime.world_size,
        "backend": runtime.state.backend or "none",
        "address": f"{os.environ.get('MASTER_ADDR', 'none')}:{os.environ.get('MASTER_PORT', 'none')}",
        "precision": [p for p in ("fp32", "bf16", "fp16", "fp64") if not runtime.unsupported(p)],
        "all_reduce": {"sum": total, "expected": expected, "ms": round(1000 * seconds, 2)},
        "folder": str(folder.absolute()) if folder is not None else None,
        "ranks": ranks,
        "versions": runtime.environment()["versions"],
    }
    return report | {"problems": problems(report)}


def _about_this_rank(runtime: Runtime) -> Report:
    shm = shutil.disk_usage("/dev/shm").free // 2**20 if Path("/dev/shm").is_dir() else None
    return {
        "rank": runtime.rank,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "device": str(runtime.device),
        "devices_here": torch.accelerator.device_count() if torch.accelerator.is_available() else 0,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "shared_memory_mib": shm,
        "environment": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def _left_in(folder: Path) -> str:
    """The name of a new file, for the other ranks to look for."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tlearn-doctor-", dir=folder)
    except OSError as error:
        raise TlearnError(f"{folder}: cannot be written to: {error.strerror}") from None
    os.close(handle)
    return Path(name).name


def _about_folder(folder: Path | None, token: str | None) -> Report:
    if folder is None or token is None:
        return {}
    # a listing: NFS remembers for a while that a file was not there
    shared = folder.is_dir() and folder / token in folder.iterdir()
    free = round(shutil.disk_usage(folder).free / 2**30, 1) if folder.exists() else None
    return {"sees_folder": shared, "free_gib": free}


def problems(report: Report) -> list[str]:
    """What is wrong with the processes of a run, and how to mend it."""
    found = []
    reduced = report["all_reduce"]
    if reduced["sum"] != reduced["expected"]:
        found.append(f"the sum over all ranks is {reduced['sum']}, not {reduced['expected']}: do not train like this")
    by_host: dict[str, list[Report]] = {}
    for rank in report["ranks"]:
        by_host.setdefault(rank["host"], []).append(rank)
    if report.get("scontrol") is False:
        found.append("scontrol is not to be had in the job (in the container?): it could not be queued again; bind it")
    for rank in report["ranks"]:
        where = f"{rank['host']} (rank {rank['rank']})"
        if not rank.get("sees_folder", True):
            found.append(f"{where}: does not see rank 0's file in {report['folder']}; --run has to be on a shared disk")
        elif rank.get("free_gib", _DISK_NEEDED_GIB) < _DISK_NEEDED_GIB:
            found.append(f"{where}: {rank['free_gib']} GiB free at {report['folder']}; checkpoints need more")
    for host, ranks in by_host.items():
        used = [rank["environment"].get("CUDA_VISIBLE_DEVICES", "") + rank["device"] for rank in ranks]
        if ranks[0]["devices_here"] and len(set(used)) < len(used):
            found.append(f"{host}: two processes share a device; ask for one per process (gpus_per_node)")
        if ranks[0]["devices_here"] > len(ranks):
            found.append(f"{host}: {ranks[0]['devices_here']} devices, {len(ranks)} processes; --nproc N uses N")
        threads, cores = sum(rank["threads"] for rank in ranks), ranks[0]["cores"]
        if len(ranks) > cores:
            found.append(f"{host}: {len(ranks)} processes on {cores} cores; start {cores} at most")
        elif threads > cores:
            found.append(f"{host}: {threads} threads on {cores} cores; set OMP_NUM_THREADS={cores // len(ranks)}")
        shm = ranks[0]["shared_memory_mib"]
        if shm is not None and shm < _SHM_NEEDED_MIB:
            found.append(
                f"{host}: {shm} MiB free in /dev/shm, through which loader workers hand over their batches; "
                "give the container more (docker run --shm-size=2g), or set data.workers=0"
            )
    return found


def report_table(report: Report) -> Table:
    """One row a rank."""
    reduced = report["all_reduce"]
    title = (
        f"world size {report['world_size']}, backend {report['backend']}, rank 0 at {report['address']}, "
        f"all-reduce {reduced['sum']:g} (expected {reduced['expected']:g}) in {reduced['ms']} ms"
    )
    columns = ["rank", "host", "process", "device", "cores", "threads", "shared_memory_mib"]
    if report["folder"] is not None:
        columns += ["sees_folder", "free_gib"]
    table = Table(*columns, title=title, title_justify="left")
    for rank in report["ranks"]:
        table.add_row(*(str(rank[name]) for name in columns))
    return table
