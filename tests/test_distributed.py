"""The same run at any number of processes: real ones, that talk over gloo."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ranks
import torch
import yaml
from conftest import ROOT, TINY
from safetensors.torch import load_file
from test_cli import run as run_cli

from tlearn.config import Config
from tlearn.data.loader import Share
from tlearn.errors import RankFailedError, StoppedBySignalError, TlearnError
from tlearn.launch import run_ranks
from tlearn.rendezvous import check_rendezvous
from tlearn.run import train

MakeConfig = Callable[..., Config]
Row = dict[str, Any]

STAGES = (
    "stages=["
    "{name: head, epochs: 2, train: [[head, 1.0], ['.*', 0]], optimizer: {name: adam, lr: 0.01}, "
    " schedule: {name: cosine_warm_restarts, t_0: 50%, t_mult: 1}},"
    "{name: last, epochs: 2, train: [[head, 1.0], ['last:1', 0.5], ['.*', 0]], optimizer: {name: adam, lr: 0.003},"
    " schedule: {name: cosine, warmup_epochs: 0.5}},"
    "{name: all, epochs: 3, train: [['.*', 1.0]], optimizer: {name: sgd, lr: 0.01}, image_size: 40}]"
)
"""Unfreezes twice, changes the optimizer and the image size, restarts the rate."""
EXACT = (STAGES, "data.max_train=187", "batch.size=26", "objective.class_weight=inverse", "precision=fp64")
"""8 batches of 23 or 24 images an epoch, which neither 2, 3 nor 4 processes share evenly; 56 steps."""


def rows(folder: Path, kind: str) -> list[Row]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").iterdir())
    return load_file(newest / "model.safetensors")


def result(folder: Path) -> Row:
    content: Row = json.loads((folder / "result.json").read_text())
    return content


@pytest.fixture(scope="module")
def by_world(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One recipe on 1, 2, 3 and 4 processes; with accumulation and with loader workers, where these differ too."""
    from tlearn.configfile import load_config

    root = tmp_path_factory.mktemp("worlds")
    differing = {1: ["batch.micro=7"], 2: [], 3: ["data.workers=2"], 4: ["batch.micro=3"]}
    for world_size, options in differing.items():
        overrides = [f"data.path={photos}", *TINY, *EXACT, "model.batch_norm=frozen", *options]
        run_ranks(train, (load_config(None, overrides), root / str(world_size)), world_size)
    return {world_size: root / str(world_size) for world_size in differing}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_batches_rates_losses_and_weights_are_those_of_one_process(by_world: dict[int, Path], world_size: int) -> None:
    one, many = by_world[1], by_world[world_size]
    steps = rows(one, "step"), rows(many, "step")
    assert len(steps[0]) == 56
    for key in ("step", "samples", "epoch", "batch_hash", "lr"):
        assert [row[key] for row in steps[0]] == [row[key] for row in steps[1]], key
    assert len({row["batch_hash"] for row in steps[0]}) == 56
    losses = [np.array([row["train/loss"] for row in s]) for s in steps]
    assert losses[0].min() < 0.97 * losses[0][0]  # it learns, so the equality says something
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9, atol=0)
    theirs = weights(many)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_result_is_that_of_one_process(by_world: dict[int, Path], world_size: int) -> None:
    one, many = result(by_world[1]), result(by_world[world_size])
    assert many["world_size"] == world_size
    assert many["val"]["n"] == many["val"]["n_expected"] == 120
    assert many["val"]["confusion"] == one["val"]["confusion"]
    assert many["val"]["loss"] == pytest.approx(one["val"]["loss"], rel=1e-9)
    assert many["best"] == {key: pytest.approx(value) for key, value in one["best"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_train_mode_batch_norm_stays_equal_on_all_ranks(tiny: MakeConfig, tmp_path: Path, world_size: int) -> None:
    """The run compares its ranks after every epoch, and would fail."""
    config = tiny("strategy=full", "epochs=2", "model.batch_norm=train")
    run_ranks(train, (config, tmp_path / "many"), world_size)
    train(config, tmp_path / "one")
    mean = "bn1.running_mean"
    one, many = (weights(tmp_path / folder)[mean] for folder in ("one", "many"))
    assert one.abs().max() > 0.01  # it moved
    # the mean of the parts' means is the mean of the batch
    torch.testing.assert_close(one, many, rtol=0.05, atol=0.01)


@pytest.mark.slow
def test_frozen_batch_norm_keeps_its_buffers_to_the_bit(tiny: MakeConfig, tmp_path: Path) -> None:
    from tlearn.models.build import build_model

    config = tiny("strategy=partial", "epochs=2", "model.batch_norm=frozen")
    run_ranks(train, (config, tmp_path / "run"), 2)
    after, before = weights(tmp_path / "run"), build_model(config, 10).net.state_dict()
    buffers = [name for name in before if "running" in name]
    assert buffers
    for name in buffers:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_autocast_is_on_in_every_stage_and_in_evaluation(tiny: MakeConfig, tmp_path: Path, world_size: int) -> None:
    config = tiny(STAGES, "precision=bf16")
    for seen in run_ranks(ranks.autocast_seen, (config, tmp_path / "run"), world_size):
        stages = ("head", "last", "all")
        assert seen == {f"{stage} {grad}": {"torch.bfloat16"} for stage in stages for grad in (True, False)}


@pytest.mark.slow
def test_a_weight_that_differs_on_one_rank_is_named(tiny: MakeConfig, tmp_path: Path) -> None:
    # a weight that is frozen: DDP would not bring it back
    config = tiny("strategy=partial", "epochs=2")
    with pytest.raises(RankFailedError, match=r"after epoch 1 .*differ: conv_stem\.weight$"):
        run_ranks(ranks.train_and_disturb, (config, tmp_path / "run", "conv_stem.weight"), 2)


@pytest.mark.slow
def test_ranks_that_train_alone_are_found_out(tiny: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=r"after epoch 1 .*differ: .* and \d+ more"):
        run_ranks(ranks.train_without_communication, (tiny("strategy=partial", "epochs=2"), tmp_path / "run"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["0.weight"], ["1.running_var", "0.bias"], ["1.num_batches_tracked"]])
def test_the_comparison_sees_order_values_and_buffers(names: list[str]) -> None:
    for answer in run_ranks(ranks.hashes, (names,), 2):
        assert answer.startswith("RankFailedError: now the ranks no longer hold the same model")
        assert set(answer.partition("differ: ")[2].split(", ")) == set(names)


def test_equal_ranks_are_not_accused() -> None:
    assert run_ranks(ranks.hashes, ([],), 3) == ["", "", ""]


def test_statistics_become_the_mean_over_ranks() -> None:
    assert run_ranks(ranks.statistics, ([[1.0, 2.0], [3.0, 6.0]],), 2) == [[2.0, 4.0, 1.5, 5]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "precision"), [(2, "fp32"), (2, "bf16"), (3, "bf16"), (4, "fp32")])
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(
    tiny: MakeConfig, tmp_path: Path, world_size: int, precision: str
) -> None:
    config = tiny(STAGES, "batch.size=26", "model.batch_norm=train", "save_every.epochs=100", f"precision={precision}")
    run_ranks(train, (config, tmp_path / "whole"), world_size)
    with pytest.raises(StoppedBySignalError, match="everything is saved"):
        run_ranks(ranks.train_and_send, (config, tmp_path / "run", world_size - 1, 19, signal.SIGTERM), world_size)
    done = [row["step"] for row in rows(tmp_path / "run", "step")]
    assert 19 <= len(done) <= 23
    run_ranks(train, (config, tmp_path / "run", "must"), world_size)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name
    for key in ("step", "train/loss", "batch_hash", "lr"):
        assert [r[key] for r in rows(tmp_path / "whole", "step")] == [r[key] for r in rows(tmp_path / "run", "step")]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_a_run_goes_on_with_another_number_of_processes(
    by_world: dict[int, Path], tiny: MakeConfig, tmp_path: Path, world_size: int
) -> None:
    config = tiny(*EXACT, "model.batch_norm=frozen")
    with pytest.raises(StoppedBySignalError):
        run_ranks(ranks.train_and_send, (config, tmp_path / "run", 0, 20, signal.SIGTERM), 2)
    run_ranks(train, (config, tmp_path / "run", "must"), world_size)
    whole, resumed = rows(by_world[2], "step"), rows(tmp_path / "run", "step")
    for key in ("step", "batch_hash", "lr"):
        assert [row[key] for row in whole] == [row[key] for row in resumed]
    np.testing.assert_allclose(*([row["train/loss"] for row in steps] for steps in (whole, resumed)), rtol=1e-9)
    assert result(tmp_path / "run")["val"]["confusion"] == result(by_world[2])["val"]["confusion"]


# who fails, and what the others do


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("mistake", TlearnError, "^the disk of this node is full$"),
        ("bug", RankFailedError, r"(?s)rank 1 failed:.*Traceback.*KeyError: 'no such thing'"),
        ("kill", RankFailedError, r"rank 1 \(process \d+\) was killed by SIGKILL"),
        ("exit", RankFailedError, r"rank 1 \(process \d+\) was ended with exit code 7"),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_is_named(how: str, error: type[Exception], message: str) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=message):
        run_ranks(ranks.fail_on, (1, how), 3)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_rank_killed_in_training_leaves_no_process_behind(tiny: MakeConfig, tmp_path: Path) -> None:
    def others() -> set[int]:
        return {child.pid for child in psutil.Process().children(recursive=True)}

    run_ranks(ranks.hashes, ([],), 2)  # the server that ranks are forked from stays
    before, start = others(), time.monotonic()
    config = tiny("strategy=full", "epochs=50", "data.workers=2")
    with pytest.raises(RankFailedError, match=r"rank 1 .*killed by SIGKILL; the other ranks were ended"):
        run_ranks(ranks.train_and_send, (config, tmp_path / "run", 1, 5, signal.SIGKILL), 3)
    assert time.monotonic() - start < 60
    while others() - before and time.monotonic() - start < 60:  # loader workers see that their rank is gone
        time.sleep(0.05)
    assert others() - before == set()


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_ranks_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tlearn.launch import run_ranks; import ranks; "
        "run_ranks(ranks.sleep, (300.0, Path(sys.argv[1])), 2)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    processes = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert [is_alive(process) for process in processes] == [True, True]
    parent.kill()
    parent.wait()
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, processes))


