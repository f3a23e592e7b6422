"""Recipes side by side: the arithmetic of the table, the runs taking turns, what fails, what goes on."""

from __future__ import annotations

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
from test_cli import run as run_cli

from tlearn import apart
from tlearn.comparison import Trained, cells, draw, markdown, notes, paired_difference, read_run, spread, summarise
from tlearn.configfile import load_config
from tlearn.errors import TlearnError


def trained(seed: int, *val_top1: float, **others: Any) -> Trained:
    """A run of which only the accuracies matter."""
    figures: dict[str, Any] = {
        "best_top1": max(val_top1),
        "test_top1": None,
        "n_val": 100,
        "image_size_px": 128,
        "data_fingerprint": "abc",
        "trained_parameters": 1000,
        "train_images_per_s": 50.0,
        "wall_s": 10.0,
        "peak_mib": 900.0,
        "peak_device_mib": None,
        "attempts": 1,
    }
    return Trained(seed=seed, val_top1=list(val_top1), **(figures | others))


def test_a_row_holds_means_and_standard_errors_over_seeds() -> None:
    runs = [
        trained(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.6, wall_s=10.0, peak_mib=None, test_top1=0.5),
        trained(1, 0.3, 0.4, 0.3, 0.4, 0.5, 0.6, 0.9, 0.8, wall_s=20.0, peak_mib=800.0, test_top1=0.7),
    ]
    (row,) = summarise({"a": runs}, [0, 1])
    assert (row["epochs"], row["early_epochs"]) == (8, 2)
    assert row["early"] == {"n": 2, "mean": pytest.approx(0.3), "se": pytest.approx(0.1)}
    assert row["last"] == {"n": 2, "mean": pytest.approx(0.7), "se": pytest.approx(0.1)}
    assert row["best"]["mean"] == pytest.approx(0.8)
    assert row["test"]["mean"] == pytest.approx(0.6)
    assert (row["wall_s"], row["peak_mib"]) == (15.0, 800.0)
    assert spread([0.1, 0.2, 0.6])["se"] == pytest.approx(math.sqrt(0.07) / math.sqrt(3))


def test_differences_are_paired_by_seed() -> None:
    first = [trained(seed, top1) for seed, top1 in enumerate((0.3, 0.6, 0.8))]
    better = [trained(seed, top1) for seed, top1 in enumerate((0.40, 0.72, 0.94))]  # in every pair, by 0.10 to 0.14
    found = paired_difference(better, first)
    assert found is not None
    assert found["se"] == pytest.approx(0.02 / math.sqrt(3))
    # Student's t with 2 degrees of freedom: 4.303
    assert found["interval95"] == pytest.approx([0.12 - 4.303 * 0.011547, 0.12 + 4.303 * 0.011547], abs=1e-4)
    assert found["differs"]
    unclear = [trained(seed, top1) for seed, top1 in enumerate((0.33, 0.68, 0.81))]
    assert paired_difference(unclear, first)["differs"] is False  # type: ignore[index]
    alone = paired_difference(better[:1], first)
    assert alone is not None
    assert (alone["n"], alone["se"], alone["differs"]) == (1, None, None)
    assert paired_difference(better[:1], first[1:]) is None


def test_the_table_says_which_runs_failed() -> None:
    recipes = {"a": [trained(0, 0.5), trained(1, 0.6)], "b": [trained(1, 0.9)], "c": []}
    rows = summarise(recipes, [0, 1])
    heads, lines = cells(rows)
    assert heads[:4] == ["recipe", "seeds", "epochs", "val/top1@128 early"]
    assert lines[0][:6] == ["a", "2", "1", "55.0 ± 5.0", "55.0 ± 5.0", "55.0 ± 5.0"]
    assert lines[1][:4] == ["b", "1, 1 failed", "1", "90.0"]
    assert lines[1][6] == "+30.0, one seed"
    assert lines[2][:3] == ["c", "failed", ""]
    assert {len(line) for line in lines} == {len(heads)}
    assert rows[2]["failed"] == [0, 1]


def test_sizes_that_differ_stand_beside_every_accuracy() -> None:
    rows = summarise({"a": [trained(0, 0.5)], "b": [trained(0, 0.6, image_size_px=64, test_top1=0.3)]}, [0])
    heads, (a, b) = cells(rows)
    assert heads[3] == "val/top1@SIZE early"
    assert a[3:6] == ["50.0 @128"] * 3
    assert b[3:6] == ["60.0 @64"] * 3
    assert (a[7], b[7]) == ("", "30.0 @64")


