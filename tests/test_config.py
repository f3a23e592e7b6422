"""Options: what is read, from where, what wins, and what a mistake is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from tlearn.cli import app
from tlearn.config import SGD, AdamW, Config, Cosine, CosineWarmRestarts, Stage, Step
from tlearn.configfile import differing_keys, dump_config, load_config
from tlearn.errors import TlearnError

PATH = "data.path=photos"
RULES = "train: [[head, 1.0], ['.*', 0]]"
THREE_STAGES = f"""
data: {{path: photos}}
stages:
  - {{name: a, epochs: 2, {RULES}, schedule: {{name: cosine_warm_restarts, t_0: 1}}}}
  - {{name: b, epochs: 20, {RULES}, schedule: {{name: cosine_warm_restarts, t_0: 10}}, image_size: 224}}
  - {{name: c, epochs: 8, {RULES}}}
"""
MakeFile = Callable[[str], Path]


@pytest.fixture
def file(tmp_path: Path) -> MakeFile:
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def load(*overrides: str, quick: bool = False) -> Config:
    return load_config(None, [PATH, *overrides], quick=quick)


def complaint(*overrides: str, path: Path | None = None) -> str:
    """The message about a config; its lines of problems are indented."""
    with pytest.raises(TlearnError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# what a mistake is told


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("batch.szie=8", "batch.szie: no such option; did you mean batch.size?"),
        ("modle.backbone=x", "modle: no such option; did you mean model?"),
        ("data.augment.hflp=0", "data.augment.hflp: no such option; did you mean data.augment.hflip?"),
        ("optimizer.momentun=0.9", "optimizer.momentun: no such option"),
        ("lr=0.1", "lr: no such option; did you mean optimizer.lr"),
        ("data.lr=0.1", "data.lr: no such option; did you mean optimizer.lr"),
        ("zzz=1", "zzz: no such option; options here: batch, clip_norm, data"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one(override: str, hint: str) -> None:
    assert hint in complaint(PATH, override)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["optimizer.name=sgd", "optimizer.momentu=0.9"], "did you mean optimizer.momentum?"),
        (["schedule.name=cosine_warm_restarts", "schedule.t_o=2"], "did you mean schedule.t_0?"),
        (["schedule.name=step", "schedule.gama=2"], "did you mean schedule.gamma?"),
        (
            [f"stages=[{{name: a, epochs: 1, {RULES}, optimizer: {{name: sgd, momentm: 0}}}}]"],
            "stages.0.optimizer.momentm: no such option; did you mean stages.0.optimizer.momentum?",
        ),
    ],
)
def test_inside_a_union_the_names_of_the_chosen_kind_are_proposed(overrides: list[str], hint: str) -> None:
    assert hint in complaint(PATH, *overrides)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("schedule.t_0=1", "schedule.t_0"),
        (
            f"stages=[{{name: a, epochs: 1, {RULES}, schedule: {{name: cosine, t_0: 1}}}}]",
            "stages.0.schedule.t_0",
        ),
    ],
)
def test_an_option_of_another_kind_is_answered_with_that_kind(override: str, where: str) -> None:
    message = complaint(PATH, override)

    assert f"{where}: no such option" in message
    assert "cosine_warm_restarts" in message
    assert "did you mean stages.schedule.t_0" not in message
    assert "did you mean schedule.t_0" not in message


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("epochs=many", "epochs = 'many': should be a valid integer"),
        ("epochs=2.5", "epochs = 2.5: should be a valid integer"),
        ("epochs=0", "epochs = 0: should be greater than or equal to 1"),
        ("model=resnet18", "model = 'resnet18': is a group of options: model.backbone"),
        ("data.path=3", "data.path = 3: should be a valid string"),
        ("data.path=", "data.path = None: should be a valid string"),
        ("data.fit=corp", "data.fit = 'corp': should be 'crop', 'pad' or 'squash'; did you mean crop?"),
        ("strategy=stagd", "did you mean staged?"),
        ("data.image_size=8", "data.image_size = 8: should be greater than or equal to 16"),
        ("data.augment.hflip=1.5", "data.augment.hflip = 1.5: should be less than or equal to 1"),
        ("data.augment.scale=[0.9, 0.1]", "data.augment.scale = [0.9, 0.1]: takes two numbers above 0"),
        ("data.augment.scale=[0.5, 1.5]", "at most the whole image"),
        ("optimizer.lr=0", "optimizer.lr = 0: should be greater than 0"),
        ("optimizer.lr=1e400", "optimizer.lr = inf: should be a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr = '.nan': should be a valid number"),
        ("optimizer.name=sdg", "optimizer.name = 'sdg': should be one of adam, adamw, sgd; did you mean sgd?"),
        ("clip_norm=0", "clip_norm = 0: should be greater than 0"),
        ("seed=-1", "seed = -1: should be greater than or equal to 0"),
        ("seed=9223372036854775808", "seed = 9223372036854775808: should be less than"),
        ("stages=[]", "stages = []"),
        ("stages=[3]", "stages.0 = 3: is a group of options: stages.0.name"),
        ("stages=[{epochs: 1, train: [[head, 1]]}]", "stages.0.name: is required"),
        (f"stages=[{{name: a, epochs: 1, {RULES}, optimizer: {{lr: 1}}}}]", "stages.0.optimizer: needs a `name`"),
        ("stages=[{name: a, epochs: 1, train: [[head, -1]]}]", "stages.0.train.0.1 = -1: should be greater"),
        (f"stages=[{{name: a, epochs: 1, {RULES}}}, {{name: a, epochs: 1, {RULES}}}]", "a name of its own"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(override: str, answer: str) -> None:
    message = complaint(PATH, override)

    assert message.startswith("1 problem in the configuration:\n  the command line: ")
    assert answer in message


@pytest.mark.parametrize(
    "override",
    ["data.augment.scale=[1]", "data.augment.ratio=[]", "stages=[{name: a, epochs: 1, train: [[head]]}]"],
)
def test_a_pair_with_one_value_is_an_error_with_its_key(override: str) -> None:
    assert override.partition("=")[0] in complaint(PATH, override)


@pytest.mark.parametrize("override", ["epochs=true", "optimizer.lr=true", "batch.size=true"])
def test_a_truth_value_is_no_number(override: str) -> None:
    assert override.partition("=")[0] in complaint(PATH, override)


def test_all_problems_are_told_at_once_each_with_its_source(file: MakeFile) -> None:
    path = file("data: {path: photos}\nepochs: 0\nmodle: x\n")

    lines = complaint("batch.size=-3", "data.fit=corp", path=path).splitlines()

    assert lines[0] == "4 problems in the configuration:"
    by_key = {line.strip(): line for line in lines[1:]}
    assert len(by_key) == 4
    assert f"{path}: epochs = 0: should be greater than or equal to 1" in by_key
    assert f"{path}: modle: no such option; did you mean model?" in by_key
    assert "the command line: batch.size = -3: should be greater than or equal to 1" in by_key
    assert any(key.startswith("the command line: data.fit = 'corp'") for key in by_key)


def test_a_value_of_the_file_that_the_command_line_mends_is_no_problem(file: MakeFile) -> None:
    assert load_config(file("data: {path: photos}\nepochs: 0"), ["epochs=3"]).epochs == 3


def test_without_a_data_path_the_option_to_give_is_named() -> None:
    assert "data: is required (data.path=FOLDER names the images)" in complaint()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("data: {path: a}\ndata: {path: b}", "line 2: 'data' is given twice"),
        ("data:\n  path: a\n  path: b", "line 3: 'path' is given twice"),
        ("data: {path: a, 'path': b}", "line 1: 'path' is given twice"),
        ("1: 2", "line 1: 1 is no option name"),
        ("? [a, b]\n: 3", "is no option name"),
        ("[1, 2]", "holds a list, not options"),
        ("just words", "holds a str, not options"),
        ("3", "holds a int, not options"),
        ("data: [unclosed", "not a valid YAML file"),
        ("data:\n\tpath: x", "not a valid YAML file"),
        ("a: 1\n---\nb: 2", "not a valid YAML file"),
        ("data: !!python/object:os.system x", "not a valid YAML file"),
        ("data: {path: x}\nepochs: *nothing", "not a valid YAML file"),
    ],
)
def test_a_file_that_is_no_mapping_of_options_is_refused_by_name(file: MakeFile, text: str, answer: str) -> None:
    path = file(text)
    message = complaint(path=path)

    assert message.startswith(f"{path}: ")
    assert answer in message


@pytest.mark.parametrize(
    "text",
    [
        "epochs: !!int a",
        "epochs: !!int ''",
        "epochs: !!float a",
        "run: {audit: !!bool perhaps}",
        "epochs: !!timestamp 3",
        "epochs: !!timestamp 2001-99-99",
        "data: !!map 3",
        "epochs: " + "9" * 5000,
        "data: " + "[" * 3000,
        "data: " + "[" * 3000 + "]" * 3000,
    ],
)
def test_yaml_that_cannot_be_constructed_is_an_error_that_names_the_file(file: MakeFile, text: str) -> None:
    path = file(text)
    assert str(path) in complaint(PATH, path=path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\x00", b"\xff\xfe\x00a", b"\x00", b"PK\x03\x04"])
def test_a_binary_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.yaml"
    path.write_bytes(content)

    assert complaint(path=path).startswith(f"{path}: ")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    assert (
        complaint(path=tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"
    )
    assert complaint(path=tmp_path).startswith(f"{tmp_path}: cannot be read")


def test_an_empty_file_holds_the_defaults(file: MakeFile) -> None:
    assert load_config(file("# nothing yet\n"), [PATH]) == load()


@pytest.mark.parametrize(
    "override", ["data.path", "=3", "a..b=3", ".a=3", "a-b=3", "data .path=1", "--epochs=3", "stages[0].epochs=1"]
)
def test_what_is_no_option_is_refused_with_its_form(override: str) -> None:
    assert "neither a config file that exists nor an option a.b=c" in complaint(PATH, override)


def test_a_long_list_of_stages_on_the_command_line_is_an_option(tmp_path: Path) -> None:
    stages = ", ".join(f"{{name: stage_{i}, epochs: 1, {RULES}}}" for i in range(20))

    result = CliRunner().invoke(app, ["train", f"stages=[{stages}]"])

    assert isinstance(result.exception, TlearnError)
    assert "data: is required" in str(result.exception)


# how scalars are read


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".5", 0.5), ("1.0e+1", 10.0), ("+3", 3.0), ("2", 2.0)],
)
def test_numbers_are_read_as_yaml_1_2_reads_them(text: str, value: float) -> None:
    lr = load(f"optimizer.lr={text}").optimizer.lr

    assert lr == value
    assert type(lr) is float


@pytest.mark.parametrize(
    "text", ["off", "on", "yes", "no", "y", "n", "NO", "1:30", "0x1f", "1_000", "2001-01-01", ".inf"]
)
def test_words_stay_words(file: MakeFile, text: str) -> None:
    assert load_config(file(f"data: {{path: {text}}}")).data.path == text
    assert load_config(None, [f"data.path={text}"]).data.path == text


# precedence


def test_the_defaults_give_way_to_the_file_the_file_to_quick_and_quick_to_the_command_line(file: MakeFile) -> None:
    path = file("data: {path: photos, image_size: 224, max_val: 50}\nepochs: 30\nbatch: {size: 16}")

    plain, quick = load_config(path), load_config(path, quick=True)
    both = load_config(path, ["epochs=20", "data.image_size=96"], quick=True)

    assert (plain.batch.size, plain.epochs, plain.data.image_size, plain.data.max_train) == (16, 30, 224, None)
    assert (quick.batch.size, quick.epochs, quick.data.image_size, quick.data.max_train) == (16, 6, 128, 1000)
    assert quick.data.max_val == 50
    assert (both.epochs, both.data.image_size, both.data.max_train) == (20, 96, 1000)


def test_quick_never_makes_a_run_larger(file: MakeFile) -> None:
    path = file("data: {path: photos, image_size: 64, max_train: 10, max_val: 5}\nepochs: 2")
    quick = load_config(path, quick=True)

    assert (quick.epochs, quick.data) == (2, load_config(path, ["data.score_test=false"]).data)


def test_the_options_of_quick_rule_what_quick_does() -> None:
    quick = load("quick.epochs=3", "quick.image_size=96", "quick.samples=77", quick=True)

    assert (quick.epochs, quick.data.image_size, quick.data.max_train, quick.data.max_val) == (3, 96, 77, 77)


def test_an_override_reaches_into_lists(file: MakeFile) -> None:
    path = file(THREE_STAGES)
    config = load_config(path, ["stages.1.epochs=7", "stages.1.train.0.1=0.5", "stages.2.optimizer={name: sgd, lr: 1}"])

    assert config.stages is not None
    assert [s.epochs for s in config.stages] == [2, 7, 8]
    assert config.stages[1].train == [("head", 0.5), (".*", 0.0)]
    assert config.stages[2].optimizer == SGD(lr=1.0)


@pytest.mark.parametrize("position", ["3", "99", "x", "first", "²", "9" * 5000])
def test_a_position_outside_a_list_is_an_error(file: MakeFile, position: str) -> None:
    assert "is no position in a list of 3" in complaint(f"stages.{position}.epochs=1", path=file(THREE_STAGES))


def test_an_override_below_a_plain_value_is_an_error(file: MakeFile) -> None:
    assert complaint("data.path.x=3", path=file("data: {path: photos}")) == (
        "data.path.x: 'path' holds 'photos', no options"
    )


def test_a_list_of_stages_on_the_command_line_keeps_its_epochs_under_quick(file: MakeFile) -> None:
    path = file(THREE_STAGES)
    whole = load_config(path, [f"stages=[{{name: z, epochs: 50, {RULES}}}]"], quick=True)
    one = load_config(path, ["stages.1.epochs=50"], quick=True)

    assert whole.stages is not None
    assert one.stages is not None
    assert [s.epochs for s in whole.stages] == [50]
    assert one.stages[1].epochs == 50
    assert one.stages[2].epochs < 8


def test_later_overrides_win() -> None:
    assert load("epochs=3", "epochs=5").epochs == 5


def test_a_strategy_on_the_command_line_replaces_the_stages_of_the_file(file: MakeFile) -> None:
    path = file(THREE_STAGES)
    one_more = load_config(path, ["strategy=full", "stages.0.epochs=3"])

    assert load_config(path, ["strategy=full"]).stages is None
    assert load_config(path).stages is not None
    assert one_more.stages is not None
    assert one_more.stages[0].epochs == 3


def test_part_of_an_optimizer_or_schedule_means_the_default_kind(file: MakeFile) -> None:
    config = load_config(file("data: {path: x}\noptimizer: {lr: 1e-4}\nschedule: {warmup_epochs: 2}"))

    assert config.optimizer == AdamW(lr=1e-4)
    assert config.schedule == Cosine(warmup_epochs=2)


def test_scratch_means_random_weights() -> None:
    assert load("strategy=scratch").model.weights == "random"
    assert load("strategy=scratch", "model.backbone=resnet50").model.weights == "random"
    assert load("strategy=full").model.weights == "default"


def test_scratch_with_weights_is_a_contradiction_that_is_told() -> None:
    message = complaint(PATH, "strategy=scratch", "model.weights=default")
    assert "model.weights=random, or strategy=full" in message


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError):
        load().epochs = 3


# --quick keeps the shape of a run


def test_quick_keeps_every_stage_and_shrinks_its_epochs(file: MakeFile) -> None:
    quick = load_config(file(THREE_STAGES), quick=True)

    assert quick.stages is not None
    assert [s.name for s in quick.stages] == ["a", "b", "c"]
    assert all(s.epochs >= 1 for s in quick.stages)
    assert quick.stages[1].epochs == max(s.epochs for s in quick.stages) < 20
    assert quick.stages[1].image_size == 128
    assert [s.train for s in quick.stages] == [s.train for s in load_config(file(THREE_STAGES)).stages or []]


def test_quick_keeps_to_its_number_of_epochs(file: MakeFile) -> None:
    quick = load_config(file(THREE_STAGES), quick=True)

    assert sum(s.epochs for s in quick.stages or []) <= quick.quick.epochs


def cycles(stage: Stage) -> float:
    assert isinstance(stage.schedule, CosineWarmRestarts)
    return stage.epochs / stage.schedule.t_0


def test_quick_keeps_the_number_of_restarts_of_a_stage(file: MakeFile) -> None:
    path = file(THREE_STAGES)
    plain, quick = load_config(path).stages or [], load_config(path, quick=True).stages or []

    # the first stage goes from 2 epochs to 1, not to 2 * 6 / 30
    assert [cycles(s) for s in quick[:2]] == pytest.approx([cycles(s) for s in plain[:2]])


def test_quick_scales_everything_that_is_measured_in_epochs(file: MakeFile) -> None:
    path = file(
        f"data: {{path: x}}\nstages: [{{name: a, epochs: 60, {RULES}, "
        "schedule: {name: step, step_epochs: 20, warmup_epochs: 10}}]"
    )
    stages = load_config(path, quick=True).stages

    assert stages is not None
    assert isinstance(stages[0].schedule, Step)
    assert stages[0].epochs == 6
    assert stages[0].schedule.step_epochs == pytest.approx(2.0)
    assert stages[0].schedule.warmup_epochs == pytest.approx(1.0)


def test_quick_scales_the_schedule_that_all_stages_share(file: MakeFile) -> None:
    path = file("data: {path: x}\nepochs: 60\nschedule: {name: cosine_warm_restarts, t_0: 20}")
    schedule = load_config(path, quick=True).schedule

    assert isinstance(schedule, CosineWarmRestarts)
    assert schedule.t_0 == pytest.approx(2.0)


def test_quick_twice_is_quick_once(file: MakeFile, tmp_path: Path) -> None:
    once = load_config(file(THREE_STAGES), quick=True)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(once), encoding="utf-8")

    assert differing_keys(once, load_config(again, quick=True)) == []


def test_quick_on_more_stages_than_epochs_keeps_one_epoch_and_its_schedule_each(file: MakeFile) -> None:
    one = f"epochs: 1, {RULES}, schedule: {{name: cosine_warm_restarts, t_0: 1}}"
    path = file("data: {path: x}\nstages: [" + ", ".join(f"{{name: s{i}, {one}}}" for i in range(9)) + "]")
    quick = load_config(path, quick=True)

    assert quick.stages == load_config(path).stages


def test_quick_on_absurdly_many_epochs_is_still_short(file: MakeFile) -> None:
    path = file(f"data: {{path: x}}\nstages: [{{name: a, epochs: 1000000, {RULES}}}]")
    stages = load_config(path, quick=True).stages

    assert stages is not None
    assert stages[0].epochs == 6


# dump and compare

numbers = st.floats(1e-8, 1e3)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
optimizers = st.one_of(
    st.builds(dict, name=st.just("sgd"), lr=numbers, momentum=st.floats(0, 0.99)),
    st.builds(dict, name=st.sampled_from(["adam", "adamw"]), lr=numbers, weight_decay=numbers),
)
schedules = st.one_of(
    st.builds(dict, name=st.just("cosine_warm_restarts"), t_0=numbers | st.just("25%"), t_mult=st.integers(1, 4)),
    st.builds(dict, name=st.just("step"), step_epochs=numbers, gamma=st.floats(0.01, 1)),
    st.builds(dict, name=st.sampled_from(["constant", "cosine"]), warmup_epochs=numbers),
)
rules = st.lists(st.tuples(words, st.floats(0, 10)), min_size=1, max_size=3)
stages = st.lists(
    st.fixed_dictionaries(
        {"name": words, "epochs": st.integers(1, 99), "train": rules},
        optional={"optimizer": optimizers, "schedule": schedules, "image_size": st.integers(16, 2048)},
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda stage: stage["name"],
)
trees: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"data.path": words},
    optional={
        "stages": stages,
        "optimizer": optimizers,
        "schedule": schedules,
        "strategy": st.sampled_from(["feature_extraction", "partial", "full", "staged", "progressive", "scratch"]),
        "epochs": st.integers(1, 10**6),
        "seed": st.integers(0, 2**63 - 1),
        "clip_norm": st.none() | numbers,
        "data.max_train": st.none() | st.integers(1, 10**9),
        "data.augment.hflip": st.floats(0, 1),
        "data.augment.scale": st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)),
        "run.audit": st.booleans(),
        "tracking.wandb.project": words,
    },
)


def effective(tree: dict[str, Any]) -> dict[str, Any]:
    """Without what is refused because every stage names its own."""
    listed = tree.get("stages")
    idle = [key for key in ("optimizer", "schedule") if listed and all(key in stage for stage in listed)]
    return {key: value for key, value in tree.items() if key not in idle}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees.map(effective), quick=st.booleans())
@example(tree={"data.path": "1e5"}, quick=False)
@example(tree={"data.path": "+.5"}, quick=False)
@example(tree={"data.path": "null"}, quick=False)
@example(tree={"data.path": "a\x85b"}, quick=False)
@example(tree={"data.path": "x", "tracking.wandb.project": "2e-3"}, quick=False)
def test_what_is_dumped_is_read_back_equal(tmp_path: Path, tree: dict[str, Any], quick: bool) -> None:
    if "stages" in tree:
        tree.pop("epochs", None)  # refused beside stages
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in tree.items()]
    config = load_config(None, given, quick=quick)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config), encoding="utf-8")

    assert load_config(path) == config
    assert differing_keys(load_config(path), config) == []


def test_differing_keys_names_what_differs_with_both_values(file: MakeFile) -> None:
    old = load("epochs=3")

    assert differing_keys(old, load("epochs=3")) == []
    assert differing_keys(old, load("epochs=4", "data.augment.hflip=0")) == [
        "data.augment.hflip: 0.5 -> 0.0",
        "epochs: 3 -> 4",
    ]
    assert differing_keys(load(), load("optimizer.name=sgd"))[-1] == "optimizer.weight_decay: 0.01 -> 0.0"
    assert "optimizer.momentum: absent -> 0.9" in differing_keys(load(), load("optimizer.name=sgd"))


def test_differing_keys_sees_a_stage_more(file: MakeFile) -> None:
    one = load(f"stages=[{{name: a, epochs: 1, {RULES}}}]")
    two = load(f"stages=[{{name: a, epochs: 1, {RULES}}}, {{name: b, epochs: 1, {RULES}}}]")

    assert "stages.1.name: absent -> b" in differing_keys(one, two)


# nothing but TlearnError, whatever is given

sections = [
    "data",
    "stages",
    "stages.0",
    "stages.0.train",
    "optimizer",
    "schedule",
    "model",
    "quick",
    "tracking.wandb",
]
leaves = ["data.path", "stages.0.train.0", "optimizer.name", "schedule.t_0", "model.weights", "strategy", "epochs"]
others = [
    "data.augment.scale",
    "data.augment.scale.0",
    "stages.0.optimizer",
    "batch.size",
    "clip_norm",
    "run.audit",
    "a.b",
]
keys = st.sampled_from([*sections, *leaves, *others])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["sgd", "cosine", "scratch", "head", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "epochs", "train", "lr", "path", "optimizer", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
tokens = st.lists(
    st.sampled_from(["data", "stages", "path", "!!int", "!!map", "!!float", "[", "]", "{", "}", ":", ",", " ", "\n"])
    | st.sampled_from(["&a", "*a", "-", "?", "|", ">", "'", '"', "%", "@", "<<", "1e9", "0", "\n  ", "---", "!", "~"]),
    max_size=25,
).map("".join)


def loads_or_complains(path: Path | None, overrides: list[str], quick: bool) -> None:
    with contextlib.suppress(TlearnError):
        load_config(path, overrides, quick=quick)


@settings(max_examples=150, deadline=None)
@given(
    overrides=st.lists(st.tuples(keys, values).map(lambda kv: f"{kv[0]}={json.dumps(kv[1])}"), max_size=4),
    quick=st.booleans(),
)
def test_random_values_load_or_are_a_tlearn_error(overrides: list[str], quick: bool) -> None:
    loads_or_complains(None, [PATH, *overrides], quick)


@settings(max_examples=150, deadline=None)
@given(override=tokens | st.text(max_size=30), key=keys)
def test_random_text_as_an_override_loads_or_is_a_tlearn_error(override: str, key: str) -> None:
    loads_or_complains(None, [override], quick=False)
    loads_or_complains(None, [PATH, f"{key}={override}"], quick=False)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(content=b"!!int")
@example(content=b"? !!map x")
@given(
    content=tokens.map(str.encode)
    | st.binary(max_size=40)
    | st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace"))
)
def test_a_random_file_loads_or_is_a_tlearn_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "random.yaml"
    path.write_bytes(content)
    loads_or_complains(path, [], quick=False)


@pytest.mark.parametrize(
    ("key", "value"), [("optimizer.lr", "1e-9"), ("schedule.name", "step"), ("quick.epochs", "1"), ("epochs", "3")]
)
def test_what_would_have_no_effect_is_refused(tmp_path: Path, key: str, value: str) -> None:
    (tmp_path / "x.yaml").write_text(
        f"data: {{path: x}}\nstages:\n  - {{name: a, epochs: 1, {RULES}, optimizer: {{name: adam}}, "
        "schedule: {name: constant}}\n"
    )
    with pytest.raises(TlearnError, match=f"the command line: {key} has no effect"):
        load_config(tmp_path / "x.yaml", [f"{key}={value}"])


def test_what_one_stage_uses_has_an_effect(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        f"data: {{path: x}}\nstages:\n  - {{name: a, epochs: 1, {RULES}, optimizer: {{name: adam}}}}\n"
        f"  - {{name: b, epochs: 1, {RULES}}}\n"
    )
    assert load_config(tmp_path / "x.yaml", ["optimizer.lr=0.5"]).optimizer.lr == 0.5
    assert load_config(tmp_path / "x.yaml", ["quick.epochs=2"], quick=True).quick.epochs == 2


@pytest.mark.parametrize("t_0", ["0%", "101%", "-5%", "x%", "25", "1.5.5%", "0.0%"])
def test_a_share_of_a_stage_is_above_0_and_at_most_100_percent(t_0: str) -> None:
    with pytest.raises(TlearnError, match=r"schedule\.t_0"):
        load_config(None, ["data.path=x", "schedule.name=cosine_warm_restarts", f"schedule.t_0='{t_0}'"])
    assert load_config(None, ["data.path=x", "schedule={name: cosine_warm_restarts, t_0: 0.5%}"])