def test_what_rank_0_finds_reaches_every_rank() -> None:
    assert run_ranks(ranks.on_main, (False,), 3) == [17, 17, 17]
    assert run_ranks(ranks.on_main, (True,), 2) == ["rank 0 found a mistake"] * 2


@pytest.mark.slow
def test_mistakes_are_one_message_at_any_number_of_processes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = (f"data.path={photos}", *TINY, "--run", tmp_path / "run", "--nproc", "2")
    assert run_cli(monkeypatch, "train", *options, "batch.size=500") == 2
    assert capfd.readouterr().err == "tlearn: batch.size = 500: there are only 200 train images; use batch.size=200\n"
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    assert run_cli(monkeypatch, "train", *options) == 2
    assert re.fullmatch(r"tlearn: .*/run: is not empty and holds no run.*\n", capfd.readouterr().err)


# batches


@pytest.mark.slow
def test_a_search_for_memory_does_not_touch_batch_norm(tiny: MakeConfig, tmp_path: Path) -> None:
    """Ranks stop in different layers when they run out of memory; they must still hold the same statistics."""
    options = ("batch.size=26", STAGES, "model.batch_norm=train")
    run_ranks(ranks.train_short_of_memory, (tiny(*options, "batch.find=true"), tmp_path / "short", 7), 2)
    run_ranks(train, (tiny(*options, "batch.micro=6"), tmp_path / "micro"), 2)
    for name, tensor in weights(tmp_path / "micro").items():
        assert torch.equal(tensor, weights(tmp_path / "short")[name]), name
    with pytest.raises(TlearnError, match=r"stage head would have micro-batches of 0 images"):
        run_ranks(ranks.train_short_of_memory, (tiny(*options, "batch.find=true"), tmp_path / "one", 1), 2)


