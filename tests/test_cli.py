"""The program as people and scripts use it: exit codes, JSON on stdout, nothing left behind by mistakes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image

from tlearn import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The program's exit code, in this process."""
    monkeypatch.setattr(sys, "argv", ["tlearn", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, made by the program."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, "train", f"data.path={photos}", *TINY, "epochs=2", "--run", folder) == 0
    return folder


def image_folder(root: Path, **counts: int) -> Path:
    """Noise pictures of 20 px, some per class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.effect_noise((20, 20), 50 + i + len(name)).save(root / name / f"{i}.png")
    return root


def test_prepare_train_evaluate_predict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_folder(tmp_path / "pictures", cat=12, dog=12)
    assert run(monkeypatch, "prepare", source, tmp_path / "data", "--val", "0.5", "--seed", "1") == 0
    options = (f"data.path={tmp_path / 'data'}", *TINY, "batch.size=4", "epochs=1")
    assert run(monkeypatch, "train", *options, "--run", tmp_path / "run") == 0
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", tmp_path / "run") == 0
    assert "val@32" in capsys.readouterr().out
    assert run(monkeypatch, "predict", tmp_path / "run", source / "cat", "--topk", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert lines[0].startswith(f"{source / 'cat' / '0.png'}: ")


def test_json_is_one_document_and_nothing_else_on_stdout(
    finished: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", finished, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    result = json.loads((finished / "result.json").read_text())
    assert scores["val"] == result["val"]
    broken = finished.parent / "broken.png"
    broken.write_bytes(b"no picture")
    picture = next((photo_folder / "val" / "cat").iterdir())
    assert run(monkeypatch, "predict", finished, picture, broken, "--json", "--topk", "10") == 0
    good, bad = json.loads(capsys.readouterr().out)
    assert good["file"] == str(picture)
    assert sum(entry["probability"] for entry in good["top"]) == pytest.approx(1, abs=1e-5)
    assert bad["error"]
    assert not bad["top"]
    assert run(monkeypatch, "predict", finished, broken, "--json") == 2


def test_evaluate_on_other_data(
    finished: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", finished, "--data", photo_folder / "val", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["val"]
    assert scores["n"] == scores["n_expected"] == 120  # a folder of classes is scored whole
    assert scores["confusion"] == json.loads((finished / "result.json").read_text())["val"]["confusion"]
    some = tmp_path / "some"
    for name in ("rocket", "cat"):
        shutil.copytree(photo_folder / "val" / name, some / name)
    assert run(monkeypatch, "evaluate", finished, "--data", some, "--json") == 0
    part = json.loads(capsys.readouterr().out)["val"]
    assert part["n"] == 24
    assert part["per_class"]["cat"]["recall"] == scores["per_class"]["cat"]["recall"]
    strangers = image_folder(tmp_path / "strangers", cat=3, zebra=3)
    assert run(monkeypatch, "evaluate", finished, "--data", strangers) == 2
    assert "zebra" in capsys.readouterr().err


def test_run_alone_goes_on_with_the_recorded_config(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: (finished / name).read_bytes() for name in ("metrics.jsonl", "best/model.safetensors")}
    result = json.loads((finished / "result.json").read_text())
    assert run(monkeypatch, "train", "--run", finished, "--resume", "must") == 0
    assert json.loads((finished / "result.json").read_text())["val"] == result["val"]
    assert {name: (finished / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("data.pth=x",), "did you mean data.path"),
        (("data.path=/nowhere",), "/nowhere"),
        (("data.path=EMPTY",), "is empty"),
        (("data.path=ONE",), "only one class"),
        (("data.path=BAD",), "without a usable image"),
        (("batch.size=201",), "only 200 train images"),
        (("model.weights=none.safetensors",), "none.safetensors"),
        (("model.backbone=test_vit", "data.image_size=33"), "data.image_size"),
        (("model.backbone=resnet999",), "resnet"),
        (("strategy=magic",), "staged"),
        (("stages=[{name: a, epochs: 1, train: [[haed, 1], ['.*', 0]]}]",), "haed"),
        (("precision=fp8",), "precision"),
        (("missing.yaml",), "missing.yaml"),
        (("a.yaml", "b.yaml"), "one config file"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(
    arguments: tuple[str, ...],
    complaint: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "EMPTY").mkdir()
    image_folder(tmp_path / "ONE", cat=3)
    image_folder(tmp_path / "BAD", cat=3, dog=1)
    (tmp_path / "BAD" / "dog" / "0.png").write_bytes(b"broken")
    given = [argument for argument in arguments if argument.endswith(".yaml")]
    options = [f"data.path={photos}", *TINY, *(argument for argument in arguments if argument not in given)]
    before = sorted(path for path in tmp_path.rglob("*"))
    assert run(monkeypatch, "train", *given, *options, "--run", "run") == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.is_file()]
    assert left == []
    assert not (tmp_path / "run").exists()


def test_usage_errors_are_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, "train", "--fast") == 2
    assert run(monkeypatch, "prepare", tmp_path) == 2
    assert run(monkeypatch, "evaluate", tmp_path) == 2


@pytest.mark.slow
def test_a_signal_ends_the_program_with_75_and_it_goes_on(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tlearn", "train", "--run", str(folder)]
    options = [f"data.path={photos}", *TINY, "data.workers=2", "strategy=full", "epochs=20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and schedulers do: the loader workers get it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "--run" in stderr
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert 0 < max(done) < 140
    workers = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False)
    assert workers.stdout == ""  # loader workers carry the command line of their parent
    # the very same command goes on
    finished = subprocess.run(
        [*command, *options, "--resume", "must"], capture_output=True, text=True, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if row["kind"] == "step"]
    assert steps == list(range(1, 141))


@pytest.mark.slow
def test_the_names_of_the_package_are_functions_whatever_was_imported_before() -> None:
    code = (
        "import tlearn.cli, tlearn.run, tlearn.data.prepare, tlearn\n"
        "from tlearn import load, load_config, prepare, train\n"
        "assert all(callable(f) for f in (load, load_config, prepare, train, tlearn.train, tlearn.prepare))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_stopped_prepare_goes_on(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "pictures", cat=400, dog=400)
    command = [sys.executable, "-m", "tlearn", "prepare", str(source), str(tmp_path / "data")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    journal = tmp_path / "data.partial" / "scan.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "again" in stderr
    assert not (tmp_path / "data").exists()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    audit = json.loads((tmp_path / "data" / "audit.json").read_text())
    assert audit["counts"]["files"] == 800


def test_held_out_images_alone_are_scored_where_a_folder_has_train_images_too(
    finished: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    for split, folder in (("train", "train"), ("test", "val")):
        shutil.copytree(photo_folder / folder, tmp_path / "data" / split)
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", finished, "--data", tmp_path / "data", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert "val" not in scores
    assert scores["test"]["n"] == 120


def test_a_run_on_a_bare_folder_is_scored_on_what_it_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    source = image_folder(tmp_path / "pictures", cat=20, dog=20)
    options = (f"data.path={source}", *TINY, "batch.size=8", "epochs=1")
    assert run(monkeypatch, "train", *options, "--run", tmp_path / "run") == 0
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", tmp_path / "run", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["val"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())["val"]
    assert 0 < result["n"] < 40
    assert scores["confusion"] == result["confusion"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--run", "{none}"], "{none}: holds no run to go on with; .*data.path=FOLDER"),
        (["train", "data.path=x", "--resume", "must"], "--resume must: .*--run RUN"),
        (["evaluate", "{finished}", "--data", "{none}"], "--data {none}: no such folder"),
        (["predict", "{finished}", "{empty}"], "no files in {empty}"),
    ],
)
def test_mistakes_with_folders_are_one_message(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"none": tmp_path / "none", "empty": tmp_path / "empty", "finished": finished}
    assert run(monkeypatch, *(argument.format(**names) for argument in arguments)) == 2
    assert re.fullmatch(f"tlearn: {message.format(**names)}.*\n", capsys.readouterr().err)


def test_a_pipe_among_pictures_does_not_stop_predict(
    finished: Path,
    tmp_path: Path,
    photo_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    shutil.copy(next((photo_folder / "val" / "cat").iterdir()), tmp_path / "cat.png")
    capsys.readouterr()
    assert run(monkeypatch, "predict", finished, tmp_path, "--json") == 0
    cat, pipe = json.loads(capsys.readouterr().out)
    assert cat["error"] is None
    assert pipe["error"] == "not a regular file"


def test_what_the_file_system_refuses_is_no_traceback(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run(monkeypatch, "train", f"data.path={photos}", *TINY, "--run", tmp_path / "run") == 2
    assert capsys.readouterr().err.endswith(f"tlearn: {tmp_path / 'run' / 'best'}: Permission denied\n")


def test_a_damaged_sample_is_named_in_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, tmp_path / "data")
    shard = tmp_path / "data" / "train-000000.tar"
    with tarfile.open(shard) as tar:
        place = next(member.offset_data for member in tar if member.name.endswith(".png"))
    with shard.open("r+b") as file:
        file.seek(place)
        file.write(bytes(64))
    options = (f"data.path={tmp_path / 'data'}", *TINY, "epochs=1", "data.workers=2")
    assert run(monkeypatch, "train", *options, "--run", tmp_path / "run") == 2
    assert re.search(
        r"\ntlearn: \S+/train-000000\.tar: sample \w{16}: .*prepare the data again\n$", capsys.readouterr().err
    )
