"""Submitting without a Slurm: the environment of tasks, profiles, the sbatch file, what a folder says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import write_profile
from conftest import ROOT

from tlearn import checkpoint, jobs
from tlearn.checkpoint import Progress, State
from tlearn.errors import TlearnError
from tlearn.profile import load_profile
from tlearn.rendezvous import RENDEZVOUS, first_host, resolved
from tlearn.submit import sbatch_text
from tlearn.task import note_start

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
        environment={"NCCL_SOCKET_IFNAME": "ib0"},
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
    assert 'module load cuda\nexport PYTHONSAFEPATH="1"\nexport PYTHONPATH="' in text
    assert 'export NCCL_SOCKET_IFNAME="ib0"' in text
    assert "--kill-on-bad-exit=1 --cpus-per-task=7 apptainer exec image.sif python -u -m submitit" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: x", r"p\.yaml:\n  partitoin: no such option; did you mean partition\?"),
        ("nodes: 0", r"nodes: Input should be greater than or equal to 1"),
        ("gpus_per_node: 1\ntasks_per_node: 2", "tasks_per_node: has no effect beside gpus_per_node"),
        ("time: soon", r"time = 'soon': should be \[days-\]hours:minutes"),
        ("- a", "holds a list, not options"),
        ("a: [", "not a valid YAML file"),
    ],
)
def test_a_bad_profile_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(TlearnError, match=message):
        load_profile(tmp_path / "p.yaml")


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
    found = [row["step"] for row in jobs._last_rows(path)]
    assert found == list(range(found[0], 20_000))
    assert 0 < found[0] < 19_000
