"""`tlearn status | logs | cancel`: a submitted run as Slurm and its folder show it. Needs no accounting database.

RUN/slurm/config.yaml, profile.yaml   as they were submitted
          code/tlearn/                the code as it was submitted
          jobs.jsonl                  one line per start: job, restart, nodes, step
          JOB_*                       submitit's: the sbatch file, what every rank printed
          JOB_RESTART_failure.txt     which rank failed first, and its error
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tlearn.errors import TlearnError
from tlearn.rendezvous import job_id

Row = dict[str, Any]

FOLDER = "slurm"
"""Inside the run folder."""

_OVER = ("OVER", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
"""States of jobs that do not come back; OVER: a local one."""
_TAIL_BYTES = 100_000


def status(run: Path) -> Row:
    """What is known of a run: `job` and `state` in Slurm, and what its folder says; keys that are unknown are absent.

    Raises:
        TlearnError: nothing was submitted or trained there.
    """
    job = last_job(run)
    rows = _last_rows(run / "metrics.jsonl")
    if job is None and not rows:
        raise TlearnError(f"{run}: holds no run; submit one with tlearn submit --run {run}")
    report: Row = {"run": str(run)}
    if job is not None:
        report |= {"job": job, "state": state(run, job)}
        starts = read_starts(run)
        report |= {"restarts": max(len(starts) - 1, 0)}
        if starts:
            report |= {"nodes": starts[-1]["nodes"], "processes": starts[-1]["tasks"]}
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if steps:
        report |= {key: steps[-1][key] for key in ("stage", "epoch", "step", "train/loss", "images_per_s")}
    if epochs:
        report |= {key: value for key, value in epochs[-1].items() if key.startswith("val/")}
    saved = sorted((run / "checkpoints").glob("step-*"), key=lambda path: path.stat().st_mtime)
    if saved:
        report["checkpoint"] = f"{saved[-1].name}, {time.time() - saved[-1].stat().st_mtime:.0f} s old"
    report["finished"] = (run / "result.json").is_file()
    if job is not None and report["state"] in _OVER and not report["finished"]:
        failures = sorted((run / FOLDER).glob(f"{job}_*_failure.txt"), key=lambda path: path.stat().st_mtime)
        if failures:
            lines = failures[-1].read_text(encoding="utf-8").splitlines()
            report["failure"] = f"{lines[0]} {lines[-1]}"
        elif report["state"] == "FAILED":
            code = slurm_fields(job).get("ExitCode", "unknown")
            killed = ", killed (for want of memory?)" if code.startswith("137:") else ""
            report["failure"] = f"exit code {code}{killed}; see tlearn logs {run}"
        report["go on with"] = f"tlearn submit --run {run}"
    return report


def logs(run: Path, rank: int, *, follow: bool) -> Iterator[str]:
    """What a rank of the last job printed; with `follow` also what it prints until the job is over.

    Raises:
        TlearnError: nothing was submitted there, or there is no such rank.
    """
    job = _submitted(run)
    path = run / FOLDER / f"{job}_{rank}_log.err"
    while follow and not path.exists() and is_active(run, job):
        time.sleep(1)
    if not path.exists():
        raise TlearnError(f"{path}: not there; job {job} is {state(run, job)}, or has no rank {rank}")
    with path.open(encoding="utf-8", errors="backslashreplace") as file:
        while True:
            over = not follow or not is_active(run, job)
            while text := file.read(_TAIL_BYTES):
                yield text
            if over:
                return
            time.sleep(1)


def cancel(run: Path) -> str:
    """End the job of a run, which saves first; returns its id.

    Raises:
        TlearnError: nothing was submitted there, or what Slurm says.
    """
    job = _submitted(run)
    if _is_local(run, job):
        if state(run, job) == "RUNNING":
            os.kill(int(job), signal.SIGTERM)
        return job
    done = _slurm("scancel", job)
    if done is None or done.returncode:
        raise TlearnError(
            f"job {job}: not cancelled: {done.stderr.strip() if done else 'scancel is not installed here'}"
        )
    return job


def last_job(run: Path) -> str | None:
    """Id of the job that was submitted last."""
    files = sorted((run / FOLDER).glob("*_submitted.pkl"), key=lambda path: path.stat().st_mtime)
    ids = [path.name.partition("_")[0] for path in files]
    return next((job for job in reversed(ids) if job.isdecimal()), None)


def state(run: Path, job: str) -> str:
    """PENDING, RUNNING, COMPLETED, ... of Slurm; RUNNING or OVER of a local job.

    `unknown` where Slurm is not installed or has forgotten the job.
    """
    if not _is_local(run, job):
        return slurm_fields(job).get("JobState", "unknown")
    try:  # the id may be another process's by now
        return "RUNNING" if str(run.absolute()) in Path(f"/proc/{job}/cmdline").read_text() else "OVER"
    except OSError:
        return "OVER" if Path("/proc/self").exists() else "unknown"


def is_active(run: Path, job: str) -> bool:
    """Whether it waits or runs."""
    return state(run, job) not in (*_OVER, "unknown")


def slurm_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says: JobState, Reason, PreemptTime, ...; empty where it says nothing."""
    done = _slurm("scontrol", "--oneliner", "show", "job", job)
    words = done.stdout.split() if done and done.returncode == 0 else []
    return dict(word.split("=", 1) for word in words if "=" in word)


def failure_file(place: Path, environment: Mapping[str, str]) -> Path:
    """Where the first rank to fail leaves its error, at this start of this job."""
    return place / f"{job_id(environment)}_{environment.get('SLURM_RESTART_COUNT') or 0}_failure.txt"


def _is_local(run: Path, job: str) -> bool:
    return not (run / FOLDER / f"{job}_submission.sh").exists()


def _submitted(run: Path) -> str:
    job = last_job(run)
    if job is None:
        raise TlearnError(f"{run}: no job was submitted here; tlearn submit --run {run} does it")
    return job


def _slurm(*command: str) -> subprocess.CompletedProcess[str] | None:
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read_starts(run: Path) -> list[Row]:
    """A row per start: job, restart, nodes, tasks, step, time."""
    path = run / FOLDER / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _last_rows(path: Path) -> list[Row]:
    """Whole rows at the end of a file that may be long and in the middle of being written."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - _TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")[bool(start) : -1]
    return [json.loads(line) for line in lines]
