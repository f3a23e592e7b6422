"""The rules of a plan, on made-up facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tlearn.configfile import as_overrides, completed, load_config
from tlearn.planner import BACKBONES, BATCHES, FAR, STAGES, Facts, Plan, backbones, choose, size_of
from tlearn.stages import filled

FACTS = Facts(
    train=500,
    val=100,
    classes=10,
    smallest_class=40,
    largest_class=60,
    side_px=400,
    cores=2,
    memory_gib=16.0,
    device="cpu",
    devices=0,
    device_gib=0.0,
    probe_top1=0.8,
    probe_majority=0.1,
    probe_px=128,
)


def plan(given: dict[str, Any] | None = None, **facts: Any) -> Plan:
    return choose(replace(FACTS, **facts), given or {})


def stage_names(made: Plan) -> list[str]:
    return [stage["name"] for stage in made.options["stages"]]


def gpu(gib: float) -> dict[str, Any]:
    return {"device": "cuda", "devices": 1, "device_gib": gib, "cores": 16}


def test_the_gain_is_the_share_of_the_majoritys_mistakes_that_the_probe_mends() -> None:
    assert replace(FACTS, probe_top1=0.55, probe_majority=0.1).gain == pytest.approx(0.5)
    assert replace(FACTS, probe_top1=0.1, probe_majority=0.1).gain == 0
    assert replace(FACTS, probe_top1=1.0, probe_majority=1.0).gain == 0  # one class in val: nothing can be said
    assert replace(FACTS, probe_top1=None).gain is None


@pytest.mark.parametrize("train", [100, 999, 1_000, 4_999, 5_000, 10**6])
@pytest.mark.parametrize("top1", [None, 0.1, 0.5, 1.0])
def test_some_row_stands_for_any_facts_and_every_chosen_option_has_a_reason(train: int, top1: float | None) -> None:
    for machine in ({}, gpu(4), gpu(16), gpu(80)):
        facts = {"train": train, "probe_top1": top1, **machine}
        made = plan(**facts)
        chosen = {key.partition("=")[0] for key in as_overrides(made.options)}
        assert chosen == {reason.option for reason in made.reasons}
        assert all(reason.why for reason in made.reasons)
        config = completed(load_config(None, ["data.path=x", "strategy=auto"]), made.options)
        assert filled(config)  # valid options, and stages
        assert backbones(replace(FACTS, **facts))


def test_unlike_images_unfreeze_more() -> None:
    for train in (500, 2_000):
        near, far = (plan(train=train, probe_top1=0.1 + 0.9 * gain, probe_majority=0.1) for gain in (0.9, FAR - 0.01))
        assert "all" in stage_names(far)
        assert far.options["data"]["normalise"] == "own"
        assert "normalise" not in near.options["data"]
        assert stage_names(far) != stage_names(near)
    assert stage_names(plan(train=500)) == ["head"]


def test_more_images_unfreeze_more() -> None:
    trained = [sum(row.parts[-1].name == name for name in ("last_block", "all")) for row in STAGES if row.gain > 1]
    assert trained == sorted(trained)
    many = plan(train=50_000)
    assert stage_names(many) == ["head", "all"]
    assert [stage.get("layer_decay") for stage in many.options["stages"]] == [None, 0.75]
    assert "layer_decay" not in plan({"layer_decay": 0.9}, train=50_000).options["stages"][1]


def test_more_images_take_larger_networks_where_a_device_has_room() -> None:
    def first(train: int, **facts: Any) -> str:
        return backbones(replace(FACTS, train=train, **facts))[0].backbone

    assert first(500) == "timm:resnet18"
    assert first(2_000) == "timm:efficientnet_b0"
    assert first(20_000) == "timm:efficientnet_b0"
    assert first(20_000, **gpu(16)) == "timm:vit_small_patch16_224"
    assert first(20_000, **gpu(80)) == "timm:vit_base_patch16_224"
    assert first(20_000, need="speed", **gpu(80)) == "timm:mobilenetv3_large_100"
    assert first(500, need="detail") == "timm:resnet50"
    assert all(row.backbone.startswith("timm:") for row in BACKBONES)


@pytest.mark.parametrize(
    ("facts", "size_px"),
    [({}, 128), ({"side_px": 28}, 64), ({"side_px": 97}, 128), (gpu(8), 224), ({"side_px": 150, **gpu(8)}, 160)],
)
def test_images_are_no_larger_than_the_machine_and_the_pictures_are_worth(facts: dict[str, Any], size_px: int) -> None:
    assert size_of(replace(FACTS, **facts))[0] == size_px


def test_the_batch_fits_the_images_the_processes_and_the_memory() -> None:
    assert plan(train=10).options["batch"] == {"size": 10}
    assert plan(train=500, processes=48).options["batch"] == {"size": 48}
    assert plan(memory_gib=2.0).options["batch"] == {"size": 32, "micro": 8}
    assert plan(train=10**5, **gpu(80)).options["batch"] == {"size": 128, "find": True}
    assert plan(train=10**5, **gpu(80)).options["data"]["workers"] == 8
    assert [row.below for row in BATCHES] == sorted(row.below for row in BATCHES)


def test_uneven_classes_are_named_in_the_reason() -> None:
    assert "objective" not in plan().options
    made = plan(smallest_class=5, largest_class=80)
    assert made.options["objective"] == {"class_weight": "inverse"}
    assert "5 to 80 images a class" in made.reasons[-1].why


def test_nothing_is_chosen_that_clashes_with_what_was_given() -> None:
    assert "objective" not in plan({"data": {"sampling": "balanced"}}, smallest_class=5, largest_class=80).options
    assert "find" not in plan({"objective": {"name": "domain_adversarial"}}, **gpu(16)).options["batch"]


def test_random_weights_train_all_at_one_rate() -> None:
    stages = plan(random_weights=True, probe_top1=None).options["stages"]
    assert [stage["train"] for stage in stages] == [[[".*", 1.0]]]


def test_what_the_user_set_is_not_chosen_and_shapes_the_rest() -> None:
    given = {"data": {"path": "x", "image_size": 96, "augment": {"views": 2}}, "epochs": 7, "optimizer": {"lr": 1e-4}}
    made = plan(given, probe_top1=0.2)
    stages = made.options["stages"]
    assert [(stage["name"], stage["epochs"]) for stage in stages] == [("head", 3), ("last_block", 2), ("all", 2)]
    assert not any("optimizer" in stage or "views" in stage for stage in stages)
    assert made.options["data"] == {"normalise": "own"}
    assert "data.image_size" not in {reason.option for reason in made.reasons}
    assert sum(stage["epochs"] for stage in plan({"epochs": 1}, probe_top1=0.2).options["stages"]) == 1
    assert "stages" not in plan({"stages": [{"name": "mine"}]}).options


def test_a_plan_never_overrides_what_was_set() -> None:
    config = load_config(None, ["data.path=x", "strategy=auto", "batch.size=7", "data.augment.hflip=0"])
    done = completed(config, {"batch": {"size": 32, "micro": 8}, "data": {"image_size": 64}})
    assert (done.batch.size, done.batch.micro, done.data.image_size, done.data.augment.hflip) == (7, 8, 64, 0)
    assert done.data.path == "x"


def test_options_as_overrides_are_read_back() -> None:
    config = load_config(None, ["data.path='12'", "strategy=auto", "precision=fp32"])
    whole = completed(config, plan(probe_top1=0.2).options)
    options = whole.model_dump(mode="json", exclude_unset=True)
    assert load_config(None, as_overrides(options)) == whole
