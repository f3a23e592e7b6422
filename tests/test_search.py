"""Successive halving: who runs how long, who stays; the program with stand-ins for its runs, and with real ones."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY
from test_cli import image_folder
from test_cli import run as run_cli
from test_compare import FINISH, recipes, write_run

import tlearn.neighbours
from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.data.plan import Options
from tlearn.data.prepare import prepare
from tlearn.data.shards import read_index
from tlearn.data.source import Indexed
from tlearn.halving import ETA, Rung, Score, outcome, ranked, rungs
from tlearn.neighbours import neighbours
from tlearn.planner import HEAD, Plan, stages_of
from tlearn.profile import Profile
from tlearn.stages import STRATEGIES

QUICK = Rung(image_size=128, epochs=6, samples=1000)


def test_a_rung_costs_three_times_the_one_before_and_grows_in_all_directions() -> None:
    full = Rung(224, 24, 100_000)
    ladder = rungs(QUICK, full, 81)
    assert len(ladder) == 4  # 81, 27, 9, 3 candidates
    assert ladder[0] == QUICK
    for before, after in itertools.pairwise(ladder):
        assert after.cost / before.cost == pytest.approx(ETA, rel=0.01)
        assert all(a <= b for a, b in zip(before, after, strict=True))
    assert ladder[-1].image_size > 128
    assert ladder[-1].epochs > 6
    assert ladder[-1].samples > 1000


@pytest.mark.parametrize(
    ("full", "candidates", "expected"),
    [
        (Rung(128, 12, 257), 7, [Rung(128, 6, 257), Rung(128, 12, 257)]),  # no run is longer than the full one
        (Rung(64, 2, 40), 7, [Rung(64, 2, 40)]),  # which is a quick one already
        (Rung(224, 24, 10**6), 3, [QUICK]),  # one is left after it
        (Rung(240, 6, 1000), 81, [QUICK, Rung(224, 6, 1000), Rung(240, 6, 1000)]),
    ],
)
def test_rungs_end_with_the_full_run_or_with_one_candidate(full: Rung, candidates: int, expected: list[Rung]) -> None:
    assert rungs(QUICK, full, candidates) == expected


def scores(**top1: float) -> dict[str, Score]:
    """Of a rung, 100 val images."""
    return {name: Score(name, value, 1.0, 100, 128) for name, value in top1.items()}


def test_one_in_three_stays_rounded_up_and_the_last_rung_keeps_one() -> None:
    ladder = [Rung(128, 6, 100), Rung(128, 12, 100)]
    first = scores(a=0.5, b=0.9, c=0.6, d=0.8)
    second = scores(b=0.7, d=0.95)
    found = outcome("abcd", ladder, [first, second])
    assert [rung["kept"] for rung in found["rungs"]] == [["b", "d"], ["d"]]
    assert found["rungs"][1]["candidates"] == ["b", "d"]
    assert found["winner"] == "d"
    three = {name: first[name] for name in "abc"}
    assert outcome("abc", ladder[:1], [three])["winner"] == "b"


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    rows = [Score("a", 0.5, math.inf, 10, 32), Score("b", 0.5, 2.0, 10, 32), Score("c", 0.5, 1.0, 10, 32)]
    assert [score.name for score in ranked(rows)] == ["c", "b", "a"]


def test_what_broke_drops_out_and_makes_room_for_others() -> None:
    ladder = [Rung(128, 6, 100), Rung(128, 12, 100)]
    found = outcome("abcd", ladder, [scores(a=0.1, c=0.2)])
    assert (found["rungs"][0]["kept"], found["rungs"][0]["broken"]) == (["c", "a"], ["b", "d"])
    assert outcome("ab", ladder, [{}])["winner"] is None


def test_who_is_within_noise_is_said() -> None:
    # 100 images: standard error of 0.80 is 0.04, of 0.90 it is 0.03
    ladder = [Rung(128, 6, 100), Rung(128, 12, 100)]
    found = outcome("abcde", ladder, [scores(a=0.85, b=0.80, c=0.79, d=0.77, e=0.70), scores(a=0.90, b=0.86)])
    assert found["winner"] == "a"
    assert found["rungs"][0]["cut_within_noise"] == ["c", "d"]
    assert found["rungs"][1]["cut_within_noise"] == []
    # c and d: 0.036 around the 0.85 of rung 1; b: 0.03 around the 0.90 of rung 2
    assert found["close"] == []
    assert outcome("ab", ladder[:1], [scores(a=0.85, b=0.82)])["close"] == ["b"]


# the program, with a stand-in for `tlearn train`

AS_ASKED = (
    "import re, time\n"
    "who, rung = folder.split('/')[-3:-1]\n"
    "open(here + '/ran', 'a').write(f'{who}/{rung}\\n')\n"
    "asked = open(folder + '.yaml').read()\n"
    "rate = float(re.search(r'lr: ([0-9.]+)', asked)[1])\n"
)


def top1_is_the_rate(data: Path) -> str:
    """The end of a stand-in's run on these images."""
    return (
        "result = json.loads(open(f'{folder}/result.json').read())\n"
        "result['val'] |= {'top1': rate, 'loss': 1.0, 'n': 100}\n"
        f"result['data_fingerprint'] = {read_index(data).fingerprint!r}\n"
        "open(f'{folder}/result.json', 'w').write(json.dumps(result))\n"
    )


