"""The main job: what a run writes, that it can be repeated, interrupted and resumed, and that stages freeze."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import tlearn.run
from tlearn import console, engine, folder, ledger
from tlearn.config import Config
from tlearn.configfile import dump_config, load_config
from tlearn.data.plan import Options
from tlearn.data.prepare import prepare
from tlearn.errors import DivergedError, StoppedBySignalError, TlearnError
from tlearn.evaluate import evaluate
from tlearn.folder import RunFolder
from tlearn.models.build import build_model
from tlearn.predict import load
from tlearn.run import train
from tlearn.tracking import Tracker, WandB

MakeConfig = Callable[..., Config]

STAGES = (
    "stages=["
    "{name: head, epochs: 2, train: [[head, 1.0], ['.*', 0]], optimizer: {name: adam, lr: 0.01}, "
    " schedule: {name: cosine_warm_restarts, t_0: 1}},"
    "{name: last, epochs: 2, train: [[head, 1.0], ['last:1', 0.5], ['.*', 0]], optimizer: {name: adam, lr: 0.003}},"
    "{name: all, epochs: 1, train: [['.*', 1.0]], optimizer: {name: sgd, lr: 0.01}, image_size: 40}]"
)
CLOCK = ("images_per_s", "seconds", "train_images_per_s", "save/pause_s", "save/write_s", "save/slowdown")


def rows(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in CLOCK}
        for row in lines
        if row["kind"] == kind or (kind is None and row["kind"] != "start")
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a run."""
    newest = max((folder / "checkpoints").iterdir())
    return load_file(newest / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit."""
    assert rows(a) == rows(b)
    for name, tensor in weights(a).items():
        assert torch.equal(tensor, weights(b)[name]), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (a, b)]
    for result in results:
        for key in CLOCK:
            result.pop(key, None)
    assert results[0] == results[1]


@pytest.fixture
def send_at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sends this process a signal when the row of a step is logged."""

    def arm(step: int, number: int) -> None:
        log = Tracker.log

        def log_and_send(self: Tracker, row: dict[str, Any]) -> None:
            log(self, row)
            if row["kind"] == "step" and row["step"] == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Tracker, "log", log_and_send)

    return arm


def test_a_run_folder_holds_what_the_contract_names(tiny: MakeConfig, tmp_path: Path) -> None:
    result = train(tiny("strategy=staged", "epochs=3"), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.yaml", "environment.json", "metrics.jsonl", "result.json", "checkpoints", "best", "log.txt"
    }  # fmt: skip
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["val"]["n"] == result["val"]["n_expected"] == 120
    assert result["val"].keys() >= {"top1", "loss", "n", "n_expected", "per_class"}
    assert result["best"]["selected_on"] == "val"
    assert result["image_size_px"] == 32
    assert result["world_size"] == 1
    steps = rows(tmp_path / "run", "step")
    assert [row["step"] for row in steps] == list(range(1, 22))  # 3 epochs of ceil(200 / 32) = 7
    assert steps[-1]["samples"] == 600
    assert [row["stage"] for row in rows(tmp_path / "run", "stage")] == ["head", "last_block", "all"]
    for row in rows(tmp_path / "run", "epoch"):
        assert row.keys() >= {"stage", "epoch", "step", "samples", "train/loss", "train/top1", "val/top1@32"}
        assert 0 <= row["train/top1"] <= 1


def test_the_first_loss_is_that_of_a_uniform_guess(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("epochs=1"), tmp_path / "run")
    assert rows(tmp_path / "run", "step")[0]["train/loss"] == pytest.approx(math.log(10), abs=1e-6)


@pytest.mark.slow
def test_training_learns(tiny: MakeConfig, tmp_path: Path) -> None:
    result = train(tiny("strategy=full", "epochs=6", "optimizer.lr=0.01"), tmp_path / "run")
    losses = [row["train/loss"] for row in rows(tmp_path / "run", "epoch")]
    assert losses[-1] < 0.6 * losses[0]
    assert result["val"]["top1"] > 0.3  # ten equal classes: chance is 0.1


@pytest.mark.slow
def test_the_best_epoch_is_what_is_scored_at_the_end(tiny: MakeConfig, tmp_path: Path) -> None:
    result = train(tiny("strategy=full", "epochs=5", "optimizer.lr=0.03", "seed=1"), tmp_path / "run")
    epochs = rows(tmp_path / "run", "epoch")
    top1 = [row["val/top1@32"] for row in epochs]
    assert result["val"]["top1"] == max(top1)
    assert result["best"]["epoch"] == top1.index(max(top1))
    assert result["val"]["loss"] == pytest.approx(epochs[top1.index(max(top1))]["val/loss@32"], rel=1e-6)


