"""`tlearn submit`: the same run as a Slurm job, one submitit task per rank, that is queued again until it is done."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from submitit import LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError

import tlearn
from tlearn.config import Config
from tlearn.configfile import dump_config
from tlearn.console import show
from tlearn.errors import TlearnError
from tlearn.files import write_text
from tlearn.jobs import FOLDER, cancel, is_active, last_job, slurm_fields, state
from tlearn.profile import Profile, dump_profile
from tlearn.task import examine_task, train_task


class _Executor(SlurmExecutor):  # type: ignore[misc]
    @classmethod
    def affinity(cls) -> int:
        """Also where there is no Slurm: an sbatch file can be shown anywhere."""
        return 1


def sbatch_text(profile: Profile, run: Path, after: str | None = None) -> str:
    """The file that would be submitted."""
    executor = _slurm_executor(profile, run, after)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def submit(
    config: Config,
    profile: Profile,
    run: Path,
    *,
    after: str | None = None,
    local: bool = False,
    override: bool = False,
) -> str:
    """Submit a run.

    Args:
        config: the run.
        profile: the job.
        run: its folder, on a disk that all nodes see.
        after: a job that has to end well before this one starts.
        local: on this machine, without Slurm.
        override: a run that goes on may do so with other options, where that is safe.

    Returns:
        The job's id; of a local one the id of its process.

    Raises:
        TlearnError: no Slurm here, a job of this run that is not over, or what Slurm says of the request.
    """
    earlier = last_job(run)
    if earlier is not None and is_active(run, earlier):
        raise TlearnError(f"{run}: job {earlier} is not over; tlearn cancel {run} ends it, or choose another --run")
    executor = _local_executor(profile, run) if local else _slurm_executor(profile, run, after)
    _snapshot(profile, run)
    write_text(run / FOLDER / "config.yaml", dump_config(config))
    with _detached(run / FOLDER / "local.log") if local else nullcontext():
        return _sent(executor, train_task, str(run), profile.max_restarts, override)


def examined(profile: Profile, folder: Path) -> dict[str, Any]:
    """What `tlearn doctor` finds in a short job of this shape, which is waited for.

    Args:
        profile: the job.
        folder: on the disk that runs will use.

    Raises:
        TlearnError: no Slurm here, what it says of the request, or a job that left no report.
    """
    short = profile.model_copy(update={"time": "0:02:00", "signal_delay_s": 30})
    place = folder / time.strftime(f"doctor-%Y%m%d-%H%M%S-{os.getpid()}")
    executor = _slurm_executor(short, place, None)
    _snapshot(short, place)
    job = _sent(executor, examine_task, str(place))
    try:
        told = ""
        while is_active(place, job):
            fields = slurm_fields(job)
            if (news := f"{fields.get('JobState')}, {fields.get('Reason')}") != told:
                show(f"job {job}: {news}")
                told = news
            time.sleep(0.5)
    except BaseException:
        cancel(place)
        raise
    if not (place / "report.json").is_file():
        failures = [path.read_text(encoding="utf-8") for path in (place / FOLDER).glob("*_failure.txt")]
        cause = failures[0] if failures else "have the nodes that folder, and this Python?"
        raise TlearnError(f"{place / FOLDER}: job {job} is {state(place, job)} and left no report: {cause}")
    report: dict[str, Any] = json.loads((place / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(place)
    return report


@contextmanager
def _detached(log: Path) -> Iterator[None]:
    """Processes that are started inside go on when the terminal is closed, and nothing waits for their last word."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    mine = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with log.open("a") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        yield
    finally:
        for descriptor, saved in zip((1, 2), mine, strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)
        signal.signal(signal.SIGHUP, before)


def _snapshot(profile: Profile, run: Path) -> None:
    """The code and the profile as they are now: later edits do not change the job."""
    place = run / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(place / "code", ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(tlearn.__file__).parent, place / "code" / "tlearn", ignore=ignored)
    write_text(place / "profile.yaml", dump_profile(profile))


def _sent(executor: Any, function: Any, *arguments: Any) -> str:
    if isinstance(executor, SlurmExecutor) and shutil.which("sbatch") is None:
        raise TlearnError("sbatch is not installed here; submit on the cluster's login node, or try --local, --dry-run")
    try:
        job_id: str = executor.submit(function, *arguments).job_id
    except FailedJobError as error:
        words = dict.fromkeys(line.removeprefix("sbatch: error: ") for line in str(error).strip().splitlines())
        raise TlearnError(f"Slurm does not take the job: {'; '.join(words)}") from None
    return job_id


def _slurm_executor(profile: Profile, run: Path, after: str | None) -> SlurmExecutor:
    executor = _Executor(run.absolute() / FOLDER, python=_python(profile))
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
        setup=_setup(profile, run),
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={profile.cpus_per_task}"],
        additional_parameters=extra,
        **{name: value for name, value in options.items() if value is not None},
    )
    return executor


def _local_executor(profile: Profile, run: Path) -> LocalExecutor:
    if profile.nodes > 1:
        raise TlearnError(f"--local: is one machine, but the profile asks for nodes = {profile.nodes}")
    # not submitit's `setup`, with which it takes a shell's process id for the job's
    threads = f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{profile.cpus_per_task}}}"
    script = "\n".join([*_setup(profile, run), threads, 'exec "$@"'])
    python = f"{shlex.join(['bash', '-c', script, 'bash'])} {_python(profile)}"
    executor = LocalExecutor(run.absolute() / FOLDER, python=python)
    gpus = profile.gpus_per_node or 0
    visible = tuple(int(i) for i in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if i.isdecimal())
    if gpus > len(visible) > 0:
        raise TlearnError(f"--local: the profile asks for {gpus} GPUs, CUDA_VISIBLE_DEVICES has {len(visible)}")
    executor.update_parameters(
        tasks_per_node=profile.processes_per_node,
        gpus_per_node=gpus,
        visible_gpus=visible[:gpus],
        timeout_min=profile.time_min,
        signal_delay_s=profile.signal_delay_s,
    )
    return executor


def _python(profile: Profile) -> str:
    return f"{profile.container} python" if profile.container else shlex.quote(sys.executable)


def _setup(profile: Profile, run: Path) -> list[str]:
    """Shell lines before Python starts."""
    # SAFEPATH: otherwise the code in the folder from which the job was submitted would come before the copy
    code = f"{run.absolute() / FOLDER / 'code'}${{PYTHONPATH:+:$PYTHONPATH}}"
    variables = {"PYTHONSAFEPATH": "1", "PYTHONPATH": code, **profile.environment}
    return [*profile.setup, *(f'export {name}="{value}"' for name, value in variables.items())]
