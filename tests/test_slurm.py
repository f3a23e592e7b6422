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

from tlearn.errors import TlearnError
from tlearn.launch import run_ranks
from tlearn.rendezvous import RENDEZVOUS, first_host, from_slurm
from tlearn.run import train

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
            from tlearn.configfile import load_config

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
