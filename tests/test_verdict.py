"""Go, no-go or unsure: a table of facts, and what each fault needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tlearn.advice import NOT_FINITE, Advice
from tlearn.faults import Against, Copy, Facts, Fault, Leaks
from tlearn.forecast import Forecast, Measured, Room, StageCost, forecast
from tlearn.metrics import wilson_interval
from tlearn.verdict import EXIT_CODES, decide

ROOM = Room(memory_mib=16_000, device_mib=None, processes=1)
SMALL = Forecast(60, 40, 2_000, None, 0.0, 224, {"all": 60}, ROOM)
GOOD = Facts(
    image_size_px=128,
    classes=10,
    epochs=3,
    val=102,
    hits=80,
    majority=20,
    losses=(1.9, 1.2, 0.8),
    steps=60,
    against=Against(76, 5, 7),
    leaks=Leaks(looked_at=(257, 102), train=257),
    forecast=SMALL,
)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RISING = (Advice("training loss rises", "stage all: 1 to 2", "optimizer.lr=1e-4"),)
COPY = (Copy("val/a.png", "train/b.jpg", 0.99),)


@pytest.mark.parametrize(
    ("facts", "word", "said"),
    [
        ({}, "go", "above the largest class"),
        ({"against": None, "no_probe": "the weights were random"}, "go", "the weights were random"),
        ({"hits": 13}, "no-go", "no better than always answering the largest class"),
        ({"hits": 26}, "unsure", "val images would tell"),
        ({"val": 12, "hits": 7, "majority": 2}, "unsure", "too wide to decide on"),
        ({"val": 2000, "hits": 1000, "majority": 200, "against": Against(950, 50, 70)}, "go", "McNemar"),
        ({"val": 2000, "hits": 1000, "majority": 200, "against": Against(900, 50, 150)}, "no-go", "linear probe"),
        ({"against": Against(40, 5, 40), "still_improving": True}, "unsure", "raise quick.epochs"),
        ({"against": Against(40, 5, 40), "steps": 12}, "unsure", "raise quick.epochs"),
        ({"against": Against(40, 5, 40), "losses": (1.9, 1.2)}, "unsure", "raise quick.epochs"),
        ({"val": 1000, "hits": 996, "majority": 990, "against": None}, "unsure", "val images would tell"),
        ({"too_fast": RISING, "losses": (0.5, 0.010, 0.012)}, "go", "above the largest class"),
        ({"losses": (1.5, 1.6), "loss_is_of_labels": False}, "go", "above the largest class"),
        ({"stopped": True, "val": 0, "losses": (2.2,)}, "unsure", "after 1 of 3 epochs; the same command goes on"),
        ({"ended_by": Fault("not finite", "20 steps", "x"), "val": 0}, "no-go", "20 steps"),
        ({"missing": ("cat", "dog")}, "no-go", "2 of 10 classes (cat, dog)"),
        ({"leaks": Leaks(exact=3)}, "no-go", "3 images are in train and in val"),
        ({"leaks": Leaks(copies=30, listed=COPY, looked_at=(257, 102), train=257)}, "no-go", "30 of 102 val images"),
        ({"losses": (2.31, 2.29)}, "no-go", "a guess has ln(10) = 2.303"),
        ({"losses": (1.5, 1.6)}, "no-go", "1.500 in the first epoch, 1.600 in the last"),
        ({"too_fast": RISING, "losses": (1.1, 0.9, 1.3)}, "no-go", "optimizer.lr=1e-4"),
        ({"refused": "cannot take 225 px", "forecast": None}, "no-go", "it would not begin: cannot take 225 px"),
        ({"no_room": "killed by SIGKILL", "forecast": None}, "no-go", "batch.micro=16"),
        ({"forecast": replace(SMALL, memory_mib=15_000)}, "no-go", "14.6 of the 15.6 GiB of this machine"),
        ({"forecast": replace(SMALL, room=replace(ROOM, processes=8))}, "no-go", "of this machine"),
        ({"forecast": replace(SMALL, device_mib=9e3, room=replace(ROOM, device_mib=8e3))}, "no-go", "accelerator"),
    ],
)
def test_facts_lead_to_a_verdict_with_a_reason(facts: dict[str, Any], word: str, said: str) -> None:
    verdict = decide(replace(GOOD, **facts))
    assert verdict.word == word
    assert said in "\n".join(verdict.reasons)
    assert verdict.content()["exit_code"] == {"go": 0, "no-go": 3, "unsure": 4}[word] == EXIT_CODES[verdict.word]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"leaks": Leaks(dropped={"one image in several splits (kept: val)": 30})}, "30 times one image in several"),
        ({"leaks": Leaks(copies=2, listed=COPY, looked_at=(257, 102), train=257)}, "val/a.png and train/b.jpg"),
        ({"normalised": IMAGENET, "own": ((0.1,) * 3, (0.1,) * 3)}, "data.normalise=weights"),
        ({"leaks": Leaks(unseen="the weights were random")}, "were not looked for"),
        ({"forecast": replace(SMALL, waiting=0.4)}, "wait for images 40%"),
        ({"forecast": None, "no_forecast": "no index"}, "no index"),
    ],
)
def test_what_is_told_whatever_the_verdict(facts: dict[str, Any], said: str) -> None:
    verdict = decide(replace(GOOD, **facts))
    assert verdict.word == "go"
    assert verdict.faults == []
    assert [said in str(warning) for warning in verdict.warnings] == [True]


def test_a_loss_that_begins_low_need_not_fall() -> None:
    assert decide(replace(GOOD, losses=(0.2, 0.21))).word == "go"


def test_a_loss_that_rises_in_a_few_steps_but_in_no_epoch_is_no_fault() -> None:
    assert decide(replace(GOOD, too_fast=RISING)).word == "go"


def test_a_step_that_fp16_skips_for_its_scale_is_no_fault() -> None:
    skipped = (Advice(NOT_FINITE, "1 of 27 steps", "optimizer.lr=1e-4"),)
    assert decide(replace(GOOD, too_fast=skipped, skipped=1)).word == "go"
    assert decide(replace(GOOD, too_fast=skipped, skipped=9)).word == "no-go"


def test_the_number_of_images_that_would_do_does() -> None:
    said = decide(replace(GOOD, val=12, hits=7, majority=2)).reasons[1]
    enough = int(said.partition("about ")[2].partition(" ")[0])
    low, high = wilson_interval(round(7 / 12 * enough), enough)
    assert 12 < enough < 120
    assert (high - low) / 2 <= 0.1


def test_copies_among_some_train_images_stand_for_more_among_all() -> None:
    assert Leaks(copies=3, looked_at=(1000, 1000), train=100_000).share == 0.003  # may be chance
    assert Leaks(copies=60, looked_at=(1000, 1000), train=100_000).share == 0.06  # like each other, as some clothes are
    assert 0.5 < Leaks(copies=14, certain=14, looked_at=(1000, 1000), train=100_000).share < 1.4
    assert Leaks(copies=300, looked_at=(1000, 1000), train=1000).share == pytest.approx(0.3)
    assert Leaks().share == 0


def test_mcnemar_is_that_of_a_fair_coin() -> None:
    assert Against(50, 5, 5).p == 1
    assert Against(50, 0, 5).p == pytest.approx(2 / 2**5)
    assert Against(50, 1, 9).p == pytest.approx(2 * (1 + 10) / 2**10)
    assert Against(10**3, 10**4, 10**4).p == pytest.approx(1)


def test_a_forecast_is_images_times_their_seconds() -> None:
    stages = (StageCost("head", 4, 0.02, None), StageCost("all", 2, 0.06, None))
    measured = Measured(stages, 0.01, 1000, 0.0, 5, 2000, None, 224)
    found = forecast(measured, {"train": 1000, "val": 100, "test": 50}, 1, ROOM)
    # 4 x (1000 x 0.02 + 100 x 0.01) + 2 x (1000 x 0.06 + 1) + (100 + 50) x 0.01 + 5
    assert found.stage_s == pytest.approx({"head": 84, "all": 122})
    assert found.wall_s == pytest.approx(84 + 122 + 1.5 + 5)
    assert found.waiting == pytest.approx(0)
    assert forecast(measured, {"train": 1000, "val": 100}, 2, ROOM).wall_s == pytest.approx(103 + 0.5 + 5)


def test_a_forecast_knows_that_stored_features_cost_less_and_are_looked_at_once() -> None:
    stages = (StageCost("head", 10, 0.02, 4), StageCost("more", 10, 0.03, 4))
    measured = Measured(stages, 0.015, 1000, 0.0, 0, 2000, None, 224)
    found = forecast(measured, {"train": 1000, "val": 100}, 1, ROOM)
    assert found.stage_s["head"] == pytest.approx(4 * 1000 * 0.015 + 100 * 0.015 + 10 * 1000 * 0.005)
    assert found.stage_s["more"] == pytest.approx(10 * 1000 * 0.015)


def test_a_slow_loader_makes_a_run_slow() -> None:
    measured = Measured((StageCost("all", 2, 0.01, None),), 0.0, 50, 0.0, 0, 2000, None, 224)
    found = forecast(measured, {"train": 1000, "val": 0}, 1, ROOM)
    assert found.wall_s == pytest.approx(2 * 1000 / 50)
    assert found.waiting == pytest.approx(0.5)


def test_a_loader_takes_cores_from_a_network_that_computes_on_them() -> None:
    measured = Measured((StageCost("all", 2, 0.01, None),), 0.0, 200, 0.5, 0, 2000, None, 224)
    found = forecast(measured, {"train": 1000, "val": 0}, 1, ROOM)
    assert found.wall_s == pytest.approx(2 * 1000 * (0.01 + 0.5 / 200))
    assert found.waiting == pytest.approx(0)
