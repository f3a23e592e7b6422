"""On a real Slurm: three nodes on this machine, started for these tests by slurm/dev-cluster.sh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_distributed import EXACT, rows, weights

from tlearn import checkpoint, jobs
from tlearn.checkpoint import Progress, State
from tlearn.configfile import load_config
from tlearn.errors import TlearnError
from tlearn.launch import run_ranks
from tlearn.profile import load_profile
from tlearn.rendezvous import RENDEZVOUS, first_host, from_slurm
from tlearn.run import train
from tlearn.submit import _check_progress, sbatch_text

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
    found = from_slurm(STEP)
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
    assert from_slurm({**STEP, "SLURM_CPUS_PER_TASK": "6"})["OMP_NUM_THREADS"] == "6"
    assert from_slurm({**STEP, "SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    # tasks of one step agree, steps of one job do not meet
    assert from_slurm({**STEP, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == str(port)
    assert from_slurm({**STEP, "SLURM_STEP_ID": "3"})["MASTER_PORT"] != str(port)


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
    assert from_slurm(environment) == {}


@pytest.mark.parametrize("name", [name for name in STEP if name != "SLURM_STEP_ID"])
def test_half_a_step_is_refused(name: str) -> None:
    with pytest.raises(TlearnError, match=f"{name}.*start tasks with srun"):
        from_slurm({key: value for key, value in STEP.items() if key != name})


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """The environment of its clients."""
    if shutil.which("sbatch") is None or shutil.which("munged", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        needed = "slurm" in os.environ.get("TLEARN_REQUIRE", "").split(",")
        (pytest.fail if needed else pytest.skip)("Slurm is not installed: apt-get install slurm-wlm munge")
    script = ROOT / "slurm" / "dev-cluster.sh"
    environment = {**os.environ, "TLEARN_SLURM_DIR": f"/tmp/tlearn-slurm-test-{os.getpid()}"}
    up = subprocess.run([script, "up"], env=environment, capture_output=True, text=True, check=False)
    try:
        assert up.returncode == 0, up.stderr
        name, _, value = up.stdout.strip().removeprefix("export ").partition("=")
        yield {**environment, name: value}
    finally:
        subprocess.run([script, "down"], env=environment, check=True)


def srun(cluster: dict[str, str], options: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    """A program of ours in every task."""
    return subprocess.run(
        ["srun", "--mem-per-cpu=1000", "--kill-on-bad-exit=1", *options, sys.executable, "-m", "tlearn", *command],
        env={**cluster, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


LAYOUTS = {"1 node of 2": ["-N1", "-n2"], "2 nodes of 1": ["-N2", "-n2"], "2 nodes of 2": ["-N2", "-n4"]}
RECIPE = (*TINY, *EXACT, "model.batch_norm=frozen")


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same run by `--nproc`."""
    root, runs = tmp_path_factory.mktemp("nproc"), dict[int, Path]()

    def by(world_size: int) -> Path:
        if world_size not in runs:
            config = load_config(None, [f"data.path={photos}", *RECIPE])
            runs[world_size] = root / str(world_size)
            run_ranks(train, (config, runs[world_size]), world_size)
        return runs[world_size]

    return by


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tasks_of_a_step_train_what_nproc_trains(
    cluster: dict[str, str], whole: Callable[[int], Path], photos: Path, tmp_path: Path, layout: str
) -> None:
    options = LAYOUTS[layout]
    done = srun(cluster, options, "train", f"data.path={photos}", *RECIPE, "--run", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    other = whole(int(options[1][2:]))
    for key in ("step", "batch_hash", "lr", "train/loss"):
        assert [row[key] for row in rows(tmp_path / "run", "step")] == [row[key] for row in rows(other, "step")]
    for name, tensor in weights(other).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["world_size"] == int(options[1][2:])


@pytest.mark.slow
def test_a_run_stopped_under_slurm_goes_on_with_other_nodes(
    cluster: dict[str, str], whole: Callable[[int], Path], photos: Path, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", [f"data.path={photos}", *RECIPE, "save_every.steps=5"]
    command = ["srun", "--mem-per-cpu=1000", "-N2", "-n2", sys.executable, "-m", "tlearn", "train", *options]
    process = subprocess.Popen([*command, "--run", str(run)], env=cluster, stderr=subprocess.PIPE, text=True)
    while not (run / "checkpoints" / "step-00000010").exists() and process.poll() is None:
        time.sleep(0.02)
    job = subprocess.run(
        ["squeue", "--noheader", "--format=%A"], env=cluster, capture_output=True, text=True, check=True
    )
    subprocess.run(["scancel", "--signal=USR2", job.stdout.strip()], env=cluster, check=True)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "stopped by SIGUSR2, everything is saved" in told
    done = srun(cluster, ["-N1", "-n3"], "train", "--run", str(run))
    assert done.returncode == 0, done.stderr
    for key in ("step", "batch_hash", "lr"):
        assert [row[key] for row in rows(run, "step")] == [row[key] for row in rows(whole(2), "step")]
    losses = [[row["train/loss"] for row in rows(folder, "step")] for folder in (run, whole(2))]
    np.testing.assert_allclose(*losses, rtol=1e-9)


@pytest.mark.slow
def test_doctor_sees_all_tasks(cluster: dict[str, str]) -> None:
    done = srun(cluster, ["-N3", "--ntasks-per-node=2"], "doctor", "--json")
    report: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert report["world_size"] == 6
    assert report["all_reduce"]["sum"] == report["all_reduce"]["expected"]
    assert {rank["environment"]["LOCAL_RANK"] for rank in report["ranks"]} == {"0", "1"}


@pytest.mark.slow
def test_more_tasks_than_asked_for_are_refused(cluster: dict[str, str], photos: Path, tmp_path: Path) -> None:
    options = [f"data.path={photos}", *TINY, "--run", str(tmp_path / "run")]
    done = srun(cluster, ["-N1", "-n2"], "train", *options, "--nproc", "3")
    assert done.returncode == 2
    assert "--nproc 3: the launcher has started 2 processes" in done.stderr


# submit


def submit(cluster: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tlearn", "submit", *arguments], env=cluster, capture_output=True, text=True, check=False
    )


def tool(cluster: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that is over at once."""
    command = [sys.executable, "-m", "tlearn", *arguments]
    return subprocess.run(command, env=cluster, capture_output=True, text=True, check=False, timeout=30)


def states(cluster: dict[str, str], job: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], env=cluster, capture_output=True, text=True, check=True)
    return shown.stdout.partition("JobState=")[2].split()[0]


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write_profile(path: Path, **options: Any) -> str:
    path.write_text(json.dumps({"cpus_per_task": 1, "mem": "2G", "environment": {"OMP_NUM_THREADS": "1"}, **options}))
    return str(path)


@pytest.mark.slow
def test_a_job_that_is_told_to_save_is_queued_again_and_ends_as_if_nothing_had_happened(
    cluster: dict[str, str], whole: Callable[[int], Path], photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    profile = write_profile(tmp_path / "two.yaml", nodes=2, tasks_per_node=1, sbatch={"hold": True})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{path: {photos}}}\n")
    done = submit(cluster, str(recipe), *RECIPE, "save_every.steps=5", "--profile", profile, "--run", str(run))
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    again = submit(cluster, "--profile", profile, "--run", str(run))  # it would take the code from under the first
    assert (again.returncode, again.stdout) == (2, "")
    assert f"job {job} is not over; tlearn cancel" in again.stderr
    recipe.write_text("data: {path: elsewhere}\n")  # later edits do not matter
    with (run / "slurm" / "code" / "tlearn" / "__init__.py").open("a") as file:
        file.write("\nimport sys; print('as it was submitted', file=sys.stderr)\n")
    subprocess.run(["scontrol", "release", job], env=cluster, check=True)
    wait_for((run / "checkpoints" / "step-00000010").exists)
    subprocess.run(["scancel", "--signal=USR2", job], env=cluster, check=True)
    wait_for(lambda: states(cluster, job) == "COMPLETED")
    starts = [json.loads(line) for line in (run / "slurm" / "jobs.jsonl").read_text().splitlines()]
    assert [(start["job"], start["restart"], start["tasks"]) for start in starts] == [(job, 0, 2), (job, 1, 2)]
    assert starts[1]["step"] >= 10
    printed = (run / "slurm" / f"{job}_0_log.err").read_text()
    assert printed.count("as it was submitted") == 2
    assert "stopped by SIGUSR2, everything is saved" in printed
    for key in ("step", "batch_hash", "lr", "train/loss"):
        assert [row[key] for row in rows(run, "step")] == [row[key] for row in rows(whole(2), "step")]
    for name, tensor in weights(whole(2)).items():
        assert torch.equal(tensor, weights(run)[name]), name


@pytest.mark.slow
def test_a_job_that_is_cancelled_saves_and_stays_away(cluster: dict[str, str], photos: Path, tmp_path: Path) -> None:
    run, profile = tmp_path / "run", write_profile(tmp_path / "one.yaml")
    options = [f"data.path={photos}", *TINY, "strategy=full", "epochs=900", "save_every.steps=5"]
    job = submit(cluster, *options, "--profile", profile, "--run", str(run)).stdout.strip()
    wait_for((run / "checkpoints" / "step-00000010").exists)
    looked = tool(cluster, "status", str(run), "--json")
    report = json.loads(looked.stdout)
    assert (report["job"], report["state"], report["stage"], report["finished"]) == (job, "RUNNING", "all", False)
    assert (report["restarts"], report["processes"]) == (0, 1)
    assert report["step"] >= 10
    assert "step-" in report["checkpoint"]
    assert "run folder" not in tool(cluster, "logs", str(run)).stdout
    assert f"job {job} is cancelled" in tool(cluster, "cancel", str(run)).stdout
    wait_for(lambda: "everything is saved" in (run / "slurm" / f"{job}_0_log.err").read_text())
    wait_for(lambda: states(cluster, job) == "CANCELLED")
    time.sleep(3)
    assert states(cluster, job) == "CANCELLED"
    assert "everything is saved" in tool(cluster, "logs", str(run), "-f").stdout
    assert "not there; job" in tool(cluster, "logs", str(run), "--rank", "7").stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mem": "900G"}, "Memory specification can not be satisfied"),
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"constraint": "a100"}, "Invalid feature specification"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_words(
    cluster: dict[str, str], photos: Path, tmp_path: Path, options: dict[str, str], words: str
) -> None:
    profile = write_profile(tmp_path / "p.yaml", **options)
    done = submit(cluster, f"data.path={photos}", "--profile", profile, "--run", str(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "one_gpu"])
def test_slurm_accepts_what_a_dry_run_prints(cluster: dict[str, str], photos: Path, tmp_path: Path, name: str) -> None:
    profile = tmp_path / "p.yaml"  # the fake nodes have less
    profile.write_text((ROOT / "slurm" / f"{name}.yaml").read_text().replace("32G", "4G").replace("task: 8", "task: 4"))
    shown = submit(
        cluster, f"data.path={photos}", "--profile", str(profile), "--run", str(tmp_path / "run"), "--dry-run"
    )
    (tmp_path / "job.sh").write_text(shown.stdout)
    tested = subprocess.run(
        ["sbatch", "--test-only", tmp_path / "job.sh"], env=cluster, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_profiles_are_valid_and_name_their_command(path: Path) -> None:
    profile = load_profile(path)
    assert f"--profile slurm/{path.name}" in path.read_text()
    text = sbatch_text(load_config(None, ["data.path=x"]), profile, Path("runs/x"))
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
    text = sbatch_text(load_config(None, ["data.path=x"]), load_profile(Path(profile)), tmp_path / "run", after="77")
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
        _check_progress(tmp_path, 2)

    for _ in range(5):
        save_and_start()  # the third one that begins at step 3 is the second restart without a step
    steps = iter([3])
    with pytest.raises(TlearnError, match="3 starts in a row have brought no checkpoint behind step 3"):
        save_and_start()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    _check_progress(tmp_path, 2)  # a new job may try again


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
    (tmp_path / "slurm" / "41_submission.sh").touch()
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