@pytest.mark.parametrize("other", [{"data_fingerprint": "xyz"}, {"n_val": 99}])
def test_other_images_are_not_compared(other: dict[str, Any]) -> None:
    with pytest.raises(TlearnError, match=r"not trained on the same images: a \(seed 0\).*b \(seed 0\)"):
        summarise({"a": [trained(0, 0.5)], "b": [trained(0, 0.6, **other)]}, [0])


def test_the_markdown_is_a_table_under_its_command() -> None:
    rows = summarise({"a": [trained(0, 0.5), trained(1, 0.6, attempts=2)], "b": [trained(0, 0.6)]}, [0, 1])
    report = {
        "command": "tlearn compare a.yaml b.yaml",
        "date": "2026-01-02",
        "machine": "2 CPU cores",
        "recipes": rows,
    }
    lines = markdown(report).splitlines()
    assert lines[0] == "`tlearn compare a.yaml b.yaml` (2026-01-02, 2 CPU cores):"
    assert len({line.count("|") for line in lines[2:6]}) == 1
    assert lines[4].startswith("| a | 2 | 1 | 55.0 ± 5.0 |")
    assert "a, seed 1: interrupted; wall s counts what was done twice." in lines
    assert "about 5.0 points" in notes(rows)[1]  # sqrt(0.55 * 0.45 / 100)


