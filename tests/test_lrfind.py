"""The rate-range test: what a curve says, that nothing is left behind, which tests a recipe gets."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from test_cli import run as run_cli

from tlearn.checkpoint import Progress
from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.engine import Run
from tlearn.errors import TlearnError
from tlearn.folder import RunFolder
from tlearn.lrfind import find_rates, groups, lr_find, trials
from tlearn.ratecurve import DIVERGED, Curve, Span, smooth, suggest
from tlearn.run import Parts, assembled, make_run
from tlearn.runtime import Runtime

MakeConfig = Callable[..., Config]


def curve(loss: Callable[[float], float], noise: float = 0.0, seed: int = 0, span: Span | None = None) -> Curve:
    """Of a loss that depends on the rate alone, as a test would see it."""
    rng, rates = np.random.default_rng(seed), (span or Span()).rates()
    losses: list[float] = []
    for rate in rates:
        losses.append(loss(rate) + float(rng.normal()) * noise)
        if not math.isfinite(losses[-1]) or smooth(losses)[-1] > DIVERGED * min(smooth(losses)):
            break
    finite = losses if math.isfinite(losses[-1]) else losses[:-1]
    return Curve(rates[: len(losses)], losses, smooth(finite))


def usual(rate: float) -> float:
    """Falls by 1.5 around 1e-3, is lowest at 0.027, explodes."""
    return 2.3 - 1.5 / (1 + (1e-3 / rate) ** 1.5) + (rate / 0.3) ** 2


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_the_suggestion_is_a_tenth_of_the_rate_of_the_minimum_also_under_noise(noise: float, seed: int) -> None:
    suggestion = suggest(curve(usual, noise, seed))
    assert suggestion.rate is not None
    assert 0.027 / 10 / 2.5 < suggestion.rate < 0.027 / 10 * 1.5
    assert suggestion.why_not is None
    assert 5e-4 < suggestion.others["steepest"] < 2e-3
    assert 1e-5 < suggestion.others["valley"] < 1e-3


@pytest.mark.parametrize(
    ("loss", "noise", "why"),
    [
        (lambda rate: 2.3 - 0.2 * math.log10(rate / 1e-7), 0.0, "still falls at 10"),
        (lambda rate: 2.3, 0.1, "does not fall below its noise"),
        (lambda rate: 2.3 + (rate / 1e-2) ** 2, 0.1, "does not fall below its noise"),
        (lambda rate: 2.3 + (rate / 1e-8) ** 2, 0.0, "explodes at once: begin below 1e-07"),
        (lambda rate: math.nan, 0.0, "explodes at once"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_curve_that_says_nothing_gives_no_rate(
    loss: Callable[[float], float], noise: float, why: str, seed: int
) -> None:
    suggestion = suggest(curve(loss, noise, seed))
    assert suggestion.rate is None
    assert suggestion.why_not is not None
    assert why in suggestion.why_not


def test_smoothing_is_unbiased_from_the_first_loss_on() -> None:
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 1 + 2) / 1.9])


def made(config: Config, folder: Path) -> tuple[Run, Parts]:
    runtime = Runtime()
    parts = assembled(config, runtime, config.precision)
    return make_run(parts, runtime, RunFolder(folder), None, Progress(), active=False), parts


@pytest.mark.slow
def test_a_test_leaves_everything_as_it_was(tiny: MakeConfig, tmp_path: Path) -> None:
    run, parts = made(tiny("strategy=scratch", "batch.size=16"), tmp_path / "none")  # BatchNorm statistics move
    net, stage, multipliers = run.model.net, parts.stages[0], parts.plan[0]
    torch.nn.init.normal_(net.get_parameter(f"{run.model.head}.weight"), std=0.1)
    run.model.set_trainable({name: float(name.startswith(run.model.head)) for name, _ in net.named_parameters()})
    run.model.train()

    def everything() -> list[object]:
        return [
            {name: tensor.clone() for name, tensor in net.state_dict().items()},
            [(name, parameter.requires_grad) for name, parameter in net.named_parameters()],
            [module.training for module in net.modules()],
            torch.get_rng_state().tolist(),
            repr(np.random.get_state()),
            random.getstate(),
            asdict(run.progress),
        ]

    before = everything()
    first = lr_find(run, stage, multipliers, Span(1e-4, 100.0, 12))
    after = everything()
    state = before[0], after[0]
    assert all(torch.equal(old, new) for old, new in zip(*(s.values() for s in state), strict=True))  # type: ignore[attr-defined]
    assert before[1:] == after[1:]
    assert first.smoothed[-1] != first.smoothed[0]
    assert lr_find(run, stage, multipliers, Span(1e-4, 100.0, 12)) == first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_explosion_ends_a_test(tiny: MakeConfig, tmp_path: Path) -> None:
    run, parts = made(tiny("strategy=full", "optimizer.name=sgd", "clip_norm=null"), tmp_path)
    curve = lr_find(run, parts.stages[0], parts.plan[0], Span(1e-3, 1e6, 40))
    assert len(curve.losses) < 40
    assert not math.isfinite(curve.losses[-1]) or curve.smoothed[-1] > DIVERGED * min(curve.smoothed)
    assert all(torch.isfinite(p).all() for p in run.model.net.parameters())


def test_stages_are_tested_as_a_whole_and_by_group(tiny: MakeConfig, tmp_path: Path) -> None:
    run, parts = made(tiny("strategy=staged", "epochs=3", "layer_decay=0.5"), tmp_path)
    found = trials(run.model, parts.stages, parts.plan)
    assert [(t.stage, t.trains, t.is_whole, t.multiplier, t.behind_head) for t in found] == [
        (0, "head", True, 1.0, False),
        (1, "all", True, 1.0, True),
        (1, "head", False, 1.0, False),
        (1, "backbone x0.1", False, 0.1, True),
        (2, "all", True, 1.0, True),
        (2, "head", False, 1.0, False),
        (2, "backbone x0.1", False, 0.1, True),
    ]
    head, backbone = groups(run.model, parts.stages[2], parts.plan[2])
    assert set(head.relative.values()) == {1.0}
    depths = len(run.model.blocks)
    assert sorted(set(backbone.relative.values()), reverse=True) == pytest.approx(
        [0.5**i for i in range(1, depths + 1)]
    )


@pytest.mark.slow
def test_the_command_writes_two_files_and_names_options_that_exist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = tmp_path / "stages.yaml"
    stages.write_text(
        'stages: [{name: one, epochs: 1, train: [[head, 1.0], [".*", 0]]},'
        ' {name: two, epochs: 1, train: [[".*", 1.0]], optimizer: {name: adam, lr: 1.0e-4}}]'
    )
    options = [f"data.path={photos}", *TINY, "batch.size=16", "model.batch_norm=frozen"]
    out = tmp_path / "out"
    command = ["lr-find", stages, *options, "--out", out, "--start", "1e-4", "--end", "100", "--steps", "20"]
    assert run_cli(monkeypatch, *command, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "lr-find.json").read_text())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lr-find.json", "lr-find.png", "out", "stages.yaml"]
    assert (out / "lr-find.png").read_bytes().startswith(b"\x89PNG")
    rows = {(row["stage"], row["trains"]): row for row in report["tests"]}
    assert list(rows) == [("one", "head"), ("two", "all"), ("two", "head"), ("two", "backbone x1")]
    assert rows["one", "head"]["suggestion"] is not None
    assert rows["one", "head"]["losses"][0] == pytest.approx(math.log(10), abs=1e-4)
    assert rows["two", "backbone x1"]["losses"][0] < math.log(10) - 0.001  # behind a head that was trained
    assert (
        rows["two", "head"]["parameters"] + rows["two", "backbone x1"]["parameters"] == rows["two", "all"]["parameters"]
    )
    assert f"optimizer.lr={rows['one', 'head']['suggestion']:.2g}" in report["options"]
    changed = load_config(stages, [*options, *report["options"]])
    assert changed.optimizer.lr == rows["one", "head"]["suggestion"]

    assert run_cli(monkeypatch, *command, "--stage", "one") == 0  # over the same files
    printed = capsys.readouterr().out
    assert "to train so: optimizer.lr=" in printed
    assert "two" not in printed


def test_what_cannot_be_tested_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tiny: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(TlearnError, match="--stage haed: no such stage; there are head, last_block, all"):
        find_rates(tiny(), "haed", tmp_path / "out")
    with pytest.raises(TlearnError, match=r"--start 1: is not below --end 0\.1"):
        find_rates(tiny(), None, tmp_path / "out", Span(1.0, 0.1))
    with pytest.raises(TlearnError, match="its stages are not known"):
        find_rates(tiny("strategy=auto"), None, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("")
    with pytest.raises(TlearnError, match="mine: holds something else; choose another --out"):
        find_rates(tiny(), None, tmp_path / "mine")
    monkeypatch.setattr("tlearn.lrfind.Runtime", lambda: SimpleNamespace(world_size=2))
    with pytest.raises(TlearnError, match="one process: start it without a launcher"):
        find_rates(tiny(), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
