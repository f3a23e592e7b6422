"""`tlearn submit`: the same run as a Slurm job, one submitit task per rank, that is queued again until it is done.

RUN/slurm/config.yaml     the config as it was submitted
          code/tlearn/    the code as it was submitted
          jobs.jsonl      one line per start: job, restart, nodes, step
          JOB_*           submitit's: the sbatch file, what every rank printed
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError

import tlearn
from tlearn.config import Config
from tlearn.configfile import dump_config, load_config
from tlearn.errors import StoppedBySignalError, TlearnError
from tlearn.files import write_text
from tlearn.jobs import OVER, last_job, slurm_state
from tlearn.profile import Profile
from tlearn.rendezvous import from_slurm
from tlearn.signals import handled_by, stop

FOLDER = "slurm"
"""Inside the run folder."""


class _Executor(SlurmExecutor):  # type: ignore[misc]
    @classmethod
    def affinity(cls) -> int:
        """Also where there is no Slurm: an sbatch file can be shown anywhere."""
        return 1


def sbatch_text(config: Config, profile: Profile, run: Path, after: str | None = None) -> str:
    """The file that would be submitted."""
    executor = _executor(config, profile, run, after)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def submit(config: Config, profile: Profile, run: Path, after: str | None = None) -> str:
    """Submit a run.

    Args:
        config: the run.
        profile: the job.
        run: its folder, on a disk that all nodes see.
        after: a job that has to end well before this one starts.

    Returns:
        The job's id.

    Raises:
        TlearnError: no Slurm here, a job of this run that is not over, or what Slurm says of the request.
    """
    if shutil.which("sbatch") is None:
        raise TlearnError("sbatch is not installed here; submit on the cluster's login node, or look with --dry-run")
    earlier = last_job(run)
    if earlier is not None and slurm_state(earlier) not in (*OVER, "unknown"):
        raise TlearnError(f"{run}: job {earlier} is not over; tlearn cancel {run} ends it, or choose another --run")
    place = run / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place / "code", ignore_errors=True)
    shutil.copytree(
        Path(tlearn.__file__).parent, place / "code" / "tlearn", ignore=shutil.ignore_patterns("__pycache__")
    )
    write_text(place / "config.yaml", dump_config(config))
    try:
        job = _executor(config, profile, run, after).submit(
            run_task, str(place / "config.yaml"), str(run), profile.max_restarts
        )
    except FailedJobError as error:
        raise TlearnError(
            f"Slurm does not take the job: {str(error).strip().removeprefix('sbatch: error: ')}"
        ) from None
    job_id: str = job.job_id
    return job_id


def _executor(config: Config, profile: Profile, run: Path, after: str | None) -> SlurmExecutor:
    place = run.absolute() / FOLDER
    python = f"{profile.container} python" if profile.container else shlex.quote(sys.executable)
    executor = _Executor(place, python=python)
    # SAFEPATH: otherwise the code in the folder from which the job was submitted would come before the copy
    code = {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{place / 'code'}${{PYTHONPATH:+:$PYTHONPATH}}"}
    extra: dict[str, Any] = {"requeue": True, **profile.sbatch}
    if after is not None:
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    options = profile.model_dump(include={"partition", "account", "qos", "constraint", "gpus_per_node", "mem"})
    executor.update_parameters(
        job_name=f"tlearn-{run.name}",
        nodes=profile.nodes,
        ntasks_per_node=profile.processes_per_node,
        cpus_per_task=profile.cpus_per_task,
        time=profile.time_min,
        signal_delay_s=profile.signal_delay_s,
        setup=[*profile.setup, *(f'export {name}="{value}"' for name, value in (code | profile.environment).items())],
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={profile.cpus_per_task}"],
        additional_parameters=extra,
        **{name: value for name, value in options.items() if value is not None},
    )
    return executor


def run_task(config_file: str, run: str, max_restarts: int) -> Any:
    """What every task of the job does: train as a rank; on SIGUSR2 (the time limit, preemption) queue the job again.

    After SIGTERM it does not: that is `scancel`, or a preemption after which Slurm queues the job itself.
    """
    os.environ.update(from_slurm(os.environ))
    rank = int(os.environ.get("RANK") or 0)
    if rank == 0:
        _check_progress(Path(run), max_restarts)
    try:
        with handled_by(stop):
            from tlearn.run import train

            result = train(load_config(config_file), run)
            return result["val"]["top1"] if rank == 0 else None
    except StoppedBySignalError as stopped:
        if rank == 0:
            print(stopped, file=sys.stderr, flush=True)
        if stopped.signal not in ("SIGUSR2", None):
            raise SystemExit(stopped.exit_code) from None
        if rank == 0:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        with handled_by(signal.SIG_DFL):  # Slurm ends the tasks of a job that is queued again
            time.sleep(600)
        raise


def _check_progress(run: Path, max_restarts: int) -> None:
    """Note this start; raise where the last ones have brought nothing."""
    from tlearn import checkpoint

    newest = checkpoint.newest(run / "checkpoints")
    step = checkpoint.read_progress(newest).step if newest else 0
    jobs = run / FOLDER / "jobs.jsonl"
    before = [json.loads(line) for line in jobs.read_text().splitlines()] if jobs.exists() else []
    job = os.environ.get("SLURM_JOB_ID", "local")
    row = {
        "job": job,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "tasks": int(os.environ.get("WORLD_SIZE") or 1),
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with jobs.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    recent = [r for r in before if r["job"] == job][-(max_restarts + 1) :]
    if len(recent) > max_restarts and all(r["step"] == step for r in recent):
        raise TlearnError(
            f"{run}: {max_restarts + 1} starts in a row have brought no checkpoint behind step {step}; raise the time "
            "limit, save more often (save_every.steps), or see the errors of the ranks"
        )
