"""`tlearn submit`: the same run as a Slurm job, one submitit task per rank, that is queued again until it is done."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import Any, Literal

from submitit import LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError

import tlearn
from tlearn.apart import Job
from tlearn.config import Config
from tlearn.configfile import dump_options, given_options
from tlearn.console import show
from tlearn.errors import TlearnError
from tlearn.files import write_json, write_text
from tlearn.jobs import FOLDER, ORDER, OVER, cancel, is_active, last_job, new_submission, slurm_fields, state, status
from tlearn.profile import Profile, dump_profile
from tlearn.rendezvous import RENDEZVOUS
from tlearn.task import examine_task, train_task

_LOOK_AGAIN_S = 2.0
"""At jobs that are waited for."""


class _Executor(SlurmExecutor):  # type: ignore[misc]
    @classmethod
    def affinity(cls) -> int:
        """Also where there is no Slurm: an sbatch file can be shown anywhere."""
        return 1


def sbatch_text(profile: Profile, run: Path, after: str | None = None) -> str:
    """The file that would be submitted."""
    executor = _slurm_executor(profile, run, new_submission(run), after)
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
    quick: Literal["quick", "quick_first"] | None = None,
    given: Collection[str] = (),
) -> str:
    """Submit a run.

    Args:
        config: the run.
        profile: the job.
        run: its folder, on a disk that all nodes see.
        after: a job that has to end well before this one starts.
        local: on this machine, without Slurm.
        override: a run that goes on may do so with other options, where that is safe.
        quick: what decides on a run, or that, and the run on a go; None: the run.
        given: options that a quick run leaves as they are.

    Returns:
        The job's id; of a local one the id of its process.

    Raises:
        TlearnError: no Slurm here, a job of this run that is not over, or what Slurm says of the request.
    """
    earlier = last_job(run)
    if earlier is not None and state(run, earlier) == "COMPLETING":
        raise TlearnError(f"{run}: Slurm is still tidying up after job {earlier}; try again in a minute")
    if after is not None and slurm_fields(after).get("JobState") == "OVER":
        raise TlearnError(f"--after {after}: Slurm knows no such job")
    if earlier is not None and is_active(run, earlier):
        raise TlearnError(f"{run}: job {earlier} is not over; tlearn cancel {run} ends it, or choose another --run")
    with _snapshot(profile, run) as code:
        executor = _local_executor(profile, run, code) if local else _slurm_executor(profile, run, code, after)
        # not all options: to `strategy: auto` what has a value is given
        write_text(code / "config.yaml", dump_options(given_options(config)))
        write_json(code / ORDER, {"quick": quick, "given": sorted(given)})
        with _detached(run / FOLDER / "local.log") if local else nullcontext():
            return _sent(executor, train_task, str(run), str(code / "config.yaml"), profile.max_restarts, override)


def train_in_jobs(who: str, runs: Sequence[Job], profile: Profile) -> int:
    """Submit runs, a job each, and wait until all are over; those that an earlier call has submitted are not again.

    Args:
        who: speaks.
        runs: none of them finished; what fails stops no other.
        profile: of each job.

    Returns:
        How many failed.

    Raises:
        TlearnError: as `submit`; what was submitted before goes on.
    """
    for run in runs:
        earlier = last_job(run.folder)
        if earlier is None or not is_active(run.folder, earlier):
            show(f"{who:<9} {run.name}, seed {run.seed}: job {submit(run.config, profile, run.folder)}, {run.folder}")
    waiting, failed = list(runs), 0
    while waiting:
        time.sleep(_LOOK_AGAIN_S)
        for run in [run for run in waiting if state(run.folder, last_job(run.folder) or "") in OVER]:
            waiting.remove(run)
            failed += not run.is_finished
            outcome = run.outcome() if run.is_finished else f"FAILED ({status(run.folder).get('failure', 'no result')})"
            show(f"{who:<9} {run.name}, seed {run.seed}: {outcome}; {len(waiting)} left")
    return failed


def examined(profile: Profile, folder: Path) -> dict[str, Any]:
    """What `tlearn doctor` finds in a short job of this shape, which is waited for.

    Args:
        profile: the job.
        folder: on the disk that runs will use.

    Raises:
        TlearnError: no Slurm here, what it says of the request, or a job that left no report.
    """
    short = profile.model_copy(update={"time": "0:05:00", "signal_delay_s": 60})
    place = folder / time.strftime(f"doctor-%Y%m%d-%H%M%S-{os.getpid()}")
    with _snapshot(short, place) as code:
        job = _sent(_slurm_executor(short, place, code, None), examine_task, str(place))
    told = ""
    try:
        while (news := state(place, job)) not in OVER:
            if news != told:
                show(f"job {job}: {news}")
            told = news
            time.sleep(1)
    finally:
        with suppress(TlearnError):
            cancel(place)
    if not (place / "report.json").is_file():
        failures = [path.read_text(encoding="utf-8") for path in (place / FOLDER).glob("*_failure.txt")]
        cause = failures[0] if failures else "have the nodes that folder, and this Python?"
        raise TlearnError(f"{place / FOLDER}: job {job} is {news} and left no report: {cause}")
    report: dict[str, Any] = json.loads((place / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(place)
    return report


@contextmanager
def _snapshot(profile: Profile, run: Path) -> Iterator[Path]:
    """A new folder with the code and the profile as they are now; gone again where nothing comes of the submission."""
    found = [run, *run.parents]
    new = [path for path in found if not path.exists()]
    code = new_submission(run)
    code.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(tlearn.__file__).parent, code / "tlearn", ignore=ignored)
    write_text(code / "profile.yaml", dump_profile(profile))
    try:
        yield code
    except BaseException:
        shutil.rmtree(new[-1] if new else code)
        raise


def _sent(executor: Any, function: Any, *arguments: Any) -> str:
    if isinstance(executor, SlurmExecutor) and shutil.which("sbatch") is None:
        raise TlearnError("sbatch is not installed here; submit on the cluster's login node, or try --local, --dry-run")
    try:
        with _outside_of_jobs(), redirect_stderr(io.StringIO()):  # submitit shows there what the error has too
            job_id: str = executor.submit(function, *arguments).job_id
    except FailedJobError as error:
        words = dict.fromkeys(line.removeprefix("sbatch: error: ") for line in str(error).strip().splitlines())
        raise TlearnError(f"Slurm does not take the job: {'; '.join(words)}") from None
    return job_id


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """A job that is submitted from inside of another one must not take over what that one was given."""
    inside = "SLURM_JOB_ID" in os.environ
    names = [n for n in os.environ if inside and n != "SLURM_CONF" and (n.startswith("SLURM") or n in RENDEZVOUS)]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


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


def _slurm_executor(profile: Profile, run: Path, code: Path, after: str | None) -> SlurmExecutor:
    executor = _Executor(run.resolve() / FOLDER, python=_python(profile, []))
    extra: dict[str, Any] = {
        "requeue": True,
        **{key: value for key, value in profile.sbatch.items() if value is not False},
    }
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
        setup=_setup(profile, code),
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={profile.cpus_per_task}"],
        additional_parameters=extra,
        **{name: value for name, value in options.items() if value is not None},
    )
    return executor


def _local_executor(profile: Profile, run: Path, code: Path) -> LocalExecutor:
    if profile.nodes > 1:
        raise TlearnError(f"--local: is one machine, but the profile asks for nodes = {profile.nodes}")
    # not submitit's `setup`, with which it takes a shell's process id for the job's
    executor = LocalExecutor(run.resolve() / FOLDER, python=_python(profile, _setup(profile, code)))
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


def _python(profile: Profile, setup: list[str]) -> str:
    # SIGUSR2 is ignored until Python handles it: by default it would end a task that has hardly begun
    script = "\n".join([*setup, "trap '' USR2", 'exec "$@"'])
    python = f"{profile.container} python" if profile.container else shlex.quote(sys.executable)
    return f"{shlex.join(['bash', '-c', script, 'bash'])} {python}"


def _setup(profile: Profile, code: Path) -> list[str]:
    """Shell lines before Python starts; the first that fails ends the job."""
    variables = {"PYTHONSAFEPATH": "1"} | profile.environment  # or the folder of the submission would come first
    if ":" in str(code.resolve()):
        raise TlearnError(f"--run {code.parent.parent}: a ':' separates the folders of PYTHONPATH; choose another name")
    return [
        "set -e",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *profile.setup,
        f"export PYTHONPATH={shlex.quote(str(code.resolve()))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{profile.cpus_per_task}}}",
    ]
