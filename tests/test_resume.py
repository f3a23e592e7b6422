"""Nothing is lost: whatever ends a run, and wherever, the rest of it is the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from conftest import TINY, load_script
from safetensors.torch import load_file, save_file
from test_cli import run as run_cli
from test_train import STAGES, assert_same_run, rows

from tlearn import checkpoint, drill, engine, ledger, saver
from tlearn.checkpoint import Progress
from tlearn.config import Config, Keep, SaveEvery
from tlearn.configfile import load_config
from tlearn.data.prepare import read_index
from tlearn.data.shards import Split
from tlearn.data.workers import no_fork
from tlearn.errors import RankFailedError, StoppedBySignalError, TlearnError
from tlearn.files import sha256
from tlearn.folder import RunFolder
from tlearn.launch import run_ranks
from tlearn.models.build import build_model
from tlearn.run import train
from tlearn.saver import Saver
from tlearn.tracking import Tracker

MakeConfig = Callable[..., Config]
Row = dict[str, Any]


@pytest.fixture
def send_at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """SIGTERM when the row of a step is logged, once."""

    def arrange(step: int) -> None:
        log = Tracker.log

        def log_and_send(self: Tracker, row: Row) -> None:
            log(self, row)
            if row["kind"] == "step" and row["step"] == step:
                monkeypatch.setattr(Tracker, "log", log)
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Tracker, "log", log_and_send)

    return arrange


# killed at random moments


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3])
def test_a_run_that_is_killed_again_and_again_is_the_same_run(photos: Path, tmp_path: Path, seed: int) -> None:
    outcome = load_script("kill_and_resume").hunt(photos, tmp_path, seed, kills=3)
    assert outcome.difference is None
    assert outcome.points >= 2


# every state


CLOCK_OR_PROCESS = {
    "Progress.seconds": "of the clock",
    "Progress.metrics_bytes": "the speeds of steps have more or fewer digits",
    "Ledger._clock": "of the clock",
    "Ledger._pending": "on its way to be logged",
    "Saver.cost": "what saving costs in this process",
    "Saver._saved_at": "of the clock",
    "Saver._last": "where this run lives",
    "Saver._thread": "of this process",
    "Saver._writes": "under way in this process",
    "Saver._shown": "what is on the disk",
    "Run.val_loader": "kept worker processes",
    "RunFolder._lock": "an open file",
    "Runtime.state": "Accelerate's, of this process",
    "Runtime.accelerator": "Accelerate's, of this process",
    "Tracker._sinks": "open files",
    "Tracker._lines": "open files",
}
"""Attributes that may differ between a run and its continuation, and why."""


def state_of(root: Mapping[str, Any], net: torch.nn.Module) -> dict[str, Any]:
    """Every number, text and tensor that can be reached from here through objects of ours and of torch.

    Args:
        root: objects by name.
        net: by whose parameter names the optimizer's state is named.
    """
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(node: Any, path: str) -> None:
        if node is None or isinstance(node, int | float | str | bool | torch.dtype | torch.device):
            found[path] = node
        elif isinstance(node, torch.Tensor | np.ndarray):
            array = node.detach().contiguous().numpy() if isinstance(node, torch.Tensor) else node
            found[path] = str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()
        elif id(node) not in seen:
            if not isinstance(node, tuple):  # equal ones may be one object or two
                seen.add(id(node))
            if isinstance(node, Mapping):
                for key, value in node.items():
                    walk(value, f"{path}.{names.get(id(key), key)}")
            elif isinstance(node, list | tuple | set | frozenset):
                found[f"{path}#"] = len(node)
                for i, value in enumerate(node if isinstance(node, list | tuple) else ()):
                    walk(value, f"{path}.{i}")
            elif type(node).__module__.partition(".")[0] in ("tlearn", "torch", "timm") and hasattr(node, "__dict__"):
                for name, value in vars(node).items():
                    if f"{type(node).__name__}.{name}" not in CLOCK_OR_PROCESS:
                        walk(value, f"{path}.{name}")

    walk(root, "")
    return found


def test_the_walk_finds_every_kind_of_state() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    net[0].calls = 3  # type: ignore[assignment]
    found = state_of({"net": net, "optimizer": optimizer, "progress": Progress(step=4, best=[{"top1": 0.5}])}, net)
    for path in (
        ".net._modules.0._parameters.weight",
        ".net._modules.1._buffers.running_mean",
        ".net._modules.0.calls",
        ".net.training",
        ".optimizer.state.0.weight.exp_avg",
        ".optimizer.param_groups.0.lr",
        ".progress.step",
        ".progress.best.0.top1",
    ):
        assert path in found, path


def states_at(
    config: Config, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch, *, add_a_state: bool
) -> dict[str, Any]:
    """All state of a run after a step."""
    found: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    train_step, add = engine.train_step, ledger.Ledger.add

    def note_parts(run: engine.Run, shell: Any, optimizer: Any, stepper: Any, *rest: Any) -> torch.Tensor:
        parts.update(run=run, shell=shell, optimizer=optimizer)
        if add_a_state:
            run.model.steps_seen = getattr(run.model, "steps_seen", 0) + 1  # type: ignore[attr-defined]
        return train_step(run, shell, optimizer, stepper, *rest)

    def add_and_note(self: ledger.Ledger, *arguments: Any) -> None:
        add(self, *arguments)
        if self.progress.step == step:
            generators = {
                "torch": torch.get_rng_state(),
                "numpy": np.random.get_state()[1],
                "python": random.getstate(),
            }
            roots = {**parts, "ledger": self, "generators": generators}
            found.update(state_of(roots, parts["run"].model.net))

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", note_parts)
        patch.setattr(ledger.Ledger, "add", add_and_note)
        train(config, folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("add_a_state", [False, True])
def test_every_state_of_a_run_is_saved_or_follows_from_its_position(
    tiny: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    send_at_step: Callable[[int], None],
    add_a_state: bool,
) -> None:
    config = tiny(
        STAGES, "model.dropout=0.3", "model.batch_norm=train", "batch.micro=20", "keep.best=2", "clip_norm=0.1"
    )
    whole = states_at(config, tmp_path / "whole", 26, monkeypatch, add_a_state=add_a_state)
    send_at_step(23)
    with pytest.raises(StoppedBySignalError):
        states_at(config, tmp_path / "cut", 26, monkeypatch, add_a_state=add_a_state)
    cut = states_at(config, tmp_path / "cut", 26, monkeypatch, add_a_state=add_a_state)
    assert len(whole) > 300
    differing = {path for path in whole.keys() | cut.keys() if whole.get(path, "absent") != cut.get(path, "absent")}
    assert differing == ({".run.model.steps_seen"} if add_a_state else set())


# faults


@pytest.fixture(scope="module")
def stopped(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Path]:
    """A config, a run of it that nobody touched, and one that was killed at step 17, with checkpoints of 14 and 16."""
    root = tmp_path_factory.mktemp("faults")
    config = load_config(None, [f"data.path={photos}", *TINY, STAGES, "save_every.steps=8", "keep.best=2"])
    train(config, root / "whole")
    log = Tracker.log

    def log_and_die(self: Tracker, row: Row) -> None:
        log(self, row)
        if row["kind"] == "step" and row["step"] == 17:
            raise MemoryError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_die)
        with pytest.raises(MemoryError):
            train(config, root / "stopped")
    return config, root / "whole", root / "stopped"


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000016"


def cut(file: str, share: float) -> Callable[[Path], None]:
    def fault(run: Path) -> None:
        path = newest(run) / file
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return fault


def flip(file: str) -> Callable[[Path], None]:
    def fault(run: Path) -> None:
        path = newest(run) / file
        content = bytearray(path.read_bytes())
        content[len(content) * 2 // 3] ^= 4
        path.write_bytes(content)

    return fault


def half_written(run: Path) -> None:
    shutil.copytree(newest(run), newest(run).with_name(".step-00000017"))
    (newest(run).with_name(".step-00000017") / "manifest.json").unlink()


def torn_rows(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 18}\n{"kind": "st')


def another_best(run: Path) -> None:
    """Of an epoch that the newest checkpoint does not know."""
    weights = load_file(run / "best" / "model.safetensors")
    save_file(weights, run / "best" / "model.safetensors", {"best": json.dumps({"step": 17, "top1": 1.0})})


def forget_best(run: Path) -> None:
    for path in (run / "checkpoints").glob("best-*"):
        path.unlink()


FAULTS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda run: None,
    "the newest is deleted": lambda run: shutil.rmtree(newest(run)),
    "the newest is empty": lambda run: [path.unlink() for path in newest(run).iterdir()] and None,
    "model cut": cut("model.safetensors", 0.5),
    "optimizer cut": cut("optimizer.safetensors", 0.9),
    "progress cut": cut("progress.json", 0.0),
    "manifest cut": cut("manifest.json", 0.3),
    "model flipped": flip("model.safetensors"),
    "progress flipped": flip("progress.json"),
    "half-written one": half_written,
    "torn rows": torn_rows,
    "newer best weights": another_best,
    "best weights are deleted": lambda run: (run / "best" / "model.safetensors").unlink(),
    "best weights are deleted in checkpoints": lambda run: (
        [p.unlink() for p in run.glob("checkpoints/best-*")] and None
    ),
    "no card": lambda run: (run / "best" / "model.json").unlink(),
    "card cut": lambda run: (run / "best" / "model.json").write_text("{"),
    "no log": lambda run: (run / "log.txt").unlink(),
    "no environment": lambda run: (run / "environment.json").unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_happened_to_the_newest_checkpoint_the_run_is_the_same(
    stopped: tuple[Config, Path, Path], tmp_path: Path, fault: str
) -> None:
    config, whole, run = stopped[0], stopped[1], tmp_path / "run"
    shutil.copytree(stopped[2], run, symlinks=True)
    FAULTS[fault](run)
    train(config, run)
    assert_same_run(whole, run)
    for folder in ("checkpoints", "best"):
        assert sorted(p.name for p in (run / folder).iterdir()) == sorted(p.name for p in (whole / folder).iterdir())
    for weights in (whole / "best").glob("*.safetensors"):
        assert sha256(run / "best" / weights.name) == sha256(weights)


def all_damaged(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(b"")


def older_format(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*/manifest.json"):
        path.write_text(path.read_text().replace('"version": 2', '"version": 1'))


REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "none is whole": (all_damaged, (), r"(?s)no checkpoint is whole.*step-00000016: model.*step-00000014"),
    "older format": (older_format, (), r"step-00000016: checkpoint format version 1, this tlearn reads version 2"),
    "checkpoints are gone": (lambda run: shutil.rmtree(run / "checkpoints"), (), r"checkpoints: is gone; restore it"),
    "another config": (FAULTS["nothing"], ("seed=1",), "seed: 0 -> 1"),
    "another batch": (FAULTS["nothing"], ("batch.size=16",), "batch.size: 32 -> 16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_explained_and_nothing_is_touched(
    stopped: tuple[Config, Path, Path], photos: Path, tmp_path: Path, case: str
) -> None:
    fault, options, message = REFUSED[case]
    run = tmp_path / "run"
    shutil.copytree(stopped[2], run)
    fault(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    config = load_config(None, [f"data.path={photos}", *TINY, STAGES, "save_every.steps=8", "keep.best=2", *options])
    with pytest.raises(TlearnError, match=message):
        train(config, run, "auto", override=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    stopped: tuple[Config, Path, Path], photos: Path, tmp_path: Path
) -> None:
    config, whole, _ = stopped
    run_ranks(ranks.train_with_little_room, (config, tmp_path / "run", 5, 19), 1)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "not saved: " in log
    assert "training goes on, earlier checkpoints are whole" in log
    assert_same_run(whole, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_what_to_do(
    stopped: tuple[Config, Path, Path], tmp_path: Path
) -> None:
    config, whole, _ = stopped
    with pytest.raises(TlearnError, match=r"not saved: .*mend that and start the same command again"):
        run_ranks(ranks.train_with_little_room, (config, tmp_path / "run", 20, 10**6), 2)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step-00000016"
    run_ranks(train, (config, tmp_path / "run"), 2)
    for key in ("step", "lr", "batch_hash"):
        assert [row[key] for row in rows(whole, "step")] == [row[key] for row in rows(tmp_path / "run", "step")]


def test_a_killed_runs_lock_is_waited_for_as_long_as_its_workers_hold_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    worker, run = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    worker.lock()
    threading.Timer(0.3, worker.close).start()
    with closing(run):
        run.lock()
        assert worker._lock is None


# signals


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_in_an_evaluation_ends_it_and_the_evaluation_is_done_again(
    photos: Path, tmp_path: Path, world_size: int
) -> None:
    options = (STAGES, "save_every.epochs=5", "batch.size=26")
    config = load_config(None, [f"data.path={photos}", *TINY, *options])
    run_ranks(train, (config, tmp_path / "whole"), world_size)
    with pytest.raises(StoppedBySignalError, match=r"stopped by SIGTERM, everything is saved; .* --run"):
        run_ranks(ranks.train_and_send_in_evaluation, (config, tmp_path / "run", 2), world_size)
    assert [row["epoch"] for row in rows(tmp_path / "run", "epoch")] == [0]
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    progress = checkpoint.read_progress(saved)
    assert (progress.stage_step, progress.stage_epochs, progress.epoch_sums["n"]) == (16, 1, 200)
    run_ranks(train, (config, tmp_path / "run", "must"), world_size)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_second_sigint_leaves_at_once_and_what_was_saved_is_whole(
    stopped: tuple[Config, Path, Path], tmp_path: Path
) -> None:
    config, whole, _ = stopped
    left: list[float] = []

    def press_twice(processes: list[int]) -> None:
        def press() -> None:
            drill_wait(tmp_path / "run", 20)
            os.kill(processes[0], signal.SIGINT)
            time.sleep(2.5)  # sooner it would count as the same
            os.kill(processes[0], signal.SIGINT)
            left.append(time.monotonic())

        threading.Thread(target=press, daemon=True).start()

    with pytest.raises(RankFailedError, match="KeyboardInterrupt"):
        run_ranks(ranks.train_with_a_slow_disk, (config, tmp_path / "run", 18, 60.0), 1, press_twice)
    assert time.monotonic() - left[0] < 10
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step-00000016"
    train(config, tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("presses", "code"), [(1, 75), (2, 130)])
def test_the_exit_code_is_right_while_something_is_written(
    stopped: tuple[Config, Path, Path], tmp_path: Path, presses: int, code: int
) -> None:
    """In a program of its own, without `--nproc`."""
    run = tmp_path / "run"
    shutil.copytree(stopped[2], run)
    script = (
        "import os, time; from tlearn import checkpoint, cli; write = checkpoint._write\n"
        "def slow(*a):\n    write(*a); time.sleep(float(os.environ.pop('WRITE_S', 0)))\n"
        "checkpoint._write = slow\n"
        "if __name__ == '__main__': cli.main()"
    )
    command = [sys.executable, "-c", script, "train", "--run", str(run)]
    # the first checkpoint that is written takes so long
    environment = {**os.environ, "WRITE_S": "4" if presses == 1 else "60"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    drill_wait(run, 19, since=(run / "metrics.jsonl").stat().st_mtime_ns)
    process.send_signal(signal.SIGINT)
    if presses == 2:
        time.sleep(2.5)
        process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == code, told
    assert ("everything is saved" in told) == (presses == 1)
    train(stopped[0], run)
    assert_same_run(stopped[1], run)


def drill_wait(run: Path, step: int, since: int = 0) -> None:
    """Until metrics.jsonl has changed and holds a step."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if drill._changed_at(run) > since and len(drill._rows(run, "step")) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