@pytest.mark.slow
def test_the_recorded_config_repeats_the_run_bit_for_bit(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("strategy=staged", "epochs=3", "seed=5", "batch.micro=13"), tmp_path / "a")
    train(load_config(tmp_path / "a" / "config.yaml"), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert load_config(tmp_path / "a" / "config.yaml") == load_config(tmp_path / "b" / "config.yaml")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def whole(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages that nothing interrupted."""
    options = (
        f"data.path={photos}",
        *TINY,
        STAGES,
        f"precision={request.param}",
        "data.workers=1",
        "model.dropout=0.3",
    )
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(load_config(None, options), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 7, 16, 30], ids=["first epoch", "end of an epoch", "second stage", "another size"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    whole: Path, tmp_path: Path, send_at_step: Callable[[int, int], None], step: int
) -> None:
    config = load_config(whole / "config.yaml")
    send_at_step(step, signal.SIGTERM)
    with pytest.raises(StoppedBySignalError):
        train(config, tmp_path / "cut")
    steps_done = rows(tmp_path / "cut", "step")[-1]["step"]
    assert step <= steps_done <= step + 1
    assert not (tmp_path / "cut" / "result.json").exists()
    train(config, tmp_path / "cut", resume="must")
    assert_same_run(whole, tmp_path / "cut")


@pytest.mark.slow
def test_a_run_that_lost_its_newest_rows_and_checkpoint_writes_them_again(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(STAGES, "save_every.steps=5")
    train(config, tmp_path / "whole")

    class PowerCutError(Exception):
        pass

    log = Tracker.log

    def log_until(self: Tracker, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == 18:
            raise PowerCutError

    monkeypatch.setattr(Tracker, "log", log_until)
    with pytest.raises(PowerCutError):
        train(config, tmp_path / "cut")
    monkeypatch.undo()
    assert rows(tmp_path / "cut")[-1]["step"] == 18
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # torn by the power cut
    newest = max((tmp_path / "cut" / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes(b"torn")
    train(config, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_accumulation_and_workers_change_neither_batches_nor_losses(tiny: MakeConfig, tmp_path: Path) -> None:
    base = ("strategy=full", "epochs=1", "precision=fp64", "batch.size=31", "objective.class_weight=inverse")
    train(tiny(*base), tmp_path / "a")
    train(tiny(*base, "batch.micro=4", "data.workers=2"), tmp_path / "b")
    frozen = ("model.batch_norm=frozen",)
    train(tiny(*base, *frozen), tmp_path / "c")
    train(tiny(*base, *frozen, "batch.micro=4", "data.workers=2"), tmp_path / "d")
    a, b, c, d = (rows(tmp_path / name, "step") for name in "abcd")
    assert [row["batch_hash"] for row in a] == [row["batch_hash"] for row in b]
    assert len({row["batch_hash"] for row in a}) == len(a)
    # train-mode BatchNorm sees the micro-batch, so only a frozen one makes the losses comparable
    assert [row["train/loss"] for row in c] == pytest.approx([row["train/loss"] for row in d], rel=1e-9)
    assert [row["train/loss"] for row in a] != pytest.approx([row["train/loss"] for row in b], rel=1e-9)


def test_frozen_parts_do_not_move_and_trained_parts_do(tiny: MakeConfig, tmp_path: Path) -> None:
    config = tiny("strategy=partial", "epochs=2", "optimizer.lr=0.01")
    before = build_model(config, 10)
    train(config, tmp_path / "run")
    after = weights(tmp_path / "run")
    trained = {*before.blocks[-1], "classifier.weight", "classifier.bias"}
    for name, tensor in before.net.state_dict().items():
        if name in trained:
            assert not torch.equal(tensor, after[name]), name
        elif (
            name.removesuffix(".running_mean").removesuffix(".running_var")
            not in {parameter.rpartition(".")[0] for parameter in trained}
            and "num_batches" not in name
        ):
            assert torch.equal(tensor, after[name]), name  # BatchNorm's running statistics too


@pytest.mark.slow
def test_learning_rates_follow_stage_multiplier_and_restart(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny(STAGES), tmp_path / "run")
    steps = rows(tmp_path / "run", "step")
    assert steps[0]["lr"] == {"1": 0.01}
    assert steps[6]["lr"]["1"] < 0.001
    assert steps[7]["lr"] == {"1": 0.01}  # a warm restart after an epoch of 7 steps
    assert steps[14]["lr"] == {"1": 0.003, "0.5": 0.0015}
    assert steps[28]["lr"] == {"1": 0.01}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_on_in_every_stage_and_in_evaluation(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, expected: torch.dtype
) -> None:
    seen: dict[tuple[str, bool], set[torch.dtype]] = {}
    stage_name = ""

    def spy(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.setdefault((stage_name, torch.is_grad_enabled()), set()).add(output.dtype)

    def run_stage(run: engine.Run, stage: Any, *rest: Any) -> Any:
        nonlocal stage_name
        stage_name = stage.name
        handle = run.model.net.get_submodule(run.model.head).register_forward_hook(spy)
        try:
            return engine.run_stage(run, stage, *rest)
        finally:
            handle.remove()

    monkeypatch.setattr("tlearn.run.run_stage", run_stage)
    train(tiny(STAGES, f"precision={precision}", "save_every.epochs=5"), tmp_path / "run")
    assert seen == {(name, grad): {expected} for name in ("head", "last", "all") for grad in (True, False)}


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_steps_with_non_finite_gradients_are_skipped_then_end_the_run(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_norm: str
) -> None:
    poisoned = iter([False, True] + [False] * 6 + [True] * 100)
    step = engine.train_step
    reached: list[dict[str, torch.Tensor]] = []
    keys: list[list[int]] = []

    def poison(run: engine.Run, *rest: Any) -> torch.Tensor:
        micro_batches = rest[-1]
        if next(poisoned):
            micro_batches[0].images.fill_(float("nan"))
        keys.append(micro_batches[0].keys.numpy().view(np.uint64).tolist())
        reached.append({name: tensor.clone() for name, tensor in run.model.net.state_dict().items()})
        return step(run, *rest)

    monkeypatch.setattr(engine, "train_step", poison)
    monkeypatch.setattr(ledger, "MAX_REJECTED", 3)
    with pytest.raises(
        DivergedError, match=r"the loss is not finite.*checkpoints/step-00000007.*rate of 0.0001 instead of 0.001"
    ):
        train(tiny("strategy=full", f"model.batch_norm={batch_norm}"), tmp_path / "run")
    steps = rows(tmp_path / "run", "step")
    rejected = ["rejected" in row for row in steps]
    assert rejected == [False, True] + [False] * 6 + [True] * 3
    assert [row["train/loss"] is None for row in steps] == rejected
    assert steps[1]["rejected"] == [f"{key:016x}" for key in keys[1]]
    for name, tensor in reached[2].items():
        assert torch.equal(tensor, reached[1][name]), name  # the rejected step left no trace
    (epoch,) = rows(tmp_path / "run", "epoch")
    assert math.isfinite(epoch["train/loss"])
    assert math.isfinite(epoch["val/loss@32"])


def test_a_parameter_that_the_model_does_not_use_is_named(tiny: MakeConfig, tmp_path: Path) -> None:
    def build(config: Config, *rest: Any) -> Any:
        model = build_model(config, *rest)
        model.net.register_parameter("idle", torch.nn.Parameter(torch.zeros(1)))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tlearn.run.build_model", build)
        with pytest.raises(TlearnError, match="idle"):
            train(tiny("strategy=full"), tmp_path / "run")


def test_resume_never_and_must(tiny: MakeConfig, tmp_path: Path) -> None:
    config = tiny("strategy=feature_extraction", "epochs=1")
    with pytest.raises(TlearnError, match="no checkpoint"):
        train(config, tmp_path / "run", resume="must")
    assert not (tmp_path / "run").exists()
    train(config, tmp_path / "run")
    with pytest.raises(TlearnError, match="holds a run"):
        train(config, tmp_path / "run", resume="never")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    train(config, tmp_path / "run")  # finished already: only the final scores are made again
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_folder_of_another_run_is_refused_with_the_options_that_differ(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("epochs=1"), tmp_path / "run")
    with pytest.raises(TlearnError, match="seed: 0 -> 1"):
        train(tiny("epochs=1", "seed=1"), tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(TlearnError, match="holds no run"):
        train(tiny("epochs=1"), tmp_path / "other")


def test_a_held_out_test_split_is_scored_once(
    tmp_path: Path, photo_folder: Path, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = prepare(photo_folder, tmp_path / "data", Options(test=0.2))
    n_test = len(index.splits["test"])
    scored: list[int] = []

    def counted(runtime: Any, net: Any, loader: Any, classes: Any) -> Any:
        scored.append(loader.samples_per_epoch)
        return evaluate(runtime, net, loader, classes)

    for module in (engine, tlearn.run):
        monkeypatch.setattr(module, "evaluate", counted)
    result = train(tiny(f"data.path={tmp_path / 'data'}", "epochs=2"), tmp_path / "run")
    assert scored == [120, 120, 120, n_test]  # val after each epoch and for the best one
    assert result["test"]["n"] == n_test == result["test"]["n_expected"]
    assert sum(c["n"] for c in result["test"]["per_class"].values()) == n_test


def test_the_gradient_is_clipped(tiny: MakeConfig, tmp_path: Path) -> None:
    one_step = ("strategy=full", "epochs=1", "batch.size=200", "schedule.name=constant", "model.batch_norm=frozen")
    optimizer = "optimizer={name: sgd, lr: 1.0, momentum: 0.0}"
    stages = "stages=[{name: all, epochs: 1, train: [['.*', 1.0]]}]"
    config = tiny(*one_step[2:], optimizer, stages, "clip_norm=0.001")
    before = build_model(config, 10).net.state_dict()
    train(config, tmp_path / "run")
    change = [(tensor - before[name]).flatten().double() for name, tensor in weights(tmp_path / "run").items()]
    assert float(torch.cat(change).norm()) == pytest.approx(0.001, rel=1e-3)


def test_checkpoints_are_written_every_so_many_steps(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("strategy=feature_extraction", "epochs=2", "save_every={epochs: 9, steps: 5}"), tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == ["step-00000010", "step-00000014"]  # the last two of 5, 10 and the end


def test_a_bare_folder_of_images_is_prepared_into_the_cache_once(
    tiny: MakeConfig, tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    config = tiny(f"data.path={photo_folder}", "strategy=feature_extraction", "epochs=1")
    result = train(config, tmp_path / "run")
    assert result["val"]["n"] == 120
    (cached,) = (tmp_path / "cache" / "prepared").iterdir()
    made = (cached / "index.json").stat().st_mtime_ns
    train(config, tmp_path / "run2")
    assert (cached / "index.json").stat().st_mtime_ns == made


def test_quick_caps_images_size_and_epochs(tiny: MakeConfig, tmp_path: Path) -> None:
    written = tmp_path / "full.yaml"
    written.write_text(dump_config(tiny("epochs=30", "data.image_size=64", "batch.size=25")))
    given = ("quick.samples=50", "quick.epochs=3", "quick.image_size=32")
    written.write_text(written.read_text().replace("size: 25", "size: 190"))  # the batch is capped like the images
    assert load_config(written, given, quick=True).batch.size == 50
    written.write_text(written.read_text().replace("size: 190", "size: 25"))
    result = train(load_config(written, given, quick=True), tmp_path / "run")
    assert result["image_size_px"] == 32
    assert result["val"]["n"] == 50
    assert {c["n"] for c in result["val"]["per_class"].values()} == {5}
    assert len(rows(tmp_path / "run", "epoch")) == 3
    assert len(rows(tmp_path / "run", "step")) == 6


@pytest.fixture
def wandb_folder(tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    train(tiny("strategy=feature_extraction", "epochs=1", "tracking.wandb.mode=online"), tmp_path / "run")
    return tmp_path / "run"


def test_wandb_records_offline_where_there_is_no_key(wandb_folder: Path) -> None:
    (record,) = (wandb_folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"val/top1@32" in record.read_bytes()


def test_a_run_goes_on_where_wandb_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise BrokenPipeError("its process is no more")

    sink, ended = WandB.__new__(WandB), []
    sink._run, sink._teardown = Gone(), lambda: ended.append(True)
    sink.log({"kind": "step", "step": 1})
    sink.log({"kind": "step", "step": 2})
    sink.close()
    assert capfd.readouterr().err.count("W&B is lost (BrokenPipeError: its process is no more)") == 1
    assert ended == [True]


@pytest.mark.slow
def test_a_resumed_run_continues_the_same_wandb_run(
    wandb_folder: Path, tiny: MakeConfig, send_at_step: Callable[[int, int], None]
) -> None:
    config = tiny("strategy=feature_extraction", "epochs=3", "tracking.wandb.mode=offline")
    folder = wandb_folder.with_name("stopped")
    send_at_step(9, signal.SIGTERM)
    with pytest.raises(StoppedBySignalError):
        train(config, folder)
    train(config, folder)
    ids = [path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")]
    assert len(ids) == 2
    assert len(set(ids)) == 1


def test_data_that_were_moved_are_the_same_data(tiny: MakeConfig, photos: Path, tmp_path: Path) -> None:
    config = tiny("strategy=feature_extraction", "epochs=1")
    first = train(config, tmp_path / "run")
    shutil.copytree(photos, tmp_path / "moved")
    assert (
        train(tiny("strategy=feature_extraction", "epochs=1", f"data.path={tmp_path / 'moved'}"), tmp_path / "run")[
            "val"
        ]
        == first["val"]
    )


def test_a_run_is_not_scored_on_data_that_have_changed(tiny: MakeConfig, photo_folder: Path, tmp_path: Path) -> None:
    index = prepare(photo_folder, tmp_path / "data", Options(test=0.1))
    train(tiny(f"data.path={index.root}", "strategy=feature_extraction", "epochs=1"), tmp_path / "run")
    shutil.rmtree(index.root)
    prepare(photo_folder, index.root, Options(test=0.2))
    with pytest.raises(TlearnError, match="other images than when this run was trained"):
        load(tmp_path / "run").evaluate()


def test_what_is_shown_after_a_run_is_not_in_its_log(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("strategy=feature_extraction", "epochs=1"), tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    console.show("something else")
    assert (tmp_path / "run" / "log.txt").read_text() == log


def test_a_run_does_not_go_on_with_other_images(
    tiny: MakeConfig, photo_folder: Path, tmp_path: Path, send_at_step: Callable[[int, int], None]
) -> None:
    index = prepare(photo_folder, tmp_path / "data", Options(test=0.1))
    config = tiny(f"data.path={index.root}", "epochs=3")
    send_at_step(2, signal.SIGTERM)
    with pytest.raises(StoppedBySignalError):
        train(config, tmp_path / "run")
    shutil.rmtree(index.root)
    prepare(photo_folder, index.root, Options(test=0.2))
    with pytest.raises(TlearnError, match="other images"):
        train(config, tmp_path / "run")


def test_a_run_folder_belongs_to_one_process_at_a_time(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PATIENCE_S", 0.1)
    config = tiny("strategy=feature_extraction", "epochs=1")
    train(config, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    other = RunFolder(tmp_path / "run")
    with closing(other):
        other.lock()
        with pytest.raises(TlearnError, match="another process is at work here"):
            train(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    train(config, tmp_path / "run")  # the refused one holds nothing
    train(config, tmp_path / "run")


def test_an_edited_config_does_not_pass_for_the_one_that_trained(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("strategy=feature_extraction", "epochs=1"), tmp_path / "run")
    written = tmp_path / "run" / "config.yaml"
    recorded = written.read_text()
    written.write_text(recorded.replace("seed: 0", "seed: 1"))
    with pytest.raises(TlearnError, match="seed: 0 -> 1"):
        train(load_config(written), tmp_path / "run")
    written.write_text(recorded)
    train(load_config(written), tmp_path / "run")


def test_speed_is_that_of_single_steps(tiny: MakeConfig, tmp_path: Path) -> None:
    train(tiny("strategy=full", "epochs=3", "batch.size=40"), tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    speeds = [row["images_per_s"] for row in lines if row["kind"] == "step"]
    assert max(speeds) < 20 * statistics.median(speeds)  # not the time between two looks at the clock


@pytest.mark.slow
def test_an_accelerators_steps_are_read_one_late_and_none_is_lost(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny("epochs=2"), tmp_path / "at_once")
    unread: list[bool] = []
    add = ledger.Ledger.add

    def late(self: ledger.Ledger, *arguments: Any) -> None:
        device = torch.device("meta")  # anything but a CPU
        with monkeypatch.context() as patch:
            patch.setattr(type(self.runtime), "device", device)
            patch.setattr(self.runtime, "fetch", lambda sums: sums.tolist, raising=False)
            patch.setattr(ledger, "_batch_hash", lambda runtime, keys: "")
            add(self, *arguments)
        unread.append(self._pending is not None)

    monkeypatch.setattr(ledger.Ledger, "add", late)
    train(tiny("epochs=2"), tmp_path / "late")
    assert all(unread)
    for kind in ("step", "epoch", "stage"):
        a, b = ([{**row, "batch_hash": ""} for row in rows(tmp_path / f, kind)] for f in ("at_once", "late"))
        assert a == b


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 1.0), (0.6, 2.0), (0.6, 1.0), (0.6, 1.5)], 2),
        ([(0.5, 1.0), (0.5, 1.0)], 0),
        ([(0.5, None), (0.5, 3.0)], 1),
        ([(0.6, None), (0.5, 0.1)], 0),
    ],
)
def test_the_best_epoch_has_the_most_hits_and_then_the_lowest_loss(
    scores: list[tuple[float, float | None]], best: int
) -> None:
    ranked = [engine._rank({"top1": top1, "loss": loss}) for top1, loss in scores]
    assert ranked.index(max(ranked)) == best
