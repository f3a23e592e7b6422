"""Submitting without a Slurm: the environment of tasks, profiles, the sbatch file, local jobs, what a folder says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import reached, submitted, tasks, tlearn, wait_for, write_profile
from conftest import ROOT, TINY
from test_cli import run as cli
from test_distributed import EXACT, weights

from tlearn import checkpoint, jobs
from tlearn.checkpoint import Progress, State
from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.errors import TlearnError
from tlearn.launch import run_ranks
from tlearn.profile import Profile, load_profile
from tlearn.rendezvous import RENDEZVOUS, first_host, resolved
from tlearn.run import train
from tlearn.submit import _outside_of_jobs, sbatch_text, submit
from tlearn.task import _lost_a_peer, note_start

STEP = {
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "49491",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}
"""Of the second task on the second of three nodes."""


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],login", "gpu07"),
        ("127.0.0.[2-4]", "127.0.0.2"),
        ("a,b", "a"),
        ("node", "node"),
        ("rack[1-2]n[3,5]", "rack1n3"),
        ("n[3,5-7].cluster.org,m1", "n3.cluster.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_tasks_environment_follows_from_slurms() -> None:
    found = resolved(STEP)
    port = int(found.pop("MASTER_PORT"))
    assert 12_000 <= port < 20_000  # below the ports that the kernel gives out
    assert found == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "OMP_NUM_THREADS": "1",
    }
    assert resolved({**STEP, "SLURM_CPUS_PER_TASK": "6"})["OMP_NUM_THREADS"] == "6"
    assert resolved({**STEP, "SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    # tasks of one step agree, steps of one job do not meet
    assert resolved({**STEP, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == str(port)
    assert resolved({**STEP, "SLURM_STEP_ID": "3"})["MASTER_PORT"] != str(port)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {key: value for key, value in STEP.items() if key != "SLURM_STEP_ID"},  # a batch script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"},
        {**STEP, **dict.fromkeys(RENDEZVOUS, "1")},  # torchrun was here
    ],
)
def test_elsewhere_nothing_is_added(environment: dict[str, str]) -> None:
    assert resolved(environment) == {}


@pytest.mark.parametrize("name", [name for name in STEP if name != "SLURM_STEP_ID"])
def test_half_a_step_is_refused(name: str) -> None:
    with pytest.raises(TlearnError, match=f"{name}.*start tasks with srun"):
        resolved({key: value for key, value in STEP.items() if key != name})


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_profiles_are_valid_and_name_their_command(path: Path) -> None:
    profile = load_profile(path)
    assert f"--profile slurm/{path.name}" in path.read_text()
    text = sbatch_text(profile, Path("runs/x"))
    assert f"#SBATCH --ntasks-per-node={profile.processes_per_node}\n" in text
    assert f"#SBATCH --time={profile.time_min}\n" in text
    assert f"#SBATCH --signal=USR2@{profile.signal_delay_s}\n" in text
    assert "#SBATCH --requeue\n" in text


def test_every_option_of_a_profile_reaches_the_file(tmp_path: Path) -> None:
    profile = write_profile(
        tmp_path / "all.yaml",
        partition="gpu",
        account="us",
        qos="high",
        constraint="a100",
        nodes=3,
        gpus_per_node=4,
        cpus_per_task=7,
        mem="32G",
        time="1-02:03:04",
        signal_delay_s=33,
        setup=["module load cuda"],
        environment={"NCCL_SOCKET_IFNAME": "ib0", "ODD": "it's $HOME `id`; x"},
        container="apptainer exec image.sif",
        sbatch={"exclusive": True, "mail-type": "END"},
    )
    text = sbatch_text(load_profile(Path(profile)), tmp_path / "run", after="77")
    for line in (
        *("--partition=gpu", "--account=us", "--qos=high", "--constraint=a100", "--nodes=3", "--gpus-per-node=4"),
        *("--ntasks-per-node=4", "--cpus-per-task=7", "--mem=32G", "--time=1564", "--signal=USR2@33", "--exclusive"),
        *("--mail-type=END", "--dependency=afterok:77", "--kill-on-invalid-dep=yes", "--job-name=tlearn-run"),
    ):
        assert f"#SBATCH {line}\n" in text, line
    lines = text[text.index("set -e") :].splitlines()
    assert lines[1:5] == [
        "export PYTHONSAFEPATH=1",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export ODD='it'\"'\"'s $HOME `id`; x'",  # as it stands, not as a shell would read it
        "module load cuda",
    ]
    assert lines[5].startswith(f"export PYTHONPATH={tmp_path}/run/slurm/submission-")
    assert "--kill-on-bad-exit=1 --cpus-per-task=7 bash -c 'trap" in text
    assert " bash apptainer exec image.sif python -u -m submitit" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: x", r"p\.yaml:\n  partitoin: no such option; did you mean partition\?"),
        ("nodes: 0", r"nodes: Input should be greater than or equal to 1"),
        ("gpus_per_node: 1\ntasks_per_node: 2", "tasks_per_node: has no effect beside gpus_per_node"),
        ("time: soon", "time: is 'soon', should be like '1:30:00'"),
        ("time: 1:30:00", "time: needs quotes"),
        ("time: '0:00:00'", "time: is '0:00:00', which is no limit"),
        ("time: '2'", "signal_delay_s: 120 s are not before a limit of 2"),
        ("environment: {MY-VAR: x}", "environment: MY-VAR cannot be set here"),
        ("environment: {PYTHONPATH: x}", "environment: PYTHONPATH cannot be set here"),
        ("sbatch: {ntasks_per_node: 3}", "sbatch: ntasks_per_node follows from other options: partition"),
        ("- a", "holds a list, not options"),
        ("a: [", "not a valid YAML file"),
    ],
)
def test_a_bad_profile_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(TlearnError, match=message):
        load_profile(tmp_path / "p.yaml")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("1:30:00", 90), ("2-12", 3600), ("1-0:30", 1470), ("1-02:03:04", 1564)],
)
def test_a_time_is_what_sbatch_takes_it_for(text: str, minutes: int) -> None:
    assert Profile(time=text).time_min == minutes


def test_a_dry_run_is_quick_and_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from tlearn import cli; sys.argv[1:] = ['submit', 'data.path=x', '--run', 'r', '--dry-run']\n"
        "try: cli.main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "#SBATCH" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert list(tmp_path.iterdir()) == []


def test_restarts_without_progress_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    steps = iter([0, 0, 3, 3, 3])

    def save_and_start() -> None:
        if step := next(steps):
            checkpoint.save(tmp_path / "checkpoints", State({}, {}, Progress(step=step)), 2, None)
        note_start(tmp_path, 2)

    for _ in range(5):
        save_and_start()  # the third one that begins at step 3 is the second restart without a step
    steps = iter([3])
    with pytest.raises(TlearnError, match="3 starts in a row have brought no checkpoint behind step 3"):
        save_and_start()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    note_start(tmp_path, 2)  # a new job may try again


def test_without_slurm_the_folder_says_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TlearnError, match="holds no run"):
        jobs.status(tmp_path)
    for use in (lambda: list(jobs.logs(tmp_path, 0, follow=False)), lambda: jobs.cancel(tmp_path)):
        with pytest.raises(TlearnError, match="no job was submitted here"):
            use()
    step = {"kind": "step", "stage": "head", "epoch": 1, "step": 9, "train/loss": 0.5, "images_per_s": 3.0, "lr": {}}
    epoch = {"kind": "epoch", "step": 8, "val/top1@64": 0.7}
    torn = '{"kind": "st'
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(epoch)}\n{json.dumps(step)}\n{torn}")
    assert jobs.status(tmp_path) == {
        "run": str(tmp_path),
        **{key: step[key] for key in ("stage", "epoch", "step", "train/loss", "images_per_s")},
        "val/top1@64": 0.7,
        "finished": False,
    }
    (tmp_path / "slurm").mkdir()
    for name in ("submission.sh", "submitted.pkl"):
        (tmp_path / "slurm" / f"41_{name}").touch()
    assert jobs.status(tmp_path)["state"] == "unknown"
    with pytest.raises(TlearnError, match="job 41: not cancelled: scancel is not installed here"):
        jobs.cancel(tmp_path)
    (tmp_path / "slurm" / "41_2_log.err").write_text("hello")
    assert list(jobs.logs(tmp_path, 2, follow=True)) == ["hello"]


def test_the_end_of_a_long_file_is_read_from_a_whole_row_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "step", "step": i}) + "\n" for i in range(20_000)))
    assert [row["step"] for row in jobs._last_rows(path)] == list(range(20_000))  # no epoch yet
    with path.open("a") as file:
        file.write('{"kind": "epoch", "step": 20000}\n')
    found = [row["step"] for row in jobs._last_rows(path)]
    assert found == list(range(found[0], 20_001))
    assert 0 < found[0] < 19_000


@pytest.mark.slow
def test_a_local_job_is_the_same_job(photos: Path, tmp_path: Path) -> None:
    folder, whole = tmp_path / "a run's folder", tmp_path / "whole"
    profile = write_profile(tmp_path / "two.yaml", tasks_per_node=2, setup=["export DATA=$ROOT/data"])
    recipe = (*TINY, *EXACT, "model.batch_norm=frozen", "save_every.steps=5")
    run_ranks(train, (load_config(None, [f"data.path={photos}", *recipe]), whole), 2)
    environment = dict(os.environ)
    job = submitted(environment, f"data.path={photos}", *recipe, "--profile", profile, "--run", str(folder), "--local")
    assert json.loads(tlearn(environment, "status", str(folder), "--json").stdout)["state"] == "RUNNING"
    again = tlearn(environment, "submit", "--run", str(folder), "--local")
    assert f"job {job} is not over" in again.stderr
    wait_for(reached(folder, 10))
    for rank in tasks("SUBMITIT_LOCAL_JOB_ID", job):
        os.kill(rank, signal.SIGUSR2)  # as submitit does when the time is up
    assert "everything is saved" in tlearn(environment, "logs", str(folder), "--follow").stdout
    report = json.loads(tlearn(environment, "status", str(folder), "--json").stdout)
    assert (report["state"], report["restarts"], report["finished"]) == ("OVER", 1, True)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(folder)[name]), name


@pytest.mark.slow
def test_a_local_job_whose_rank_is_killed_ends(photos: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder, environment = tmp_path / "run", dict(os.environ)
    request.addfinalizer(lambda: tlearn(environment, "cancel", str(folder)))
    profile = write_profile(tmp_path / "two.yaml", tasks_per_node=2)
    options = [f"data.path={photos}", *TINY, "strategy=full", "epochs=900", "save_every.steps=5", "--profile", profile]
    job = submitted(environment, *options, "--run", str(folder), "--local")
    wait_for(reached(folder, 10))
    ranks = tasks("SUBMITIT_LOCAL_JOB_ID", job)
    os.kill(next(rank for rank in tasks("SUBMITIT_LOCAL_GLOBALID", "0") if rank in ranks), signal.SIGKILL)
    wait_for(lambda: jobs.state(folder, job) == "OVER", 30)
    failure = json.loads(tlearn(environment, "status", str(folder), "--json").stdout)["failure"]
    assert "rank 1" in failure
    assert "lost another rank, which was killed" in failure
    second = submitted(environment, "--run", str(folder), "--local")  # it goes on, with the same profile
    log = folder / "slurm" / f"{second}_0_log.err"
    wait_for(lambda: log.exists() and "resumed at step" in log.read_text())
    assert "is cancelled; go on with" in tlearn(environment, "cancel", str(folder)).stdout
    assert "everything is saved" in tlearn(environment, "logs", str(folder), "--follow").stdout
    assert "over already (OVER)" in tlearn(environment, "cancel", str(folder)).stderr


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("[gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: ib0"), False),
        (RuntimeError("shapes do not match"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # W&B's
    ],
)
def test_only_a_connection_that_broke_counts_as_a_lost_rank(error: Exception, lost: bool) -> None:
    assert _lost_a_peer(error) is lost


def test_submitting_from_inside_a_job_takes_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "1", "SLURM_CONF": "/x", "RANK": "0", "OTHER": "1"}
    for name, value in inside.items():
        monkeypatch.setenv(name, value)
    with _outside_of_jobs():
        assert {name: os.environ.get(name) for name in inside} == {
            **dict.fromkeys(inside),
            "SLURM_CONF": "/x",
            "OTHER": "1",
        }
    assert {name: os.environ[name] for name in inside} == inside


def test_a_refused_submission_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = load_config(None, ["data.path=x"])
    with pytest.raises(TlearnError, match="sbatch is not installed here"):
        submit(config, Profile(), tmp_path / "runs" / "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TlearnError, match="a ':' separates"):
        submit(config, Profile(), tmp_path / "a:b")


@pytest.mark.parametrize("options", [(), ("batch.micro=4", "--override")])
def test_what_was_ordered_goes_on_as_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    submission = tmp_path / "run" / "slurm" / "submission-20260101-000000"
    submission.mkdir(parents=True)
    (submission / "config.yaml").write_text("data: {path: x}\n")
    (submission / "profile.yaml").write_text("nodes: 1\n")
    (submission / "order.json").write_text(json.dumps({"quick": "quick_first", "given": ["epochs"]}))
    sent: list[tuple[Path, str | None, str | None, list[str]]] = []

    def send(config: Config, profile: Profile, run: Path, **given: Any) -> str:
        sent.append((run, given["after"], given["quick"], given["given"]))
        return f"{len(sent)}"

    monkeypatch.setattr("tlearn.submit.submit", send)
    assert cli(monkeypatch, "submit", *options, "--run", tmp_path / "run") == 0

    run = tmp_path / "run"
    assert sent == [(run / "quick", None, "quick", ["epochs"]), (run, "1", "quick_first", ["epochs"])]
    sent.clear()
    (tmp_path / "other.yaml").write_text("data: {path: x}\n")  # somebody wants it regardless
    assert cli(monkeypatch, "submit", tmp_path / "other.yaml", "--run", run) == 0
    assert [quick for _, _, quick, _ in sent] == [None]