def test_a_signal_to_a_run_that_only_scores_is_as_good(
    stopped: tuple[Config, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole, _ = stopped
    log = Tracker.log

    def log_and_send(self: Tracker, row: Row) -> None:
        log(self, row)
        if row["kind"] == "stage" and row["stage"] == "all":
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(Tracker, "log", log_and_send)
    with pytest.raises(StoppedBySignalError, match=r"stopped by SIGUSR2, everything is saved; .* --run"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "result.json").exists()
    train(config, tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_stopped_in_an_evaluation_twice_no_row_is_lost_or_doubled(
    stopped: tuple[Config, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole, _ = stopped
    log, score = Tracker.log, engine.evaluate

    class PowerCutError(Exception):
        pass

    def log_and_die(self: Tracker, row: Row) -> None:
        log(self, row)
        if row["kind"] == "epoch" and row["epoch"] == 1:
            raise PowerCutError

    def send(runtime: Any, *rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return score(runtime, *rest)

    monkeypatch.setattr(Tracker, "log", log_and_die)
    with pytest.raises(PowerCutError):
        train(config, tmp_path / "run")
    monkeypatch.setattr(Tracker, "log", log)
    monkeypatch.setattr(engine, "evaluate", send)
    with pytest.raises(StoppedBySignalError):
        train(config, tmp_path / "run")  # begins with the evaluation, whose row it cut
    monkeypatch.setattr(engine, "evaluate", score)
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    length = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert checkpoint.read_progress(saved).metrics_bytes == length
    train(config, tmp_path / "run")
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("every", "stop_at"), [("steps: 3", 7), ("steps: 7", 13), ("epochs: 1", 14), ("steps: 1", 20)])
def test_sums_that_are_read_a_step_late_are_saved_in_time(
    stopped: tuple[Config, Path, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    send_at_step: Callable[[int], None],
    every: str,
    stop_at: int,
) -> None:
    add = ledger.Ledger.add

    def late(self: ledger.Ledger, *arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(self.runtime), "device", torch.device("meta"))  # anything but a CPU
            patch.setattr(self.runtime, "fetch", lambda sums: sums.tolist, raising=False)
            patch.setattr(ledger, "_batch_hash", lambda runtime, keys: "")
            add(self, *arguments)

    config = load_config(None, [f"data.path={photos}", *TINY, STAGES, f"save_every={{{every}}}", "keep.best=2"])
    send_at_step(stop_at)
    monkeypatch.setattr(ledger.Ledger, "add", late)
    with pytest.raises(StoppedBySignalError):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    whole = [{**row, "batch_hash": ""} if "batch_hash" in row else row for row in rows(stopped[1])]
    assert rows(tmp_path / "run") == whole


# what may change, and what need not be there any more


@pytest.mark.slow
def test_options_that_do_not_change_the_numbers_are_free(stopped: tuple[Config, Path, Path], tmp_path: Path) -> None:
    shutil.copytree(stopped[2], tmp_path / "run")
    options = ("save_every={epochs: null, minutes: 3}", "data.workers=2", "keep.checkpoints=4", "run.audit=false")
    changed = load_config(tmp_path / "run" / "config.yaml", options)
    place = RunFolder(tmp_path / "run")
    with closing(place):
        found = place.newest_checkpoint("auto")
        progress = checkpoint.read_progress(newest(tmp_path / "run"))
        assert place.changes(found, changed, progress.data_fingerprint, "", override=False) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "differing"),
    [
        (["clip_norm=0.5"], ["clip_norm"]),
        (["batch.micro=8", "objective.label_smoothing=0.1"], ["batch.micro", "objective.label_smoothing"]),
        (["stages.1.optimizer.lr=0.1"], ["stages.1.optimizer.lr"]),
        (["stages.1.epochs=5"], ["stages.1.epochs"]),
        (["stages.2.epochs=1", "stages.2.train=[['.*', 0.5]]"], ["stages.2.train.0.1"]),
    ],
)
def test_what_may_change_on_the_way_needs_override(
    stopped: tuple[Config, Path, Path], tmp_path: Path, options: list[str], differing: list[str]
) -> None:
    shutil.copytree(stopped[2], tmp_path / "run")
    changed = load_config(tmp_path / "run" / "config.yaml", options)
    place = RunFolder(tmp_path / "run")
    with closing(place):
        found = place.newest_checkpoint("auto")
        fingerprint = checkpoint.read_progress(newest(tmp_path / "run")).data_fingerprint
        with pytest.raises(TlearnError, match=rf"{differing[0]}: .* \(goes on with --override\)"):
            place.changes(found, changed, fingerprint, "", override=False)
        changes = place.changes(found, changed, fingerprint, "", override=True)
    assert [change.partition(":")[0] for change in changes] == differing


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["seed=7", "batch.size=8", "data.max_train=50", "stages.0.epochs=9", "stages.1.epochs=1", "data.fit=pad"]
)
def test_what_would_make_it_another_run_cannot_be_overridden(
    stopped: tuple[Config, Path, Path], tmp_path: Path, option: str
) -> None:
    shutil.copytree(stopped[2], tmp_path / "run")
    changed = load_config(tmp_path / "run" / "config.yaml", [option])
    place = RunFolder(tmp_path / "run")
    with closing(place):
        found = place.newest_checkpoint("auto")
        with pytest.raises(TlearnError, match=rf"{option.partition('=')[0]}: [^\n]* -> [^\n]* \(cannot change"):
            place.changes(found, changed, "", "", override=True)


@pytest.mark.slow
def test_an_overridden_run_says_so_and_goes_on_without_the_flag(
    stopped: tuple[Config, Path, Path],
    tmp_path: Path,
    send_at_step: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(stopped[2], tmp_path / "run")
    config = load_config(tmp_path / "run" / "config.yaml", ["stages.2.epochs=2", "clip_norm=0.5"])
    monkeypatch.setattr("tlearn.run.run_stage", lambda *_: 1 / 0)  # before anything is saved
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "run", override=True)
    monkeypatch.setattr("tlearn.run.run_stage", engine.run_stage)
    send_at_step(20)
    with pytest.raises(StoppedBySignalError):
        train(load_config(tmp_path / "run" / "config.yaml", ["keep.best=1"]), tmp_path / "run")
    result = train(load_config(tmp_path / "run" / "config.yaml"), tmp_path / "run")
    assert result["overridden"] == ["from step 16: clip_norm: 1.0 -> 0.5", "from step 16: stages.2.epochs: 1 -> 2"]
    assert result["steps"] == 42
    assert len(result["top"]) == 1
    assert [path.name for path in (tmp_path / "run" / "best").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_goes_on_where_its_pretrained_weights_are_gone(
    tiny: MakeConfig, tmp_path: Path, send_at_step: Callable[[int], None], recorded: bool
) -> None:
    weights = tmp_path / "pretrained.safetensors"
    config = tiny("epochs=3", f"model.weights={weights}")
    net = build_model(tiny("seed=5"), 10).net
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, weights)
    train(config, tmp_path / "whole")
    send_at_step(9)
    with pytest.raises(StoppedBySignalError):
        train(config, tmp_path / "run")
    weights.unlink()
    train(load_config(tmp_path / "run" / "config.yaml") if recorded else config, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(TlearnError, match="no such file"):
        train(config, tmp_path / "new")


# what resuming costs


@pytest.mark.parametrize("step", [10, 1_000_000])
def test_nothing_of_what_was_done_is_read_again(
    tiny: MakeConfig, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config = tiny("stages=[{name: head, epochs: 200000, train: [[head, 1.0], ['.*', 0]]}]")
    run = load_script("resume_cost").make_run(config, tmp_path / "run", step)
    assert checkpoint.read_progress(run / "checkpoints" / f"step-{step:08d}").step == step
    read: list[int] = []
    read_sample = Split.read

    class EnoughError(Exception):
        pass

    def counted(self: Split, i: int) -> bytes:
        read.append(i)
        return read_sample(self, i)

    def log(self: Tracker, row: Row) -> None:
        if row["kind"] == "start":
            assert row["step"] == step
            return
        assert row["step"] == step + 1
        raise EnoughError

    monkeypatch.setattr(Split, "read", counted)
    monkeypatch.setattr(Tracker, "log", log)
    with pytest.raises(EnoughError):
        train(config, run)
    n = len(read_index(photos).splits["train"])
    assert len(read) == len(set(read)) in (n // 7, n // 7 + 1)  # one batch


# saving beside training


def make_saver(root: Path, every: str = "", keep: int = 2) -> Saver:
    tracker = Tracker.__new__(Tracker)
    tracker.wandb_id, tracker._lines, tracker._sinks = "w", None, []
    options = SaveEvery.model_validate(json.loads(every or "{}"))
    return Saver(root / "checkpoints", root / "best", None, tracker, options, Keep(checkpoints=keep), active=True)


def test_a_save_that_waits_does_not_pass_over_later_best_weights(tmp_path: Path) -> None:
    go_on = threading.Event()
    first, second = {"step": 7, "score": 0.1}, {"step": 14, "score": 0.2}
    with make_saver(tmp_path) as subject:
        subject.keep_best({"w": torch.ones(1)}, [first], first)
        subject._thread.submit(go_on.wait, 20)  # a machine with other things to do
        subject.save({"w": torch.ones(1)}, {}, Progress(step=14, best=[first]))
        subject.keep_best({"w": torch.zeros(1)}, [second], second)
        go_on.set()
        subject.wait()
    assert checkpoint.load_best(tmp_path / "best" / "model.safetensors")[1]["step"] == 14


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, save = threading.Event(), checkpoint.save

    def slow(*arguments: Any) -> Path:
        assert no_fork.locked()
        go_on.wait(20)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    tensor, progress = torch.ones(3), Progress(step=4)
    with make_saver(tmp_path) as subject:
        subject.save({"w": tensor}, {"w/exp_avg": tensor}, progress)
        tensor.zero_()
        progress.step, progress.stage = 5, 1
        progress.best.append({"step": 5})
        subject.step_took(0.2)
        go_on.set()
        subject.wait()
        subject.step_took(0.3)  # while it began the write was under way
        subject.step_took(0.1)
        subject.step_took(0.1)
        assert subject.cost.account()["save/slowdown"] == 2.5
        assert len(subject.cost.pauses_s) == len(subject.cost.writes_s) == 1
    restored = checkpoint.load(tmp_path / "checkpoints" / "step-00000004")
    assert restored.model["w"].tolist() == restored.optimizer["w/exp_avg"].tolist() == [1.0, 1.0, 1.0]
    assert asdict(restored.progress) == asdict(Progress(step=4, wandb_id="w"))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_does_not_wait_for_a_write(
    photos: Path, tiny: MakeConfig, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlearn.data.loader import Share
    from tlearn.data.source import open_source
    from tlearn.data.transforms import Preprocessing

    go_on, written = threading.Event(), threading.Event()
    monkeypatch.setattr(checkpoint, "save", lambda *_: (go_on.wait(5), written.set()))
    p = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    source = open_source(tiny(f"data.workers={workers}"))
    loader = source.eval_loader("val", p, Share(32), torch.device("cpu"), torch.float32)
    with closing(loader), make_saver(tmp_path) as subject:
        for evaluation in range(2):
            if evaluation:  # in the first one workers are forked
                subject.save({}, {}, Progress())
            with loader.steps(0, loader.steps_per_epoch) as steps:
                assert sum(len(batch.labels) for step in steps for batch in step) == 120
        assert not written.is_set()
        go_on.set()


def test_nobody_forks_while_something_is_written(photos: Path, tiny: MakeConfig) -> None:
    from tlearn.data.loader import Share
    from tlearn.data.source import open_source
    from tlearn.data.transforms import Preprocessing

    p = Preprocessing(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    loader = open_source(tiny("data.workers=1")).train_loader(p, Share(32), torch.device("cpu"), torch.float32)
    released: list[float] = []

    def release() -> None:
        released.append(time.monotonic())
        no_fork.release()

    no_fork.acquire()
    threading.Timer(0.3, release).start()
    with loader.steps(0, 1) as steps:
        assert time.monotonic() >= released[0]
        assert len(list(steps)) == 1


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ('{"epochs": 1}', [4, 8, 12, 16]),
        ('{"epochs": 2, "steps": 5}', [5, 8, 10, 15, 16]),
        ('{"epochs": null, "steps": 6}', [6, 12]),
        ('{"epochs": null}', []),
    ],
)
def test_checkpoints_are_due_by_epochs_and_steps(tmp_path: Path, every: str, expected: list[int]) -> None:
    subject = make_saver(tmp_path, every)
    assert [k for k in range(1, 17) if subject.is_due(Progress(step=k, stage_step=k), 4)] == expected


def test_a_checkpoint_is_due_minutes_after_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: clock[0])
    subject = make_saver(tmp_path, '{"minutes": 2}')
    due = []
    for _ in range(5):
        clock[0] += 50
        due.append(subject.is_due_by_clock)
        if due[-1]:
            subject.save({}, {}, Progress(step=1))
            subject.wait()
    assert due == [False, False, True, False, False]
    assert not make_saver(tmp_path, '{"minutes": null}').is_due_by_clock


@pytest.mark.slow
def test_the_clock_of_rank_0_decides_for_all(photos: Path, tmp_path: Path) -> None:
    options = ("epochs=2", "strategy=full", "save_every={epochs: null, minutes: 0.000001}", "keep.checkpoints=100")
    run_ranks(train, (load_config(None, [f"data.path={photos}", *TINY, *options]), tmp_path / "run"), 2)
    saved = [checkpoint._position(path)[0] for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert sorted(saved) == [*range(1, 15), 14]


def test_a_mistake_in_writing_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_saver(tmp_path)
    monkeypatch.setattr(checkpoint, "save", lambda *_: {}["nothing"])
    subject.save({}, {}, Progress())
    with pytest.raises(KeyError, match="nothing"):
        subject.wait()


# drill


@pytest.mark.slow
def test_drill_finds_nothing_where_there_is_nothing(photos: Path) -> None:
    report = drill.drill(None, [f"data.path={photos}", *TINY, STAGES], kills=2)
    assert report["equal"]
    same, other = report["legs"]
    assert [stop["signal"] for stop in same["interruptions"]] == ["SIGKILL", "SIGTERM"]
    assert [stop["processes"] for stop in other["interruptions"]] == [1, 2, 3]
    assert 0 < other["largest_difference"] < 1e-9
    assert report["folder"] is None
    assert [line.split()[0] for line in drill.verdict(report)] == ["EQUAL", "EQUAL"]


@pytest.mark.slow
def test_drill_finds_a_state_that_is_not_saved(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "_rank", ranks.train_forgetful)
    monkeypatch.setattr(drill, "_other_worlds", lambda nproc, config: [])
    stages = "stages=[{name: all, epochs: 3, train: [['.*', 1.0]], optimizer: {name: adam, lr: 0.01}}]"
    report = drill.drill(None, [f"data.path={photos}", *TINY, stages], kills=2)
    shutil.rmtree(report["folder"])
    (leg,) = report["legs"]
    assert not report["equal"]
    went_on = min(stop["started_at_step"] for stop in leg["interruptions"][1:])
    named = leg["first_difference"].split()
    assert named[0] == "step"
    assert int(named[1].rstrip(":")) > went_on
    assert "train/loss" in leg["first_difference"]
    assert "does not repeat" not in leg["first_difference"]


@pytest.mark.parametrize("equal", [True, False])
def test_the_verdict_is_printed_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], equal: bool
) -> None:
    stop = {"signal": "SIGKILL", "processes": 1, "started_at_step": 3, "after_step": 5}
    leg = {"name": "same processes", "precision": "fp32", "steps": 9, "exact": True, "interruptions": [stop]}
    leg |= {"first_difference": None if equal else "step 4: train/loss 1 instead of 2", "largest_difference": 0.0}
    report = {"equal": equal, "legs": [leg | {"equal": equal}], "folder": None}
    monkeypatch.setattr(drill, "drill", lambda path, overrides, **options: report | {"called": [overrides, options]})
    code = run_cli(monkeypatch, "drill", "data.path=x", "--kills", "1", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert (code, printed["equal"]) == (0 if equal else 1, equal)
    assert printed["called"] == [["data.path=x"], {"nproc": 1, "kills": 1, "seed": 0}]
    assert run_cli(monkeypatch, "drill", "data.path=x") == code
    told = capsys.readouterr().out
    assert ("EQUAL    same processes" in told) == equal
    assert ("DIFFERS  same processes" in told and "step 4: train/loss 1 instead of 2" in told) != equal
    assert "NOT TRIED: other numbers of processes" in told


def test_a_stream_is_not_drilled(tmp_path: Path) -> None:
    stream = "data.stream={val: b.tar, classes: [a, b], train_samples: 9, val_samples: 9}"
    with pytest.raises(TlearnError, match="nothing to drill"):
        drill.drill(None, ["data.path=a.tar", "data.reader=stream", stream])


def test_the_copy_keeps_the_recipe_and_is_short(photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {image_size: 224}\nbatch: {size: 64, micro: 16}\n")
    options = [f"data.path={photos}", *TINY[:2], STAGES]
    copy, own = drill.short_copy(recipe, options), load_config(recipe, options)
    assert [(s.name, s.train, s.optimizer) for s in copy.stages or []] == [
        (s.name, s.train, s.optimizer) for s in own.stages or []
    ]
    assert (copy.batch.size, copy.batch.micro, copy.data.image_size, copy.data.max_train) == (16, 8, 64, 79)
    assert sum(stage.epochs for stage in copy.stages or []) == 5
    assert copy.tracking.wandb.mode == "disabled"
