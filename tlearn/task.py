"""What every task of a submitted job does: train as a rank, be queued again after a save, name the rank that failed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from tlearn.configfile import load_config
from tlearn.errors import EXPECTED, StoppedBySignalError, TlearnError, refused
from tlearn.jobs import FOLDER, failure_file, read_starts, slurm_fields
from tlearn.rendezvous import is_local, job_id, resolved
from tlearn.signals import handled_by, stop

CULPRIT_S = 10.0
"""So long a rank that lost another one looks for what that one left."""

VERDICT_S = 1800.0
"""So long it then leaves it to Slurm to find out that a node is gone: SlurmdTimeout is 300 s by default."""

_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def train_task(run: str, max_restarts: int, override: bool) -> float:
    """Train what RUN/slurm/config.yaml says; when told to stop while the job goes on, have it queued again.

    Returns:
        Val top-1 of the best weights.
    """
    place = Path(run) / FOLDER
    with _first_failure_named(place):
        try:
            with handled_by(stop):
                os.environ.update(resolved(os.environ))
                if _rank() == 0:
                    note_start(Path(run), max_restarts)
                from tlearn.run import train

                result = train(load_config(place / "config.yaml"), run, override=override)
                top1: float = result["val"]["top1"]
                return top1
        except StoppedBySignalError as stopped:
            if not _goes_on(stopped.signal):
                raise
            if _rank() == 0:
                print(stopped, file=sys.stderr, flush=True)
            _queue_again()


def examine_task(folder: str) -> None:
    """`tlearn doctor` in a job; rank 0 leaves the report."""
    with _first_failure_named(Path(folder) / FOLDER), handled_by(stop):
        os.environ.update(resolved(os.environ))
        from tlearn.doctor import examine

        report = examine(Path(folder))
        if _rank() == 0:
            from tlearn.files import write_json

            write_json(Path(folder) / "report.json", report)


def note_start(run: Path, max_restarts: int) -> None:
    """Add a line to jobs.jsonl.

    Raises:
        TlearnError: the last starts of this job have brought no step.
    """
    from tlearn import checkpoint

    newest = checkpoint.newest(run / "checkpoints")
    step = checkpoint.read_progress(newest).step if newest else 0
    job = job_id(os.environ)
    earlier = [start for start in read_starts(run) if start["job"] == job]
    row = {
        "job": job,
        "restart": len(earlier),
        "nodes": os.environ.get("SLURM_JOB_NODELIST") or socket.gethostname(),
        "tasks": int(os.environ.get("WORLD_SIZE") or 1),
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with (run / FOLDER / "jobs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    recent = earlier[-(max_restarts + 1) :]
    if len(recent) > max_restarts and all(start["step"] == step for start in recent):
        raise TlearnError(
            f"{run}: {max_restarts + 1} starts in a row have brought no checkpoint behind step {step}; raise the time "
            "limit, save more often (save_every.steps), or see the errors of the ranks"
        )


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _goes_on(signal_name: str | None) -> bool:
    """Whether the job shall go on: the time limit comes (SIGUSR2), or another one takes its place.

    SIGTERM also comes of `scancel`, and when another rank has failed: then it stays stopped.
    """
    if is_local(os.environ):
        return signal_name in ("SIGUSR2", None)
    fields = slurm_fields(job_id(os.environ))
    preempted = fields.get("PreemptTime", "None") != "None"
    return fields.get("JobState") == "RUNNING" and (signal_name in ("SIGUSR2", None) or preempted)


def _queue_again() -> NoReturn:
    if is_local(os.environ):
        raise SystemExit(LOCAL_REQUEUE_RETURN_CODE)  # submitit's controller starts all of them again
    if _rank() == 0:
        subprocess.run(["scontrol", "requeue", job_id(os.environ)], check=True)
    _wait_for_the_end(VERDICT_S)
    raise SystemExit(1)


def _wait_for_the_end(seconds: float) -> None:
    """By Slurm, which ends the tasks of a job that is queued again or has failed."""
    with handled_by(signal.SIG_DFL):
        time.sleep(seconds)


@contextmanager
def _first_failure_named(place: Path) -> Iterator[None]:
    """Of ranks that fail because one did, none shall hide what that one had to say.

    The first leaves its error in a file before it ends, so before the others can lose it; no clock is compared. Where
    there is no such file a rank was killed: by Slurm's own verdict on the node the job is queued again, or it ends.
    """
    with handled_by(signal.SIG_IGN):  # submitit's would raise something of their own in the middle of this
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            raise SystemExit(_explain(error, place)) from None


def _explain(error: BaseException, place: Path) -> int:
    """Print why this rank ends; its exit code."""
    known = error if isinstance(error, EXPECTED) else refused(error)
    path = failure_file(place, os.environ)
    who = f"rank {_rank()} on {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}"
    advice = f"go on with: tlearn submit --run {place.parent}"
    if isinstance(error, StoppedBySignalError):
        print(error, file=sys.stderr, flush=True)
    elif known is not None or not _lost_a_peer(error):
        _leave(path, f"{who} failed:\n{f'tlearn: {known}' if known else traceback.format_exc()}")
    elif not _appears(path):
        print(f"{who} lost another rank, which was killed, or its node is gone: {error}", file=sys.stderr)
        print(f"Slurm queues the job again if it was the node; else {advice}", file=sys.stderr, flush=True)
        _wait_for_the_end(VERDICT_S)
    if path.exists():
        print(f"{path.read_text(encoding='utf-8').rstrip()}\n{advice}", file=sys.stderr, flush=True)
    return known.exit_code if known else 1


def _lost_a_peer(error: BaseException) -> bool:
    """Whether a rank failed because another one is gone. gloo raises plain RuntimeErrors."""
    of_torch = type(error).__name__.startswith("Dist")  # DistBackendError, DistStoreError, ...
    return isinstance(error, RuntimeError) and (of_torch or any(word in str(error) for word in _PEERS))


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + CULPRIT_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return path.exists()


def _leave(path: Path, text: str) -> None:
    """Write a file unless it is there already: whole or not at all, also on NFS."""
    draft = path.with_name(f".{path.name}.{_rank()}")
    draft.write_text(text, encoding="utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
