"""Strategies are lists of stages; rules give every parameter a multiplier, or say why not."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlearn.config import Rule, Stage
from tlearn.configfile import load_config
from tlearn.errors import TlearnError
from tlearn.stages import STRATEGIES, expand, filled, resolve

BLOCKS = [
    ["stem.weight"],
    ["layer1.conv.weight", "layer1.bn.weight"],
    ["layer2.conv.weight", "layer2.bn.weight"],
    ["layer10.conv.weight"],
]
NAMES = [*(name for block in BLOCKS for name in block), "fc.weight", "fc.bias", "fc_norm.weight"]
HEAD = {"fc.weight", "fc.bias"}


def multipliers(*rules: Rule) -> dict[str, float]:
    return resolve(Stage(name="stage_x", epochs=1, train=list(rules)), NAMES, "fc", BLOCKS)


def trained(result: dict[str, float]) -> set[str]:
    return {name for name, value in result.items() if value}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("epochs", range(1, 21))
def test_the_stages_of_a_strategy_last_as_long_as_was_asked(name: str, epochs: int) -> None:
    stages = STRATEGIES[name](epochs)

    assert sum(stage.epochs for stage in stages) == epochs
    assert all(stage.epochs >= 1 for stage in stages)
    assert len({stage.name for stage in stages}) == len(stages)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 12])
def test_a_strategy_unfreezes_from_the_head_down_and_never_freezes_again(name: str, epochs: int) -> None:
    sets = [trained(resolve(stage, NAMES, "fc", BLOCKS)) for stage in STRATEGIES[name](epochs)]

    assert all(names >= HEAD for names in sets)
    assert all(before < after for before, after in pairwise(sets))


def test_each_strategy_trains_what_its_name_says() -> None:
    last = [trained(resolve(STRATEGIES[name](12)[-1], NAMES, "fc", BLOCKS)) for name in STRATEGIES]
    by_name = dict(zip(STRATEGIES, last, strict=True))

    assert by_name["feature_extraction"] == HEAD
    assert by_name["partial"] == HEAD | {"layer10.conv.weight"}
    for name in ("full", "staged", "progressive", "scratch"):
        assert by_name[name] == set(NAMES)
    assert len(STRATEGIES["staged"](12)) == 3
    assert len(STRATEGIES["progressive"](12)) == 5


def test_scratch_has_one_rate_and_pretrained_layers_a_smaller_one() -> None:
    scratch = resolve(STRATEGIES["scratch"](1)[0], NAMES, "fc", BLOCKS)
    full = resolve(STRATEGIES["full"](1)[0], NAMES, "fc", BLOCKS)

    assert set(scratch.values()) == {1.0}
    assert full["fc.weight"] == 1.0
    assert full["stem.weight"] == 0.1


def test_expanding_fills_in_what_a_stage_leaves_open_and_keeps_what_it_says() -> None:
    config = load_config(
        None,
        [
            "data={path: x, image_size: 96}",
            "optimizer.lr=0.5",
            "stages=[{name: a, epochs: 1, train: [['.*', 1]]}, {name: b, epochs: 2, train: [['.*', 1]],"
            " optimizer: {name: sgd}, schedule: {name: constant}, image_size: 64}]",
        ],
    )
    first, second = filled(config)

    assert (first.optimizer, first.schedule, first.image_size) == (config.optimizer, config.schedule, 96)
    assert second.optimizer is not None
    assert second.schedule is not None
    assert (second.optimizer.name, second.schedule.name, second.image_size) == ("sgd", "constant", 64)
    assert expand(config) == config  # what a stage leaves open stays open in the record, so that it can be overridden
    assert filled(expand(config)) == filled(config)


def test_expanding_a_named_strategy_lists_its_stages() -> None:
    config = expand(load_config(None, ["data.path=x", "strategy=staged", "epochs=7"]))

    assert [(s.name, s.epochs) for s in config.stages or []] == [("head", 3), ("last_block", 2), ("all", 2)]


def test_head_is_the_head_layer_and_nothing_that_only_begins_like_it() -> None:
    assert trained(multipliers(("head", 1.0), (".*", 0.0))) == HEAD


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_last_n_is_the_last_n_blocks(n: int) -> None:
    assert trained(multipliers((f"last:{n}", 1.0), (".*", 0.0))) == {name for b in BLOCKS[-n:] for name in b}


def test_a_regular_expression_matches_from_the_start_of_a_name() -> None:
    assert trained(multipliers((r"layer[12]\.", 1.0), (".*", 0.0))) == {*BLOCKS[1], *BLOCKS[2]}
    assert trained(multipliers((r".*\.bn", 1.0), (".*", 0.0))) == {"layer1.bn.weight", "layer2.bn.weight"}
    assert trained(multipliers(("layer1", 1.0), (".*", 0.0))) == {*BLOCKS[1], *BLOCKS[3]}


def test_a_regular_expression_does_not_match_in_the_middle_of_a_name() -> None:
    assert "'bn' matches no parameter" in complaint(("bn", 1.0), (".*", 0.0))


def test_the_first_rule_that_matches_wins() -> None:
    result = multipliers(("head", 1.0), (r".*\.bn", 0.0), ("last:3", 0.5), (".*", 0.25))

    assert result == {
        "stem.weight": 0.25,
        "layer1.conv.weight": 0.5,
        "layer1.bn.weight": 0.0,
        "layer2.conv.weight": 0.5,
        "layer2.bn.weight": 0.0,
        "layer10.conv.weight": 0.5,
        "fc.weight": 1.0,
        "fc.bias": 1.0,
        "fc_norm.weight": 0.25,
    }


def complaint(*rules: Rule) -> str:
    with pytest.raises(TlearnError) as caught:
        multipliers(*rules)
    assert "stage_x" in str(caught.value)
    return str(caught.value)


def test_a_rule_that_matches_nothing_is_answered_with_close_names() -> None:
    message = complaint(("layr2", 1.0), (".*", 0.0))

    assert "'layr2' matches no parameter" in message
    assert "close names:" in message
    assert "layer2" in message


def test_a_rule_far_from_every_name_is_answered_with_what_there_is() -> None:
    assert "parameters start with: fc, fc_norm, layer1" in complaint(("qqqqqqqq", 1.0), (".*", 0.0))


def test_a_parameter_without_a_rule_is_an_error_with_the_way_out() -> None:
    message = complaint(("head", 1.0))

    assert "no rule matches 'stem.weight' and 6 more" in message
    assert '[".*", 0]' in message


def test_a_stage_that_trains_nothing_is_an_error() -> None:
    assert "nothing would train" in complaint((".*", 0.0))


@pytest.mark.parametrize("pattern", ["last:0", "last:5", "last:99"])
def test_more_blocks_than_there_are_is_an_error_with_their_number(pattern: str) -> None:
    assert f"{pattern!r}: this backbone has 1 to 4 blocks" in complaint((pattern, 1.0), (".*", 0.0))


@pytest.mark.parametrize("pattern", ["(", "*", "[a-", "a{99999999999999999999}", "(?P<x>a)(?P<x>b)"])
def test_an_invalid_regular_expression_is_an_error(pattern: str) -> None:
    assert "is no regular expression" in complaint((pattern, 1.0), (".*", 0.0))


@settings(max_examples=100, deadline=None)
@given(
    rules=st.lists(
        st.tuples(
            st.sampled_from(["head", "last:1", "last:2", "last:4", "layer1", "stem", ".*", ".*bn", "fc", "x", "last:9"])
            | st.text(max_size=6),
            st.sampled_from([0.0, 0.1, 1.0]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_rules_give_every_parameter_one_of_their_multipliers_or_are_refused(rules: list[Rule]) -> None:
    try:
        result = multipliers(*rules)
    except TlearnError:
        return
    assert sorted(result) == sorted(NAMES)
    assert set(result.values()) <= {value for _, value in rules}
    assert any(result.values())
