"""`tlearn status | logs | cancel`: a submitted run as Slurm and its folder show it. Needs no accounting database.

RUN/slurm/submission-TIME/          config.yaml, profile.yaml and the code (tlearn/) as they were submitted
          jobs.jsonl                one line per start: job, restart, nodes, step
          JOB_*                     submitit's: the sbatch file, what every rank printed
          JOB_RESTART_failure.txt   which rank failed first, and its error
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tlearn.errors import TlearnError
from tlearn.rendezvous import job_id

Row = dict[str, Any]

FOLDER = "slurm"
"""Inside the run folder."""
QUICK = "quick"
"""Of a run that is decided on first, inside its folder."""

ORDER = "order.json"
"""In the folder of a submission: what was to be done."""

OVER = (
    *("OVER", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"),
    *("PREEMPTED", "REVOKED"),
)
"""States of jobs that do not come back; OVER: a local one, or one that Slurm has forgotten (after MinJobAge)."""
_ATTEMPTS = 3
_PATIENCE_S = 15.0
"""With a controller that does not answer; Slurm's tools have a minute's."""
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
        reason = "None" if _is_local(run, job) else slurm_fields(job).get("Reason", "None")
        if reason != "None":
            report["reason"] = reason
        starts = [start for start in read_starts(run) if start["job"] == job]
        report |= {"restarts": max(len(starts) - 1, 0)}
        if starts:
            report |= {"nodes": starts[-1]["nodes"], "processes": starts[-1]["tasks"]}
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    if steps:
        report |= {key: steps[-1][key] for key in ("stage", "epoch", "step", "train/loss", "images_per_s")}
    if epochs:
        report |= {key: value for key, value in epochs[-1].items() if key.startswith("val/")}
    saved = max((run / "checkpoints").glob("step-*"), default=None)
    if saved is not None:
        with suppress(FileNotFoundError):  # it was pruned just now
            report["checkpoint"] = f"{saved.name}, {time.time() - saved.stat().st_mtime:.0f} s old"
    report["finished"] = (run / "result.json").is_file()
    if (verdict := _verdict(run)) is not None:
        report["quick"] = verdict
    if job is not None and report["state"] in OVER and not report["finished"]:
        if failure := _failure(run, job, report["state"]):
            report["failure"] = failure
        full = run / QUICK / "full.yaml"
        regardless = f"{shlex.quote(str(full))} " if full.exists() and not report["quick"].startswith("go") else ""
        report["go on with"] = f"tlearn submit {regardless}--run {shlex.quote(str(run))}"
    return report


def _verdict(run: Path) -> str | None:
    """Of the quick run on which this one waits, or of this one, in a line."""
    for place in (run / QUICK, run):
        with suppress(OSError, ValueError, LookupError):
            verdict = json.loads((place / "verdict.json").read_text(encoding="utf-8"))
            return f"{verdict['verdict']}: {'; '.join(verdict['reasons'])}"
    job = last_job(run / QUICK)
    return f"job {job}, {state(run / QUICK, job)}" if job is not None else None


def _failure(run: Path, job: str, state: str) -> str | None:
    """Of the last start, in a line."""
    restarts = [start["restart"] for start in read_starts(run) if start["job"] == job]
    left = run / FOLDER / f"{job}_{restarts[-1] if restarts and not _is_local(run, job) else 0}_failure.txt"
    if left.exists():
        first, *lines = left.read_text(encoding="utf-8").splitlines()
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)?: ", line)]
        return f"{first} {named[0] if named else lines[-1]}" if lines else first
    if state != "FAILED":
        return None
    code = slurm_fields(job).get("ExitCode", "unknown")
    killed = ", killed (for want of memory?)" if code.startswith("137:") else ""
    return f"exit code {code}{killed}; see tlearn logs {shlex.quote(str(run))}"


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
        TlearnError: nothing was submitted there, it is over, or what Slurm says.
    """
    job = _submitted(run)
    earlier = last_job(run / QUICK)
    if earlier is not None and is_active(run / QUICK, earlier):
        with suppress(TlearnError):  # Slurm cancels what waits for a job that is cancelled
            _end(run, job)
        return _end(run / QUICK, earlier)
    return _end(run, job)


def _end(run: Path, job: str) -> str:
    if (now := state(run, job)) in OVER:
        raise TlearnError(f"{run}: job {job} is over already ({now})")
    if _is_local(run, job):
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
    newest = max((run / FOLDER).glob("*_submitted.pkl"), key=lambda path: path.stat().st_mtime, default=None)
    return newest.name.partition("_")[0] if newest is not None else None


def new_submission(run: Path) -> Path:
    """A folder for what is submitted now; those of before stay, a job may still need them."""
    stem = time.strftime("submission-%Y%m%d-%H%M%S")
    names = (f"{stem}-{i}" if i else stem for i in range(10**6))
    return next(path for name in names if not (path := run / FOLDER / name).exists())


def last_submission(run: Path) -> Path | None:
    """The folder of what was submitted last."""
    return max((run / FOLDER).glob("submission-*"), default=None)


def read_order(submission: Path) -> Row:
    """What a submission is to do: `quick`, `given`."""
    order: Row = json.loads((submission / ORDER).read_text(encoding="utf-8"))
    return order


def state(run: Path, job: str) -> str:
    """PENDING, RUNNING, COMPLETED, ... of Slurm; RUNNING or OVER of a local job; `unknown`: Slurm does not answer."""
    if not _is_local(run, job):
        return slurm_fields(job).get("JobState", "unknown")
    try:  # the id may be another process's by now
        return "RUNNING" if str(run.resolve()) in Path(f"/proc/{job}/cmdline").read_text() else "OVER"
    except OSError:
        return "OVER" if Path("/proc/self").exists() else "unknown"


def is_active(run: Path, job: str) -> bool:
    """Whether it waits or runs."""
    return state(run, job) not in (*OVER, "unknown")


def slurm_fields(job: str) -> dict[str, str]:
    """What `scontrol show job` says: JobState, Reason, PreemptTime, ...; empty where Slurm does not answer."""
    for attempt in range(_ATTEMPTS):
        done = _slurm("scontrol", "--oneliner", "show", "job", job)
        if done is None:
            return {}
        if done.returncode == 0:
            return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
        if "Invalid job id" in done.stderr:
            return {"JobState": "OVER"}
        time.sleep(attempt)  # a busy controller
    return {}


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
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return None


def read_starts(run: Path) -> list[Row]:
    """A row per start: job, restart, nodes, tasks, step, time."""
    path = run / FOLDER / "jobs.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):  # torn by a node that died
            rows.append(json.loads(line))
    return rows


def _last_rows(path: Path) -> list[Row]:
    """Whole rows at the end of a file that may be long and in the middle of being written, an epoch's among them."""
    if not path.exists():
        return []
    size, length = path.stat().st_size, _TAIL_BYTES
    while True:
        with path.open("rb") as file:
            file.seek(max(0, size - length))
            lines = file.read().split(b"\n")[size > length : -1]
        rows = [json.loads(line) for line in lines]
        if length >= size or any(row["kind"] == "epoch" for row in rows):
            return rows
        length *= 8