@pytest.mark.slow
def test_a_rank_without_memory_makes_all_of_them_halve(tiny: MakeConfig, tmp_path: Path) -> None:
    options = (*EXACT, "model.batch_norm=frozen")
    run_ranks(ranks.train_short_of_memory, (tiny(*options, "batch.find=true"), tmp_path / "short", 4), 2)
    run_ranks(train, (tiny(*options), tmp_path / "ample"), 2)
    short, ample = rows(tmp_path / "short", "step"), rows(tmp_path / "ample", "step")
    assert [row["batch_hash"] for row in short] == [row["batch_hash"] for row in ample]
    losses = [[row["train/loss"] for row in steps] for steps in (short, ample)]
    np.testing.assert_allclose(*losses, rtol=1e-9)
    # 13 images a rank, halved until 4 fit
    assert "micro-batches of 3" in (tmp_path / "short" / "log.txt").read_text()
    with pytest.raises(TlearnError, match="not even one image fits"):
        run_ranks(ranks.train_short_of_memory, (tiny(*options, "batch.find=true"), tmp_path / "none", 0), 2)


@pytest.mark.parametrize("n", [5, 26, 187, 1000])
@pytest.mark.parametrize("batch_size", [4, 26, 64])
def test_the_smallest_and_the_largest_part_are(n: int, batch_size: int) -> None:
    from tlearn.data.order import batch_range, steps_per_epoch

    for world_size in (1, 2, 3, 5):
        for accumulate in (1, 3):
            sizes = []
            for step in range(steps_per_epoch(n, batch_size)):
                start, stop = batch_range(step, n, batch_size)
                for rank in range(world_size):
                    share = Share(batch_size, rank, world_size, accumulate)
                    sizes += [b - a for a, b in (share.part(start, stop, m) for m in range(accumulate))]
            share = Share(batch_size, 0, world_size, accumulate)
            assert (share.smallest_part(n), share.largest_part(n)) == (min(sizes), max(sizes))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("n", "batch_size", "micro"), [(187, 26, 7), (187, 26, 2), (29, 28, 4), (200, 200, 1), (5, 4, 9)]
)
def test_no_micro_batch_is_larger_than_asked_for_and_none_is_needless(
    n: int, batch_size: int, micro: int, world_size: int
) -> None:
    share = Share(batch_size, 0, world_size).in_parts_of(micro, n)
    assert share.largest_part(n) <= micro
    if share.accumulate > 1:
        assert replace(share, accumulate=share.accumulate - 1).largest_part(n) > micro
    assert Share(batch_size, 0, world_size).in_parts_of(None, n).accumulate == 1


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (("batch.size=3", "batch.micro=1", "model.batch_norm=train", "strategy=full"), "BatchNorm.*need two"),
        (("batch.size=3", "batch.micro=1", "model.batch_norm=train", "strategy=feature_extraction"), None),
        (("batch.size=3", "batch.micro=1", "model.batch_norm=frozen", "strategy=full"), None),
    ],
)
def test_one_image_alone_never_reaches_a_train_mode_batch_norm(
    tiny: MakeConfig, tmp_path: Path, options: tuple[str, ...], needed: str | None
) -> None:
    config = tiny(*options, "epochs=1", "data.max_train=9")
    if needed is None:
        train(config, tmp_path / "run")
        return
    with pytest.raises(TlearnError, match=needed):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_too_small_for_the_processes_is_refused(tiny: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(TlearnError, match=r"batch.size = 2: fewer images than the 3 processes"):
        run_ranks(train, (tiny("batch.size=2", "model.batch_norm=frozen"), tmp_path / "run"), 3)


# evaluation


@pytest.mark.parametrize("images", [120, 7, 3])
def test_every_image_is_counted_once_at_any_number_of_processes(tiny: MakeConfig, images: int) -> None:
    config = tiny("batch.size=16", f"data.max_val={images}")
    one = ranks.evaluated(config)
    assert one["n"] == images
    floats = {key: value for key, value in one.items() if isinstance(value, float)}
    assert {"top1", "top5", "loss", "macro_f1", "macro_precision", "macro_recall", "calibration_error"} <= set(floats)
    for world_size in (2, 3, 4):
        for many in run_ranks(ranks.evaluated, (config,), world_size):
            assert many["confusion"] == one["confusion"]
            assert many["confidence_bins"] == one["confidence_bins"]
            assert many["top5"] == one["top5"]
            assert {key: many[key] for key in floats} == pytest.approx(floats, abs=1e-12)


# launchers


def launch_config(name: str) -> tuple[str, dict[str, Any]]:
    path = ROOT / "launch" / f"{name}.yaml"
    return path.read_text(), yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", ["cpu", "cpu_ddp", "single_gpu", "multi_gpu", "multi_node"])
def test_launch_configs_are_accelerates_and_name_their_command(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    text, content = launch_config(name)
    assert f"accelerate launch --config_file launch/{name}.yaml" in text
    assert load_config_from_file(str(ROOT / "launch" / f"{name}.yaml")).num_processes == content["num_processes"]


def header_command(name: str) -> list[str]:
    """The command in a launch file's header, up to the config."""
    text, _ = launch_config(name)
    lines = re.search(r"^#   (.*accelerate launch.*) CONFIG\.yaml", text, re.MULTILINE)
    assert lines
    words = shlex.split(lines[1])
    return [word for word in words if "=" not in word]


LAUNCHED = {
    "cpu": (1, header_command("cpu")),
    "cpu_ddp": (2, header_command("cpu_ddp")),
    "torchrun": (2, ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "--", "tlearn", "train"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHED)
def test_launchers_start_the_same_run(by_world: dict[int, Path], photos: Path, tmp_path: Path, launcher: str) -> None:
    world_size, command = LAUNCHED[launcher]
    options = [f"data.path={photos}", *TINY, *EXACT, "model.batch_norm=frozen", "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:], *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run")["world_size"] == world_size
    expected = [row["train/loss"] for row in rows(by_world[world_size], "step")]
    np.testing.assert_allclose([row["train/loss"] for row in rows(tmp_path / "run", "step")], expected, rtol=1e-9)


@pytest.mark.slow
def test_two_machines_meet_by_host_and_port() -> None:
    """Two launchers, as on two machines, each with one process; the command of launch/multi_node.yaml."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "launch/multi_node.yaml"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    command += ["--num_machines", "2", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), "-m", "tlearn", "doctor", "--json"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for rank in (0, 1)
    ]
    answers = [machine.communicate(timeout=120)[0] for machine in machines]
    report = json.loads(answers[0])
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert report["all_reduce"]["sum"] == 3
    assert report["address"] == f"127.0.0.1:{port}"
    assert answers[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 1.0])
def test_a_signal_while_the_processes_start_ends_them(after_s: float) -> None:
    command = [sys.executable, "-m", "tlearn", "doctor", "--nproc", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not psutil.Process(process.pid).children() and time.monotonic() < deadline:  # the server is being started
        time.sleep(0.01)
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (75, ""), stderr


def test_ranks_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    run_ranks(ranks.hashes, ([],), 2)  # the server that they are forked from is there
    monkeypatch.setenv("TLEARN_TEST", "now")
    assert run_ranks(os.getenv, ("TLEARN_TEST",), 2) == ["now", "now"]
    monkeypatch.delenv("TLEARN_TEST")
    assert run_ranks(os.getenv, ("TLEARN_TEST",), 2) == [None, None]


def test_what_the_file_system_refuses_on_a_rank_is_one_message() -> None:
    with pytest.raises(TlearnError, match=r"^/somewhere: No space left on device$"):
        run_ranks(ranks.fail_on, (1, "full"), 2)


@pytest.mark.slow
def test_accelerate_that_silently_starts_one_process_is_refused(photos: Path, tmp_path: Path) -> None:
    """Trap of accelerate 1.15: `--cpu --num_processes 2` starts one process."""
    command = ["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "tlearn", "train", f"data.path={photos}"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:], *TINY, "--run", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "the environment has MASTER_ADDR, MASTER_PORT but not RANK, LOCAL_RANK, WORLD_SIZE" in done.stderr
    assert not (tmp_path / "run").exists()


def test_half_set_environments_are_refused() -> None:
    whole = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}
    check_rendezvous({})
    check_rendezvous(whole)
    for name in whole:
        with pytest.raises(TlearnError, match=f"but not {name}: .*--nproc"):
            check_rendezvous({key: value for key, value in whole.items() if key != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc, which is no number"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x, which is no number"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2; ranks count from 0"),
    ],
)
def test_senseless_environments_are_refused(change: dict[str, str], message: str) -> None:
    whole = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}
    with pytest.raises(TlearnError, match=message):
        check_rendezvous({**whole, **change})


@pytest.mark.slow
def test_a_rank_that_waits_for_the_others_can_be_stopped() -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    process = subprocess.Popen([sys.executable, "-m", "tlearn", "doctor"], env={**os.environ, **environment})
    time.sleep(8)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) != 0


def test_a_world_size_other_than_the_one_asked_for_is_an_error(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_cli(monkeypatch, "train", f"data.path={photos}", *TINY, "--nproc", "3") == 2
    assert "--nproc 3: the launcher has started 2 processes" in capsys.readouterr().err


# doctor


def test_doctor_shows_every_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_cli(monkeypatch, "doctor", "--nproc", "3", "--json")
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["problems"] else 0)
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1, 2]
    assert len({rank["process"] for rank in report["ranks"]}) == 3
    assert report["all_reduce"]["sum"] == report["all_reduce"]["expected"] == 6
    assert report["backend"] == "gloo"
    assert "fp16" not in report["precision"]
    assert run_cli(monkeypatch, "doctor") in (0, 1)
    assert "world size 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"threads": 8}, "OMP_NUM_THREADS=2"),
        ({"cores": 1, "threads": 1}, "start 1 at most"),
        ({"shared_memory_mib": 64}, "--shm-size"),
        ({"devices_here": 4}, "--nproc"),
        ({"devices_here": 2, "environment": {"CUDA_VISIBLE_DEVICES": "1"}}, "share a device"),
        ({"sees_folder": False, "free_gib": None}, "has to be on a shared disk"),
        ({"sees_folder": True, "free_gib": 0.5}, "0.5 GiB free at /runs"),
    ],
)
def test_doctor_says_what_is_wrong_and_how_to_mend_it(change: Row, advice: str) -> None:
    from tlearn.doctor import problems

    rank: Row = {"rank": 0, "host": "a", "device": "cpu", "devices_here": 0, "cores": 4, "threads": 2}
    rank |= {"shared_memory_mib": 9999, "environment": {}}
    healthy = {"world_size": 2, "all_reduce": {"sum": 3.0, "expected": 3.0}, "folder": "/runs", "ranks": [rank, rank]}
    assert problems(healthy) == []
    narrowed = [{**rank, "devices_here": 1, "environment": {"CUDA_VISIBLE_DEVICES": i}} for i in "01"]
    assert problems({**healthy, "ranks": narrowed}) == []  # --gpus-per-task: both call theirs cuda:0
    found = problems({**healthy, "ranks": [{**rank, **change}] * 2})
    assert any(advice in problem for problem in found)
    assert problems({**healthy, "all_reduce": {"sum": 2.0, "expected": 3.0}})[0].endswith("do not train like this")


@pytest.mark.slow
def test_sigterm_to_the_launching_process_stops_the_ranks(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [f"data.path={photos}", *TINY, "strategy=full", "epochs=200", "--nproc", "2", "--run", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tlearn", "train", *options], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    # a step: both ranks are in their loop, while a row of the start is rank 0's alone
    while not (metrics.exists() and '"kind": "step"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert f"go on with: tlearn train --run {folder}" in stderr
    assert len(list((folder / "checkpoints").iterdir())) >= 1