def ran(folder: Path) -> list[str]:
    """NAME/rung-K, in the order in which they began; forgotten then."""
    lines = (folder / "ran").read_text().split()
    (folder / "ran").unlink()
    return lines


def test_losers_are_dropped_and_the_winner_is_written_as_it_was_given(
    stand_in: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(stand_in / "model")
    rates = {"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.4, "e": 0.2}
    lines = {name: f"strategy: progressive\noptimizer: {{lr: {rate}}}" for name, rate in rates.items()}
    files = recipes(stand_in, photos, **lines)
    command = ["search", photos, *files, "epochs=10", "batch.size=16", "quick.epochs=2", "quick.image_size=64"]
    command += ["--out", stand_in / "out"]
    (stand_in / "behave").write_text(
        f"{AS_ASKED}if who == 'd' and not __import__('os').path.exists(here + '/mended'): sys.exit('no luck')\n"
        f"{FINISH}{top1_is_the_rate(photos)}"
    )
    assert run_cli(monkeypatch, *command, "--json") == 1
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert ran(stand_in) == [f"{name}/rung-1" for name in "abcde"] + ["b/rung-2", "c/rung-2"]
    assert "  no luck\nsearch    d, seed 0: FAILED (exit code 1)" in err
    assert [row["candidate"] for row in report["candidates"]] == ["b", "c", "e", "a", "d"]
    assert [row["outcome"] for row in report["candidates"]][-2:] == ["cut after rung 1", "failed in rung 1"]
    assert (report["winner"], report["selected_on"], report["failed"]) == ("b", "val", 1)
    # shortened, but with every stage; nobody looks at the test split
    asked = [load_config(stand_in / f"out/b/rung-{k}/seed-0.yaml") for k in (1, 2)]
    assert [[stage.name for stage in config.stages or []] for config in asked] == [
        [stage.name for stage in STRATEGIES["progressive"](10)]
    ] * 2
    assert [sum(stage.epochs for stage in config.stages or []) for config in asked] == [5, 5]
    assert asked[0].data.image_size == 64 < (asked[1].data.image_size or 0) < 224
    assert not any(config.data.score_test for config in asked)
    # in full
    winner = load_config(stand_in / "out/winner.yaml")
    assert winner == load_config(files[1], [f"data.path={photos}", "epochs=10", "batch.size=16"])
    text = (stand_in / "out/winner.yaml").read_text()
    assert f"tlearn train {stand_in}/out/winner.yaml" in text
    assert "chosen on val" in text.partition("data:")[0].replace("\n# ", " ")
    assert (stand_in / "out/search.png").read_bytes().startswith(b"\x89PNG")
    assert "| b | won | 50.0 @32 | 50.0 @32 |" in (stand_in / "out/search.md").read_text()

    # the same command tries what failed again, and what follows from it
    (stand_in / "mended").touch()
    assert run_cli(monkeypatch, *command) == 0
    assert ran(stand_in) == ["d/rung-1", "d/rung-2"]
    out = capfd.readouterr().out
    assert "cut after rung 1" in out
    assert f"tlearn train {stand_in}/out/winner.yaml" in out
    assert run_cli(monkeypatch, *command, "epochs=12") == 2
    assert "out/a/rung-1/seed-0: holds a run with other options" in capfd.readouterr().err
    file = stand_in / "out/a/rung-1/seed-0/result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_fingerprint": "abc"}))
    assert run_cli(monkeypatch, *command) == 2
    assert "out/a/rung-1/seed-0: was trained on other images" in capfd.readouterr().err


