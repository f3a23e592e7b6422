"""On a real Slurm: three nodes on this machine, started for these tests by slurm/dev-cluster.sh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster import (
    Cluster,
    frozen,
    last_code,
    power_off,
    reached,
    run,
    slurm,
    srun,
    state,
    submitted,
    tasks,
    tlearn,
    wait_for,
    write_profile,
)
from conftest import ROOT, TINY
from test_distributed import EXACT, rows, weights
from test_quick import RECIPE as QUICKLY
from test_quick import shuffled

from tlearn.configfile import load_config
from tlearn.data.prepare import prepare
from tlearn.jobs import last_job, read_starts
from tlearn.launch import run_ranks
from tlearn.run import train

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "slurm" / "dev-cluster.sh"
RECIPE = (*TINY, *EXACT, "model.batch_norm=frozen", "save_every.steps=5")
"""56 steps."""
ENDLESS = (*TINY, "strategy=full", "epochs=900", "save_every.steps=5")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The environment of its clients."""
    if shutil.which("sbatch") is None or shutil.which("munged", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        needed = "slurm" in os.environ.get("TLEARN_REQUIRE", "").split(",")
        (pytest.fail if needed else pytest.skip)("Slurm is not installed: apt-get install slurm-wlm munge")
    environment = {**os.environ, "TLEARN_SLURM_DIR": f"/tmp/tlearn-slurm-test-{os.getpid()}"}
    up = subprocess.run([SCRIPT, "up"], env=environment, capture_output=True, text=True, check=False)
    try:
        assert up.returncode == 0, up.stderr
        name, _, value = up.stdout.strip().removeprefix("export ").partition("=")
        yield {**environment, name: value}
    finally:
        subprocess.run([SCRIPT, "down"], env=environment, check=True)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The same run by `--nproc`, which nobody touched."""
    root, runs = tmp_path_factory.mktemp("nproc"), dict[int, Path]()

    def by(world_size: int) -> Path:
        if world_size not in runs:
            config = load_config(None, [f"data.path={photos}", *RECIPE])
            runs[world_size] = root / str(world_size)
            run_ranks(train, (config, runs[world_size]), world_size)
        return runs[world_size]

    return by


def assert_same(folder: Path, other: Path) -> None:
    """Every batch, rate and loss, and the weights, to the last bit."""
    for key in ("step", "batch_hash", "lr", "train/loss"):
        assert [row[key] for row in rows(folder, "step")] == [row[key] for row in rows(other, "step")]
    for name, tensor in weights(other).items():
        assert torch.equal(tensor, weights(folder)[name]), name


# srun

LAYOUTS = {"1 node of 2": ["-N1", "-n2"], "2 nodes of 1": ["-N2", "-n2"], "2 nodes of 2": ["-N2", "-n4"]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tasks_of_a_step_train_what_nproc_trains(
    cluster: Cluster, whole: Callable[[int], Path], photos: Path, tmp_path: Path, layout: str
) -> None:
    options = LAYOUTS[layout]
    command = ["-m", "tlearn", "train", f"data.path={photos}", *RECIPE, "--run", str(tmp_path / "run")]
    done = srun(cluster, options, *command)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", whole(int(options[1][2:])))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["world_size"] == int(options[1][2:])


def test_a_run_stopped_under_slurm_goes_on_with_other_nodes(
    cluster: Cluster, whole: Callable[[int], Path], photos: Path, tmp_path: Path
) -> None:
    folder, options = tmp_path / "run", [f"data.path={photos}", *RECIPE]
    command = [
        "srun",
        "--job-name=python",
        "--mem-per-cpu=1000",
        "-N2",
        "-n2",
        sys.executable,
        "-m",
        "tlearn",
        "train",
        *options,
    ]
    process = subprocess.Popen([*command, "--run", str(folder)], env=cluster, stderr=subprocess.PIPE, text=True)
    reached_10 = reached(folder, 10)
    wait_for(lambda: reached_10() or process.poll() is not None)
    job = slurm(cluster, "squeue", "--noheader", "--name=python", "--format=%A").strip()
    slurm(cluster, "scancel", "--signal=USR2", job)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "stopped by SIGUSR2, everything is saved" in told
    done = srun(cluster, ["-N1", "-n3"], "-m", "tlearn", "train", "--run", str(folder))
    assert done.returncode == 0, done.stderr
    for key in ("step", "batch_hash", "lr"):
        assert [row[key] for row in rows(folder, "step")] == [row[key] for row in rows(whole(2), "step")]
    losses = [[row["train/loss"] for row in rows(where, "step")] for where in (folder, whole(2))]
    np.testing.assert_allclose(*losses, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "seen", "local"),
    [
        (["--gpus-per-node=2"], ["0,1", "0,1"], ["0", "1"]),  # each takes its own of the two
        (["--gpus-per-task=1"], ["0", "1"], ["0", "0"]),  # each sees its own only
        (["--gpus-per-node=2", "--gpu-bind=single:1"], ["0", "1"], ["0", "0"]),
        ([], [None, None], ["0", "1"]),
    ],
)
def test_a_rank_takes_its_own_of_the_devices_that_it_sees(
    cluster: Cluster, options: list[str], seen: list[str | None], local: list[str]
) -> None:
    code = (
        "import json, os; from tlearn.rendezvous import resolved; mine = resolved(os.environ)\n"
        "print(json.dumps([mine['RANK'], os.environ.get('CUDA_VISIBLE_DEVICES'), mine['LOCAL_RANK']]))"
    )
    done = srun(cluster, ["-N1", "-n2", *options], "-c", code)
    found = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert [rank for rank, _, _ in found] == ["0", "1"], done.stderr
    assert sorted(index or "" for _, index, _ in found) == sorted(index or "" for index in seen)
    assert [index for _, _, index in found] == local


def test_more_tasks_than_asked_for_are_refused(cluster: Cluster, photos: Path, tmp_path: Path) -> None:
    options = [f"data.path={photos}", *TINY, "--run", str(tmp_path / "run")]
    done = srun(cluster, ["-N1", "-n2"], "-m", "tlearn", "train", *options, "--nproc", "3")
    assert done.returncode in (2, 75)  # the rank that is slower to say so is ended by the other's failure
    assert "--nproc 3: the launcher has started 2 processes" in done.stderr


# tlearn submit


def test_a_job_with_a_hard_life_ends_as_if_nothing_had_happened(
    cluster: Cluster, whole: Callable[[int], Path], photos: Path, tmp_path: Path
) -> None:
    folder, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    shape = {"nodes": 2, "tasks_per_node": 1, "time": "1:00:00", "signal_delay_s": 119}
    profile = write_profile(tmp_path / "two.yaml", **shape, sbatch={"hold": True})
    recipe.write_text(f"data: {{path: {photos}}}\n")
    job = submitted(cluster, str(recipe), *RECIPE, "--profile", profile, "--run", str(folder))
    again = tlearn(cluster, "submit", "--run", str(folder))  # it would take the code from under the first
    assert (again.returncode, again.stdout) == (2, "")
    assert f"job {job} is not over; tlearn cancel" in again.stderr
    recipe.write_text("data: {path: elsewhere}\n")  # later edits do not matter
    with (last_code(folder) / "__init__.py").open("a") as file:
        file.write("\nimport sys; print('as it was submitted', file=sys.stderr)\n")

    def started(times: int) -> None:
        wait_for(lambda: len(read_starts(folder)) == times)

    slurm(cluster, "scontrol", "release", job)
    wait_for(reached(folder, 5))
    with frozen(job):  # until its time is up: Slurm looks every 30 s, and says so 119 s before
        slurm(cluster, "scontrol", "update", f"JobId={job}", "TimeLimit=2")
    slurm(cluster, "scontrol", "update", f"JobId={job}", "TimeLimit=60")
    started(2)
    slurm(cluster, "scancel", "--signal=USR2", job)  # at once again, long before its first step
    started(3)
    wait_for(reached(folder, 20))
    with frozen(job):
        other = slurm(
            cluster,
            "sbatch",
            "--parsable",
            "--partition=high",
            "-N3",
            "--exclusive",
            "--output=/dev/null",
            "--wrap",
            "true",
        )
    # else it might start again at once, on the spare node and the first of its own that is free
    wait_for(lambda: state(cluster, job) == "PENDING")
    slurm(cluster, "scontrol", "hold", job)
    wait_for(lambda: state(cluster, other.strip()) == "COMPLETED")
    slurm(cluster, "scontrol", "release", job)
    started(4)
    wait_for(reached(folder, 35))
    nodes = slurm(cluster, "squeue", "--noheader", f"--jobs={job}", "--format=%B").strip()
    power_off(cluster, nodes)
    wait_for(lambda: state(cluster, job) == "COMPLETED")
    subprocess.run([SCRIPT, "up"], env=cluster, capture_output=True, check=True)

    starts = read_starts(folder)
    assert [(start["job"], start["restart"], start["tasks"]) for start in starts] == [(job, i, 2) for i in range(5)]
    steps = [start["step"] for start in starts]
    assert steps[0] < steps[1] == steps[2] < steps[3] < steps[4]
    assert starts[3]["nodes"] != starts[4]["nodes"]
    marks = [(row["job"], row["step"], row["processes"]) for row in rows(folder, "start")]
    assert marks == [(job, steps[i], 2) for i in (0, 1, 3, 4)]  # the third ended before it was one
    printed = (folder / "slurm" / f"{job}_0_log.err").read_text()
    assert printed.count("as it was submitted") == 5
    assert printed.count("stopped by SIGUSR2, everything is saved; the job is queued again") == 2
    assert_same(folder, whole(2))


def test_a_rank_that_fails_is_named_and_the_run_goes_on(
    cluster: Cluster, whole: Callable[[int], Path], photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    profile = write_profile(tmp_path / "two.yaml", nodes=2, tasks_per_node=1, sbatch={"hold": True})
    job = submitted(cluster, f"data.path={photos}", *RECIPE, "--profile", profile, "--run", str(folder))
    with (last_code(folder) / "ledger.py").open("a") as file:
        file.write(
            "import os\ndef settle(self, settle=Ledger.settle):\n"
            "    if os.environ['RANK'] == '1' and self.progress.step == 12: raise KeyError('what was wrong')\n"
            "    settle(self)\nLedger.settle = settle\n"
        )
    slurm(cluster, "scontrol", "release", job)
    wait_for(lambda: state(cluster, job) == "FAILED")
    node = read_starts(folder)[0]["nodes"].removesuffix("]").replace("[", "").split("-")  # 127.0.0.[2-3]
    who = f"rank 1 on 127.0.0.{node[-1]} failed"
    for rank in ("0", "1"):
        printed = tlearn(cluster, "logs", str(folder), "--rank", rank).stdout
        assert printed.count("Traceback") == 1
        assert f"{who}:\n" in printed
        assert f"KeyError: 'what was wrong'\ngo on with: tlearn submit --run {folder}" in printed
    report = json.loads(tlearn(cluster, "status", str(folder), "--json").stdout)
    assert report["failure"] == f"{who}: KeyError: 'what was wrong'"
    assert report["go on with"] == f"tlearn submit --run {folder}"

    second = submitted(cluster, "--run", str(folder))  # with the same profile, and code that does not fail
    slurm(cluster, "scontrol", "release", second)
    wait_for(reached(folder, 25))
    os.kill(next(task for task in tasks("SLURM_PROCID", "1") if task in tasks("SLURM_JOB_ID", second)), signal.SIGKILL)
    wait_for(lambda: state(cluster, second) == "FAILED")  # Slurm does not queue it again
    assert "task 1: Killed" in tlearn(cluster, "logs", str(folder)).stdout
    assert "137:0, killed (for want of memory?)" in tlearn(cluster, "status", str(folder)).stdout

    third = submitted(cluster, "--run", str(folder))
    slurm(cluster, "scontrol", "release", third)
    wait_for(lambda: state(cluster, third) == "COMPLETED")
    assert json.loads(tlearn(cluster, "status", str(folder), "--json").stdout)["finished"]
    assert_same(folder, whole(2))


def test_a_job_that_is_cancelled_saves_and_stays_away(cluster: Cluster, photos: Path, tmp_path: Path) -> None:
    folder, profile = tmp_path / "run", write_profile(tmp_path / "one.yaml")
    # scancel ends W&B's own process too
    options = [f"data.path={photos}", *ENDLESS, "tracking.wandb.mode=offline", "--profile", profile]
    job = submitted(cluster, *options, "--run", str(folder))
    other = tmp_path / "other"
    after = submitted(cluster, f"data.path={photos}", *TINY, "--after", job, "--profile", profile, "--run", str(other))
    wait_for(reached(folder, 10))
    report = json.loads(tlearn(cluster, "status", str(folder), "--json").stdout)
    assert (report["job"], report["state"], report["stage"], report["finished"]) == (job, "RUNNING", "all", False)
    assert (report["restarts"], report["processes"]) == (0, 1)
    assert report["step"] >= 10
    assert "step-" in report["checkpoint"]
    assert state(cluster, after) == "PENDING"
    assert "everything is saved" not in tlearn(cluster, "logs", str(folder)).stdout
    assert f"job {job} is cancelled" in tlearn(cluster, "cancel", str(folder)).stdout
    wait_for(lambda: "everything is saved" in (folder / "slurm" / f"{job}_0_log.err").read_text())
    wait_for(lambda: state(cluster, job) == "CANCELLED")
    wait_for(lambda: state(cluster, after) == "CANCELLED")  # not pending for ever
    time.sleep(3)
    assert state(cluster, job) == "CANCELLED"
    printed = tlearn(cluster, "logs", str(folder), "-f").stdout
    assert "everything is saved" in printed
    assert "Traceback" not in printed
    assert f"job {job} is over already (CANCELLED)" in tlearn(cluster, "cancel", str(folder)).stderr
    assert "Slurm knows no such job" in tlearn(cluster, "submit", f"data.path={photos}", "--after", "99999").stderr
    assert "not there; job" in tlearn(cluster, "logs", str(folder), "--rank", "7").stderr


def test_a_full_run_waits_for_its_quick_run_and_begins_on_a_go_only(
    cluster: Cluster, photos: Path, photo_folder: Path, tmp_path: Path
) -> None:
    prepare(shuffled(photo_folder, tmp_path / "pictures"), tmp_path / "data")
    profile = write_profile(tmp_path / "two.yaml", tasks_per_node=2, cpus_per_task=1)
    jobs = {}
    for name, data in (("good", photos), ("bad", tmp_path / "data")):
        options = (f"data.path={data}", *QUICKLY, "--quick-first", "--profile", profile)
        jobs[name] = submitted(cluster, *options, "--run", str(tmp_path / name))
    waiting = json.loads(tlearn(cluster, "status", str(tmp_path / "bad"), "--json").stdout)
    assert waiting["state"] == "PENDING"
    assert waiting["quick"].startswith(f"job {last_job(tmp_path / 'bad' / 'quick')}, ")

    wait_for(lambda: state(cluster, jobs["bad"]) == "CANCELLED")
    report = json.loads(tlearn(cluster, "status", str(tmp_path / "bad"), "--json").stdout)
    assert report["quick"].startswith("no-go: val/top1@32 ")
    assert "no better than always answering the largest class" in report["quick"]
    assert not report["finished"]
    # not its exit code: 3, or that of a rank which was ended by the other's 3
    assert "JobState=FAILED" in slurm(cluster, "scontrol", "show", "job", str(last_job(tmp_path / "bad" / "quick")))
    assert not (tmp_path / "bad" / "config.yaml").exists()
    assert report["go on with"] == f"tlearn submit {tmp_path / 'bad' / 'quick' / 'full.yaml'} --run {tmp_path / 'bad'}"

    wait_for(lambda: state(cluster, jobs["good"]) == "COMPLETED")
    report = json.loads(tlearn(cluster, "status", str(tmp_path / "good"), "--json").stdout)
    assert report["quick"].startswith("go: val/top1@32 ")
    assert (report["finished"], report["processes"]) == (True, 2)


def test_a_preemption_that_comes_as_sigterm_is_none_the_less(cluster: Cluster, photos: Path, tmp_path: Path) -> None:
    configuration = Path(cluster["SLURM_CONF"])
    text = configuration.read_text()
    configuration.write_text(text.replace("SlurmctldParameters=preempt_send_user_signal", ""))
    slurm(cluster, "scontrol", "reconfigure")
    try:
        folder, profile = tmp_path / "run", write_profile(tmp_path / "one.yaml")
        job = submitted(cluster, f"data.path={photos}", *ENDLESS, "--profile", profile, "--run", str(folder))
        wait_for(reached(folder, 10))
        slurm(cluster, "sbatch", "--partition=high", "-N3", "--exclusive", "--output=/dev/null", "--wrap", "true")
        wait_for(lambda: len(read_starts(folder)) == 2)
        assert "stopped by SIGTERM, everything is saved" in (folder / "slurm" / f"{job}_0_log.err").read_text()
        assert read_starts(folder)[1]["step"] >= 10
        slurm(cluster, "scancel", "--full", "--signal=KILL", job)
        wait_for(lambda: state(cluster, job) != "RUNNING")
    finally:
        configuration.write_text(text)
        slurm(cluster, "scontrol", "reconfigure")


def test_doctor_submits_a_job_that_looks_at_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "gpus.yaml", nodes=2, gpus_per_node=2, cpus_per_task=1)
    done = tlearn(cluster, "doctor", "--slurm", "--profile", profile, "--run", str(tmp_path / "runs"), "--json")
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["world_size"] == 4
    assert report["all_reduce"]["sum"] == report["all_reduce"]["expected"] == 10
    found = [rank["environment"] for rank in report["ranks"]]
    assert [environment["LOCAL_RANK"] for environment in found] == ["0", "1", "0", "1"]
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in found} == {"0,1"}
    assert all(rank["sees_folder"] and rank["free_gib"] > 0 for rank in report["ranks"])
    assert done.returncode == (1 if report["problems"] else 0)
    assert not any("folder" in problem or "scontrol" in problem for problem in report["problems"])
    assert list((tmp_path / "runs").iterdir()) == []  # it tidies up


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mem": "900G"}, "Memory specification can not be satisfied"),
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"constraint": "a100"}, "Invalid feature specification"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_words(
    cluster: Cluster, photos: Path, tmp_path: Path, options: dict[str, str], words: str
) -> None:
    profile = write_profile(tmp_path / "p.yaml", **options)
    done = tlearn(cluster, "submit", f"data.path={photos}", "--profile", profile, "--run", str(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count(words) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cpu", "one_gpu"])
def test_slurm_accepts_what_a_dry_run_prints(cluster: Cluster, photos: Path, tmp_path: Path, name: str) -> None:
    profile = tmp_path / "p.yaml"  # the fake nodes have less
    profile.write_text((ROOT / "slurm" / f"{name}.yaml").read_text().replace("32G", "4G").replace("task: 8", "task: 4"))
    options = [f"data.path={photos}", "--profile", str(profile), "--run", str(tmp_path / "run"), "--dry-run"]
    (tmp_path / "job.sh").write_text(tlearn(cluster, "submit", *options).stdout)
    tested = run(cluster, "sbatch", "--test-only", tmp_path / "job.sh")
    assert tested.returncode == 0, tested.stderr
    assert not (tmp_path / "run").exists()
