"""What every task of a submitted job does: train as a rank, be queued again after a save, name the rank that failed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

from tlearn.configfile import load_config
from tlearn.errors import EXPECTED, StoppedBySignalError, TlearnError, refused
from tlearn.jobs import FOLDER, failure_file, read_order, read_starts, slurm_fields
from tlearn.rendezvous import is_local, job_id, resolved
from tlearn.signals import handled_by, stop

CULPRIT_S = 10.0
"""So long a rank that lost another one looks for what that one left."""

VERDICT_S = 1800.0
"""So long it then leaves it to Slurm to find out that a node is gone: SlurmdTimeout is 300 s by default."""

_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say of a process that is no more."""


def train_task(run: str, config: str, max_restarts: int, override: bool) -> None:
    """Train what a config file and the order beside it say; when told to stop while the job goes on, have it queued
    again."""
    with _as_a_rank(Path(run) / FOLDER):
        try:
            with handled_by(stop):
                if _rank() == 0:
                    note_start(Path(run), max_restarts)
                code = _trained(run, Path(config), override)
        except StoppedBySignalError as stopped:
            if _rank() > 0 and not is_local(os.environ):
                _wait_for_the_end(VERDICT_S)  # that rank 0 brings about
            if not _goes_on(stopped.signal):
                raise
            if _rank() == 0:
                print(f"{str(stopped).partition(';')[0]}; the job is queued again", file=sys.stderr, flush=True)
            if is_local(os.environ):
                raise SystemExit(LOCAL_REQUEUE_RETURN_CODE) from None  # submitit's controller starts all of them again
            subprocess.run(["scontrol", "requeue", job_id(os.environ)], check=True)
            _wait_for_the_end(VERDICT_S)
        else:
            if code:  # jobs that wait for a good end are not to begin
                raise SystemExit(code)


def _trained(run: str, file: Path, override: bool) -> int:
    """The exit code of what was done."""
    from tlearn.runtime import leave

    config, order = load_config(file), read_order(file.parent)
    if order["quick"] is None:
        from tlearn.run import train

        train(config, run, override=override)
        leave()
        return 0
    from tlearn import quick
    from tlearn.verdict import EXIT_CODES

    report = getattr(quick, order["quick"])(config, order["given"], run, override=override)
    leave()
    return EXIT_CODES[report["verdict"]]


def examine_task(folder: str) -> None:
    """`tlearn doctor` in a job; rank 0 leaves the report."""
    with _as_a_rank(Path(folder) / FOLDER), handled_by(stop):
        from tlearn.doctor import examine
        from tlearn.files import write_json
        from tlearn.runtime import leave

        report = examine(Path(folder))
        if _rank() == 0:
            write_json(Path(folder) / "report.json", report)
        leave()


def note_start(run: Path, max_restarts: int) -> None:
    """Add a line to jobs.jsonl.

    Raises:
        TlearnError: the last starts of this job have brought no checkpoint.
    """
    # not whether it is whole: that takes long, and is looked at when it is read
    step = max((int(path.name[5:13]) for path in (run / "checkpoints").glob("step-*")), default=0)
    job = job_id(os.environ)
    earlier = [start for start in read_starts(run) if start["job"] == job]
    row = {
        "job": job,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or len(earlier)),
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
    """Whether the job is to come again: its time limit comes (SIGUSR2), or another one takes its place.

    SIGTERM also comes of `scancel`, and when another rank has failed: then it stays stopped.
    """
    if is_local(os.environ):
        return signal_name != "SIGTERM"
    fields = slurm_fields(job_id(os.environ))
    preempted = fields.get("PreemptTime", "None") != "None"
    is_wanted = fields.get("JobState", "RUNNING") == "RUNNING"  # where Slurm does not answer, too
    if shutil.which("scontrol") is None:
        print("scontrol is not to be had here (in the container?), by which the job is queued again", file=sys.stderr)
        return False
    return is_wanted and (signal_name in ("SIGUSR2", None) or preempted)


def _wait_for_the_end(seconds: float) -> None:
    """By Slurm, which ends the tasks of a job that is queued again or has failed."""
    with handled_by(signal.SIG_DFL):
        time.sleep(seconds)
    raise SystemExit(1)


@contextmanager
def _as_a_rank(place: Path) -> Iterator[None]:
    """One of several: of ranks that fail because one did, none shall hide what that one had to say.

    The first leaves its error in a file before it ends, so before the others can lose it; no clock is compared. Where
    there is no such file a rank was killed: by Slurm's own verdict on the node the job is queued again, or it ends.
    """
    with handled_by(signal.SIG_IGN):  # submitit's handlers would queue the job again by themselves
        try:
            os.environ.update(resolved(os.environ))
            yield
        except SystemExit:
            raise
        except BaseException as error:
            raise SystemExit(_explain(error, place)) from None


def _explain(error: BaseException, place: Path) -> int:
    """Print why this rank ends, once the others cannot take it for their own fault; its exit code."""
    known = error if isinstance(error, EXPECTED) else refused(error)
    path = failure_file(place, os.environ)
    who = f"rank {_rank()} on {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}"
    advice = f"go on with: tlearn submit --run {shlex.quote(str(place.parent))}"
    text = f"{who} failed:\n{f'tlearn: {known}' if known else traceback.format_exc().rstrip()}"
    if isinstance(error, StoppedBySignalError):
        text = str(error)
    elif _lost_a_peer(error) and not _appears(path):
        text = f"{who} lost another rank, which was killed, or its node is gone: {error}"
        if not is_local(os.environ):
            print(f"{text}\nSlurm queues the job again if it was the node; else {advice}", file=sys.stderr, flush=True)
            _wait_for_the_end(VERDICT_S)
    if not isinstance(error, StoppedBySignalError):
        _leave(path, text)
    if path.exists():
        text = f"{path.read_text(encoding='utf-8')}\n{advice}"
    print(text, file=sys.stderr, flush=True)
    if is_local(os.environ) and not isinstance(error, StoppedBySignalError):
        os.kill(int(job_id(os.environ)), signal.SIGTERM)  # submitit's controller waits for all; it passes this on
    return known.exit_code if known else 1


def _lost_a_peer(error: BaseException) -> bool:
    """Whether a rank failed because another one is gone. gloo raises plain RuntimeErrors."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE)


def _appears(path: Path) -> bool:
    """Within CULPRIT_S; by a listing, since NFS remembers for a while that a file was not there."""
    deadline = time.monotonic() + CULPRIT_S
    while path not in path.parent.iterdir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _leave(path: Path, text: str) -> None:
    """Write a file unless it is there already: whole or not at all, also on NFS."""
    draft = path.with_name(f".{path.name}.{_rank()}")
    with suppress(OSError):  # also FileExistsError: another rank was first. And the disk itself may be the trouble
        draft.write_text(text, encoding="utf-8")
        os.link(draft, path)
    draft.unlink(missing_ok=True)