def test_runs_side_by_side_share_cores_and_devices(
    stand_in: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(stand_in / "model")
    monkeypatch.setattr("tlearn.apart.available_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    (stand_in / "behave").write_text(
        f"{AS_ASKED}{FINISH}{top1_is_the_rate(photos)}"
        "e = os.environ\n"
        "open(f'{here}/{who}.here', 'w').write(e['OMP_NUM_THREADS'] + ' ' + e['CUDA_VISIBLE_DEVICES'])\n"
        "deadline = time.time() + 20\n"
        "while len([f for f in os.listdir(here) if f.endswith('.here')]) < 2:\n"
        "    if time.time() > deadline: sys.exit('alone')\n"
        "    time.sleep(0.01)\n"
    )
    files = recipes(stand_in, photos, a="optimizer: {lr: 0.1}", b="optimizer: {lr: 0.2}", c="optimizer: {lr: 0.3}")
    assert run_cli(monkeypatch, "search", photos, *files, "--jobs", "2", "--out", stand_in / "out", "--json") == 0
    assert json.loads(capfd.readouterr().out)["winner"] == "c"
    shares = [(stand_in / f"{name}.here").read_text().split() for name in "abc"]
    assert {cores for cores, _ in shares} == {"3"}
    assert {devices for _, devices in shares[:2]} == {"3", "5"}


def test_on_slurm_every_run_is_a_job_and_what_waits_there_is_not_submitted_again(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = recipes(tmp_path, photos, a="optimizer: {lr: 0.1}", b="optimizer: {lr: 0.2}", c="optimizer: {lr: 0.3}")
    jobs: dict[str, str] = {}  # by candidate: the state of its job

    def send(config: Config, profile: Profile, run: Path) -> str:
        assert profile.nodes == 2
        jobs[run.parts[-3]] = "PENDING"
        return "7"

    def look(run: Path, job: str) -> str:
        name = run.parts[-3]
        if jobs[name] in ("PENDING", "RUNNING"):
            jobs[name] = {"PENDING": "RUNNING", "RUNNING": "FAILED" if name == "c" else "COMPLETED"}[jobs[name]]
        if jobs[name] == "COMPLETED" and not (run / "result.json").exists():
            write_run(run, load_config(run.with_name(f"{run.name}.yaml")).optimizer.lr)
        return jobs[name]

    monkeypatch.setattr("tlearn.submit._LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr("tlearn.submit.submit", send)
    monkeypatch.setattr("tlearn.submit.state", look)
    monkeypatch.setattr("tlearn.submit.last_job", lambda run: "7" if run.parts[-3] in jobs else None)
    monkeypatch.setattr("tlearn.submit.status", lambda run: {"failure": "rank 0 failed"})
    monkeypatch.setattr("tlearn.submit.is_active", lambda run, job: jobs[run.parts[-3]] in ("PENDING", "RUNNING"))
    jobs["b"] = "RUNNING"  # submitted by an earlier call
    (profile := tmp_path / "profile.yaml").write_text("nodes: 2\n")
    command = ["search", photos, *files, "--profile", profile, "--out", tmp_path / "out"]
    assert run_cli(monkeypatch, *command, "--json") == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["winner"] == "b"
    assert "c, seed 0: FAILED (rank 0 failed)" in err
    assert [name for name in "abc" if f"{name}, seed 0: job 7" in err] == ["a", "c"]
    assert run_cli(monkeypatch, *command, "--jobs", "2") == 2


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        (["a.yaml"], ["two candidates or more"]),
        (["a.yaml", "more/a.yaml"], ["these candidates have one name"]),
        (["bad.yaml", "worse.yaml"], ["bad.yaml: 1 problem", "did you mean epochs", "worse.yaml: strategy = 'auto'"]),
        (["a.yaml", "b.yaml", "seed=3"], ["--seeds N"]),
        (["a.yaml", "few.yaml"], ["a and few do not see the same images: max_train"]),
        (["a.yaml", "b.yaml", "data.path=x"], ["data.path has no effect"]),
        (["a.yaml", "b.yaml", "quick.epoch=3"], ["did you mean quick.epochs"]),
        (["strategy=full"], ["strategy=full has no effect without configs"]),
    ],
    ids=lambda value: value[0],
)
def test_what_cannot_be_searched_is_said_before_anything_is_trained(
    arguments: list[str],
    complaints: list[str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipes(tmp_path, photos, a="", b="", bad="epoch: 3", worse="strategy: auto", few="")
    (tmp_path / "few.yaml").write_text(f"data: {{path: {photos}, max_train: 50}}\n")
    (tmp_path / "more").mkdir()
    recipes(tmp_path / "more", photos, a="")
    before = sorted(tmp_path.rglob("*"))
    assert run_cli(monkeypatch, "search", photos, *arguments) == 2
    err = capsys.readouterr().err
    assert [complaint for complaint in complaints if complaint not in err] == []
    assert sorted(tmp_path.rglob("*")) == before


# candidates around a plan


def planned(monkeypatch: pytest.MonkeyPatch, *given: str) -> dict[str, Config]:
    """The neighbours of a plan that says: the head, of EfficientNet-Lite0."""
    config = load_config(None, ["data.path=x", *given])
    stages = stages_of((HEAD,), 12, config.model_dump(exclude_unset=True))
    model: dict[str, Any] = {"backbone": "timm:tf_efficientnet_lite0", "weights": "package:x"}
    options: dict[str, Any] = {"stages": stages, "data": {"image_size": 128}}
    options |= {} if "backbone" in config.model.model_fields_set else {"model": model}
    monkeypatch.setattr(tlearn.neighbours, "make_plan", lambda config: Plan(options, []))
    monkeypatch.setattr(tlearn.neighbours, "hub_has", lambda name: name == "timm:resnet18")
    packages = {"timm:tf_efficientnet_lite0": "package:x", "timm:tf_efficientnet_lite1": "package:y"}
    monkeypatch.setattr(tlearn.neighbours, "installed_packages", lambda: packages)
    return {name: Config.model_validate(options) for name, options in neighbours(config).items()}


def test_the_neighbours_of_a_plan_vary_its_stages_its_rates_and_its_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(monkeypatch)
    assert list(found) == [
        *("head", "last_block", "all", "step_by_step", "head_rate_x3", "head_rate_div3"),
        *("head_resnet18", "head_tf_efficientnet_lite1"),
    ]
    assert all(sum(stage.epochs for stage in config.stages or []) == 12 for config in found.values())
    optimizers = [(config.stages or [])[0].optimizer for name, config in found.items() if "rate" in name]
    assert [optimizer and optimizer.lr for optimizer in optimizers] == [3e-3, pytest.approx(3.3e-4)]
    assert found["head_resnet18"].model.weights == "default"
    assert found["head_tf_efficientnet_lite1"].model.weights == "package:y"
    assert len({config.model_dump_json() for config in found.values()}) == len(found)


def test_what_the_user_has_set_stays_in_all_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["model.backbone=timm:resnet50", "optimizer={name: sgd, lr: 0.1}", "epochs=4", "batch.size=8"]
    found = planned(monkeypatch, *given)
    assert list(found) == ["head", "last_block", "all", "step_by_step"]
    assert {config.model.backbone for config in found.values()} == {"timm:resnet50"}
    assert {(config.optimizer.lr, config.batch.size) for config in found.values()} == {(0.1, 8)}
    assert not any(stage.optimizer for config in found.values() for stage in config.stages or [])


def test_a_search_that_goes_on_is_not_planned_again(
    stand_in: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(stand_in / "model")
    (stand_in / "behave").write_text(f"{AS_ASKED}{FINISH}{top1_is_the_rate(photos)}")
    made = []

    def plan(function: object, arguments: tuple[Any, ...], nproc: int) -> list[dict[str, Any]]:
        made.append(arguments[0])
        options = {"data": {"path": str(photos)}, "optimizer": {"name": "adam"}}
        return [{name: options | {"optimizer": {"name": "adam", "lr": lr}} for name, lr in (("a", 0.1), ("b", 0.2))}]

    monkeypatch.setattr("tlearn.search.run_ranks", plan)
    command = ["search", photos, "batch.size=8", "--out", stand_in / "out"]
    assert run_cli(monkeypatch, *command) == 0
    assert run_cli(monkeypatch, *command) == 0
    assert made == ["tlearn.neighbours:neighbours"]
    assert ran(stand_in) == ["a/rung-1", "b/rung-1"]
    assert load_config(stand_in / "out/winner.yaml").optimizer.lr == 0.2
    assert run_cli(monkeypatch, *command, "batch.size=4") == 2
    assert "candidates.json: was planned for" in capfd.readouterr().err


def test_the_test_split_can_be_left_alone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepare(image_folder(tmp_path / "pictures", cat=30, dog=30), data, Options(val=0.2, test=0.2))
    assert set(Indexed(load_config(None, [f"data.path={data}"])).sizes) == {"train", "val", "test"}
    assert set(Indexed(load_config(None, [f"data.path={data}"], quick=True)).sizes) == {"train", "val"}


def test_the_candidates_of_configs_differ_in_what_is_searched_only() -> None:
    configs = [load_config(file) for file in sorted((ROOT / "configs/search").glob("*.yaml"))]
    assert 6 <= len(configs) <= 8
    alike = [(c.data.path, c.data.image_size, c.data.fit, c.epochs, c.batch, c.model.backbone) for c in configs]
    assert all(other == alike[0] for other in alike)


@pytest.mark.slow
def test_a_search_that_is_interrupted_goes_on_and_a_broken_candidate_stops_none(photos: Path, tmp_path: Path) -> None:
    broken = "model: {backbone: timm:no_such_network, weights: random}"
    whole = "strategy: scratch\nmodel: {backbone: test_efficientnet, weights: random}"
    files = recipes(tmp_path, photos, all=whole, broken=broken)
    options = [o for o in TINY if "backbone" not in o]
    command = [sys.executable, "-m", "tlearn", "search", str(photos), *map(str, files), *options, "epochs=6"]
    command += ["quick.samples=100", "save_every.steps=2", "--jobs", "2", "--out", str(tmp_path / "out"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    second = tmp_path / "out/all/rung-1/seed-0"
    deadline = time.monotonic() + 120
    while not any(second.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 75
    assert not (second / "result.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "no_such_network" in done.stderr
    report = json.loads(done.stdout)
    assert report["rungs"][0]["broken"] == ["broken"]
    assert report["winner"] == "all"
    assert len(json.loads((tmp_path / "out/all/rung-1/seed-0.json").read_text())) == 2
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert sum(row["kind"] == "start" for row in rows) == 2  # it went on where it was
    assert load_config(tmp_path / "out/winner.yaml").epochs == 6
