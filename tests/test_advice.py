"""Advice from the symptoms of a run, on made-up rows and on a real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_cli import run

from tlearn.advice import Seen, advise, read_run
from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.errors import TlearnError
from tlearn.run import train
from tlearn.stages import expand

Row = dict[str, Any]


def epochs(train: Sequence[float], val: Sequence[float]) -> list[Row]:
    return [
        {"kind": "epoch", "stage": "all", "epoch": i, "train/top1": t, "train/loss": 1 - t, "val/top1@64": v}
        for i, (t, v) in enumerate(zip(train, val, strict=True))
    ]


def steps(losses: Sequence[float | None]) -> list[Row]:
    return [{"kind": "step", "stage": "all", "step": i + 1, "train/loss": x} for i, x in enumerate(losses)]


def seen(rows: list[Row], *options: str, n: int | None = 10_000, text: str = "") -> Seen:
    named = [] if any(option.startswith("stages=") for option in options) else ["strategy=full", "epochs=4"]
    config = expand(load_config(None, ["data.path=x", *named, *options]))
    result = {"val": {"top1": 0.8, "n": n}} if n else None
    return Seen(config, rows, result, text, n is not None)


def only(found: Seen) -> tuple[str, str, str]:
    (advice,) = advise(found)
    return tuple(advice)


GOOD = epochs([0.6, 0.75, 0.85, 0.9], [0.6, 0.7, 0.8, 0.8])


def test_a_run_without_symptoms_gets_no_advice() -> None:
    assert advise(seen([*steps([2.0, 1.5, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4]), *GOOD])) == []


def test_steps_that_are_not_finite_ask_for_a_tenth_of_the_rate() -> None:
    rows = steps([2.0, 1.0, None, 1.0])
    symptom, numbers, options = only(seen([*rows, *GOOD], "optimizer.lr=0.01", "precision=bf16"))
    assert symptom == "loss or gradient not finite"
    assert numbers == "1 of 4 steps, first at step 3 (stage all, rate 0.01)"
    assert options == "optimizer.lr=0.001 or precision=fp32"
    rows[1]["rejected"] = ["00aa"]
    assert only(seen([*rows, *GOOD]))[1].startswith("2 of 4 steps, first at step 2")


def test_a_rising_loss_asks_for_a_third_of_the_rate_of_its_stage() -> None:
    stages = "stages=[{name: all, epochs: 4, train: [['.*', 1]], optimizer: {name: sgd, lr: 0.3}}]"
    rows = steps([1.0, 1.0, 1.1, 1.2, 1.4, 1.5, 1.9, 2.0])
    symptom, numbers, options = only(seen([*rows, *GOOD], stages))
    assert symptom == "training loss rises"
    assert "1 in the first quarter of 8 steps, 1.95 in the last (rate 0.3)" in numbers
    assert options == "stages.0.optimizer.lr=0.1"


def test_accuracy_that_jumps_asks_for_a_larger_batch_unless_it_is_noise() -> None:
    rows = epochs([0.7, 0.7, 0.8, 0.8, 0.85], [0.8, 0.6, 0.8, 0.65, 0.75])
    symptom, numbers, options = only(seen(rows))
    assert symptom == "val accuracy jumps about"
    assert "fell 2 times in 5 epochs, by up to 20.0%" in numbers
    assert options == "batch.size=64 or optimizer.lr=0.00033"
    assert advise(seen(rows, n=10)) == []  # with 10 images a fifth is nothing


@pytest.mark.parametrize(
    "text",
    [
        "ended by OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "state OUT_OF_MEMORY",
        "killed by SIGKILL",
    ],
)
def test_out_of_memory_asks_for_parts_or_a_smaller_size(text: str) -> None:
    found = advise(seen([], "data.image_size=224", n=None, text=f"first line\n{text}\n"))
    assert found[0].symptom == "out of memory"
    assert f"batch 32 at 224 px: {text}" in found[0].numbers
    assert found[0].options == "batch.find=true or data.image_size=192"
    found = advise(seen([], "data.image_size=64", "batch.find=true", "batch.micro=8", n=None, text=text))
    assert found[0].options == "batch.micro=4"


def test_val_far_below_train_asks_to_train_less_and_to_augment_more() -> None:
    rows = epochs([0.8, 0.9, 0.98, 0.99], [0.6, 0.7, 0.7, 0.7])
    symptom, numbers, options = only(seen(rows))
    assert symptom == "val far below train"
    assert numbers == "last epoch: train top-1 99.0%, val 70.0%"
    assert "strategy=partial or feature_extraction" in options
    assert "data.augment.scale=[0.17, 1.0]" in options
    assert "strategy" not in only(seen(rows, "stages=[{name: all, epochs: 4, train: [[head, 1], ['.*', 0]]}]"))[2]


def test_low_train_accuracy_asks_for_more_of_everything() -> None:
    stages = "stages=[{name: all, epochs: 4, train: [[head, 1], ['.*', 0]]}]"
    symptom, numbers, options = only(seen(epochs([0.2, 0.3, 0.4, 0.4], [0.3, 0.3, 0.4, 0.4]), stages))
    assert symptom == "even train accuracy is low"
    assert numbers == "last epoch of 4: train top-1 40.0%"
    assert options == "stages.0.epochs=8 or unfreeze more (strategy=staged) or optimizer.lr=0.003"


def test_a_last_epoch_that_is_the_best_asks_for_more_epochs() -> None:
    symptom, numbers, options = only(seen(epochs([0.6, 0.7, 0.75, 0.8], [0.6, 0.7, 0.74, 0.79])))
    assert symptom == "still improving at the end"
    assert numbers == "the last epoch is the best: val top-1 79.0%, 74.0% before"
    assert options == "stages.0.epochs=8"


def test_a_run_that_was_stopped_is_said_to_go_on() -> None:
    symptom, numbers, options = only(seen(GOOD[:2], n=None))
    assert (symptom, numbers) == ("not finished", "2 of 4 epochs")
    assert "tlearn train --run" in options


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TlearnError, match="holds no run"):
        read_run(tmp_path)


@pytest.mark.slow
def test_a_run_at_far_too_high_a_rate_is_found_out(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ("strategy=scratch", "epochs=3", "optimizer={name: sgd, lr: 300.0}", "schedule={name: constant}")
    train(tiny(*options, "clip_norm=null", "model.batch_norm=frozen"), folder)
    assert run(monkeypatch, "advise", folder, "--json") == 0
    found = {row["symptom"]: row for row in json.loads(capsys.readouterr().out)}
    bad = found.get("loss or gradient not finite") or found["training loss rises"]
    assert bad["options"].startswith("optimizer.lr=")
    assert run(monkeypatch, "advise", folder) == 0
    assert "optimizer.lr=" in capsys.readouterr().out


@pytest.mark.slow
def test_what_ended_a_run_stands_in_its_log(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("tlearn.engine.train_step", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tiny("epochs=3"), tmp_path / "run")
    assert advise(read_run(tmp_path / "run"))[0].symptom == "out of memory"