def test_the_picture_is_a_png_also_where_runs_failed(tmp_path: Path) -> None:
    rows = summarise({"a": [trained(0, 0.5, 0.6), trained(1, 0.6, 0.8)], "b": []}, [0, 1])
    draw(rows, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["compare.png"]


def write_run(folder: Path, top1: float = 0.5) -> None:
    """What a finished run leaves, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    rows = [
        {"kind": "step", "images_per_s": 3.0},
        {"kind": "epoch", "val/top1@32": 0.25},
        {"kind": "stage", "trainable_parameters": 30},
        {"kind": "epoch", "val/top1@32": top1},
        {"kind": "stage", "trainable_parameters": 20},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu"}))
    result = {
        "seconds": 3.0,
        "val": {"top1": top1, "loss": 1.0, "n": 4},
        "image_size_px": 32,
        "data_fingerprint": "abc",
        "train_images_per_s": 7.5,
        "peak_device_mib": None,
    }
    (folder / "result.json").write_text(json.dumps(result))


def test_figures_come_from_the_run_folder_and_its_processes(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = read_run(tmp_path / "run", 3, [{"wall_s": 5.0, "peak_mib": None}, {"wall_s": 2.5, "peak_mib": 100.0}])
    assert run == Trained(3, [0.25, 0.5], 0.5, None, 4, 32, "abc", 30, 7.5, 7.5, 100.0, None, 2)


def recipes(folder: Path, data: Path, **options: str) -> list[Path]:
    """Config files, NAME.yaml with a line of options each."""
    files = []
    for name, line in options.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(f"data: {{path: {data}}}\n{line}\n")
    return files


FINISH = (
    "import json, os\nos.makedirs(folder)\n"
    "for name in ('metrics.jsonl', 'environment.json', 'result.json'):\n"
    "    open(f'{folder}/{name}', 'w').write(open(f'{here}/model/{name}').read())\n"
)


def test_recipes_take_turns_and_a_failure_stops_none(
    stand_in: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_run(stand_in / "model")
    (stand_in / "behave").write_text("if folder.endswith('b/seed-0'): sys.exit('no luck')\n" + FINISH)
    files = recipes(stand_in, photos, a="seed: 7", b="epochs: 3")
    command = ["compare", *files, "--seeds", "2", "--out", stand_in / "out"]
    assert run_cli(monkeypatch, *command, "--json") == 1
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert (stand_in / "order").read_text().split() == ["a/seed-0", "b/seed-0", "a/seed-1", "b/seed-1"]
    assert [row["failed"] for row in report["recipes"]] == [[], [0]]
    assert "  no luck\ncompare   b, seed 0: FAILED (exit code 1)" in err
    assert "3 runs left" in err
    assert load_config(stand_in / "out/a/seed-1.yaml").seed == 1
    # what is done stays as it is
    (stand_in / "behave").write_text(FINISH)
    (stand_in / "order").unlink()
    assert run_cli(monkeypatch, *command) == 0
    assert (stand_in / "order").read_text().split() == ["b/seed-0"]
    assert "| b | 2 | 2 | 25.0 ± 0.0 |" in (stand_in / "out/compare.md").read_text()
    assert json.loads((stand_in / "out/compare.json").read_text())["failed"] == 0


def test_a_signal_is_passed_on_and_waited_for(
    stand_in: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (stand_in / "behave").write_text(
        "import os, signal\n"
        "def saved(number, frame): print('saved'); sys.exit(75)\n"
        "signal.signal(signal.SIGINT, saved)\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(20)\n"
    )
    files = recipes(stand_in, photos, a="", b="")
    assert run_cli(monkeypatch, "compare", *files, "--out", stand_in / "out") == 75
    err = capfd.readouterr().err
    assert "stopped by SIGINT; start the same command again" in err
    assert "FAILED" not in err
    assert "saved" in (stand_in / "out/a/seed-0.log").read_text()
    (attempt,) = json.loads((stand_in / "out/a/seed-0.json").read_text())
    assert attempt["exit_code"] == 75
    assert (stand_in / "order").read_text().split() == ["a/seed-0"]


def test_an_attempt_whose_end_nobody_saw_ended_with_its_last_sign_of_life(tmp_path: Path, photos: Path) -> None:
    (file,) = recipes(tmp_path, photos, a="")
    job = apart.Job("a", 0, load_config(file), tmp_path / "seed-0")
    job.beside(".json").write_text('[{"started_at": 1000.0, "wall_s": null, "peak_mib": null}]')
    job.beside(".log").touch()
    os.utime(job.beside(".log"), (1000, 1042.5))
    assert job.attempts()[0]["wall_s"] == 42.5


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a.yaml"], "two configs or more"),
        (["a.yaml", "more/a.yaml"], "these recipes have one name"),
        (["a.yaml", "b.yaml", "seed=3"], "--seeds N"),
        (["a.yaml", "few.yaml"], "a and few do not see the same images: max_train"),
        (["a.yaml", "b.yaml", "epoch=3"], "did you mean epochs"),
        (["a.yaml", "missing.yaml"], "missing.yaml"),
        (["a.yaml", "b.yaml", "epochs=5", "--out", "other"], r"other/a/seed-0: holds a run with other options"),
        (["a.yaml", "b.yaml", "--out", "foreign"], "foreign/a/seed-0: is a run that was not begun by this command"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_compared_is_said_before_anything_is_trained(
    arguments: list[str],
    complaint: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipes(tmp_path, photos, a="", b="", few="")
    with (tmp_path / "few.yaml").open("w") as file:
        file.write(f"data: {{path: {photos}, max_train: 50}}\n")
    (tmp_path / "more").mkdir()
    recipes(tmp_path / "more", photos, a="")
    (tmp_path / "other/a").mkdir(parents=True)
    (tmp_path / "other/a/seed-0.yaml").write_text((tmp_path / "a.yaml").read_text())
    (tmp_path / "foreign/a/seed-0").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert run_cli(monkeypatch, "compare", *arguments) == 2
    assert complaint in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("folder", ["compare", "compare_small"])
def test_the_recipes_of_configs_differ_in_what_they_compare_only(folder: str) -> None:
    configs = [load_config(file) for file in sorted((ROOT / "configs" / folder).glob("*.yaml"))]
    assert len(configs) >= 3
    alike = [
        (c.data.path, c.data.fit, c.data.augment, c.epochs, c.stages, c.batch, c.precision, c.model.backbone)
        for c in configs
    ]
    assert all(other == alike[0] for other in alike)


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_where_it_was(photos: Path, tmp_path: Path) -> None:
    files = recipes(tmp_path, photos, head="strategy: feature_extraction", all="strategy: scratch")
    options = [*TINY, "epochs=4", "save_every.steps=3"]
    command = [sys.executable, "-m", "tlearn", "compare", *map(str, files), *options, "--seeds", "1"]
    command += ["--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    second = tmp_path / "out/all/seed-0"
    deadline = time.monotonic() + 120
    while not (second / "checkpoints").is_dir() or not any((second / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (second / "result.json").exists()
    first = (tmp_path / "out/head/seed-0/result.json").stat()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/head/seed-0/result.json").stat() == first
    assert "begins; 1 run" in done.stderr
    report = json.loads((tmp_path / "out/compare.json").read_text())
    head, whole = report["recipes"]
    assert [run["attempts"] for row in (head, whole) for run in row["runs"]] == [1, 2]
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 29))
    assert sum(row["kind"] == "start" for row in rows) == 2  # it was resumed, not begun anew
    assert whole["trained_parameters"] > head["trained_parameters"]
    assert all(100 < row["peak_mib"] < 10_000 for row in (head, whole))
    assert all(0 < row["best"]["mean"] <= 1 and row["difference"] is None for row in (head,))
    assert whole["difference"]["n"] == 1
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    assert "head" in done.stdout
    assert "against head" in (tmp_path / "out/compare.md").read_text()
