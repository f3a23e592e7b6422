"""A folder of images to prepared data: what is taken, what is left out and why, and what survives a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pictures import encode, noise, photo, pixels, read_with_webdataset, write_images
from PIL import Image

from tlearn.data import prepare as prepare_module
from tlearn.data import scan
from tlearn.data.plan import Options
from tlearn.data.prepare import open_or_prepare, prepare, prepare_cached
from tlearn.data.shards import Index, read_index
from tlearn.errors import StoppedBySignalError, TlearnError


def audit(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def files_of(index: Index, split: str) -> dict[str, str]:
    """{file: class} of a split, as plain webdataset reads it."""
    urls = [str(index.root / shard.name) for shard in index.splits[split].shards]
    samples = read_with_webdataset(urls)
    for sample in samples:
        assert index.classes[int(sample["cls"])] == json.loads(sample["json"])["class"]
    return {json.loads(s["json"])["file"]: json.loads(s["json"])["class"] for s in samples}


ON_ALL_CORES = scan.on_all_cores


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes takes longer than reading small pictures."""
    for module in (scan, prepare_module):
        monkeypatch.setattr(module, "on_all_cores", map)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_images(tmp_path / "source", {"cat": 8, "dog": 8})


# -- what is taken


def test_class_folders_become_classes_and_a_stratified_split(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"owl": 150, "cat": 150, "dog/old/er": 150}, side=5)
    index = prepare(source, tmp_path / "out")
    assert index.classes == ("cat", "dog", "owl")
    assert set(index.splits) == {"train", "val"}
    per_class = index.splits["val"].per_class(3)
    assert ((per_class > 14) & (per_class < 46)).all(), "30 expected, standard deviation 5"
    assert (per_class + index.splits["train"].per_class(3)).tolist() == [150, 150, 150]
    for split in ("train", "val"):
        for file, class_name in files_of(index, split).items():
            assert file.split("/")[0] == class_name
            assert (source / file).is_file()


def test_stored_bytes_are_the_bytes_of_the_files(source: Path, tmp_path: Path) -> None:
    (source / "cat" / "photo.JPEG").write_bytes(encode(noise(900), "JPEG"))
    (source / "cat" / "wrong name.png").write_bytes(encode(noise(901), "BMP"))
    (source / "dog" / "no ending").write_bytes(encode(noise(902), "WEBP"))
    index = prepare(source, tmp_path / "out")
    stored = {split.read(i) for split in index.splits.values() for i in range(len(split))}
    assert stored == set(contents(source).values())
    assert len(stored) == 19


@pytest.mark.parametrize("val", ["val", "Valid", "validation"])
def test_given_train_val_and_test_folders_are_kept(tmp_path: Path, val: str) -> None:
    layout = {"train/cat": 5, "train/dog": 4, f"{val}/cat": 3, f"{val}/dog": 2, "test/cat": 1, "test/dog": 2}
    source = write_images(tmp_path / "source", layout)
    index = prepare(source, tmp_path / "out", Options(val=0.5, test=0.5))
    assert index.classes == ("cat", "dog")
    assert {name: split.per_class(2).tolist() for name, split in index.splits.items()} == {
        "train": [5, 4],
        "val": [3, 2],
        "test": [1, 2],
    }
    assert all(file.startswith(f"{val}/") for file in files_of(index, "val"))


def test_a_train_folder_without_val_is_split(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"train/cat": 20, "train/dog": 20, "test/cat": 3, "test/dog": 3})
    index = prepare(source, tmp_path / "out", Options(val=0.3))
    assert len(index.splits["test"]) == 6
    assert all(file.startswith("train/") for file in files_of(index, "val"))
    assert len(index.splits["train"]) + len(index.splits["val"]) == 40


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"train": 5, "bus": 5, "test": 5})
    assert prepare(source, tmp_path / "out").classes == ("bus", "test", "train")
    nested = write_images(tmp_path / "nested", {"train/steam": 5, "bus/red": 5})
    assert prepare(nested, tmp_path / "out2").classes == ("bus", "train")


def test_a_test_folder_of_unlabelled_images_does_not_turn_the_splits_into_classes(tmp_path: Path) -> None:
    """As in many competitions: train/<class>/ and a flat test/."""
    source = write_images(tmp_path / "source", {"train/cat": 6, "train/dog": 6, "test": 6})
    try:
        classes = prepare(source, tmp_path / "out").classes
    except TlearnError as error:
        assert "test" in str(error)  # noqa: PT017
    else:
        assert classes == ("cat", "dog")


def test_an_empty_val_folder_does_not_turn_train_into_a_class(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"train/cat": 6, "train/dog": 6, "val": 0})
    assert prepare(source, tmp_path / "out").classes == ("cat", "dog")


def test_hidden_files_and_folders_are_ignored(source: Path, tmp_path: Path) -> None:
    write_images(source, {".git": 1, "cat/.thumbnails": 1, "__MACOSX/cat": 1}, first_seed=5)
    for name in (".DS_Store", "cat/.DS_Store", "cat/._000.png", "cat/Thumbs.db", "dog/desktop.ini"):
        (source / name).write_bytes(b"x")
    out = tmp_path / "out"
    index = prepare(source, out)
    assert index.classes == ("cat", "dog")
    assert audit(out)["counts"] == {
        "files": 16,
        "accepted": 16,
        "quarantined": 0,
        "duplicates": 0,
        "leaks": 0,
    }


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    store = write_images(tmp_path / "store", {"cat": 5, "dog": 5})
    source = tmp_path / "source"
    source.mkdir()
    (source / "cat").symlink_to(store / "cat")
    (source / "dog").mkdir()
    for path in (store / "dog").iterdir():
        (source / "dog" / path.name).symlink_to(path)
    (source / "dog" / "loop").symlink_to(source)
    index = prepare(source, tmp_path / "out")
    assert index.meta["splits"]["train"]["n"] + index.meta["splits"]["val"]["n"] == 10
    assert index.classes == ("cat", "dog")


def test_a_link_from_one_class_into_another_does_not_make_the_other_vanish(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"cat": 4, "dog": 4, "owl": 4})
    (source / "cat" / "more").symlink_to(source / "dog")
    out = tmp_path / "out"
    try:
        index = prepare(source, out)
    except TlearnError as error:  # every dog has two labels: all right to refuse
        assert "dog" in str(error)  # noqa: PT017
    else:
        assert index.classes == ("cat", "dog", "owl")


# -- what is left out


def test_files_that_are_no_usable_image_are_quarantined_with_the_reason(source: Path, tmp_path: Path) -> None:
    png = encode(noise(700), "PNG")
    (source / "cat" / "cut.png").write_bytes(png[: len(png) // 2])
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "dog" / "notes.txt").write_text("two dogs")
    (source / "dog" / "desk.ico").write_bytes(encode(noise(701, 32, 32), "ICO"))
    (source / "dog" / "gone.png").symlink_to(source / "nowhere.png")
    (source / "readme.md").write_text("cats and dogs")
    out = tmp_path / "out"
    index = prepare(source, out)
    reasons = {q["file"]: q["reason"] for q in audit(out)["quarantined"]}
    assert reasons.keys() == {
        "cat/cut.png",
        "cat/empty.jpg",
        "dog/notes.txt",
        "dog/desk.ico",
        "dog/gone.png",
        "readme.md",
    }
    assert reasons["cat/cut.png"].startswith("cannot be decoded: ")
    assert reasons["cat/empty.jpg"] == "empty file"
    assert reasons["dog/notes.txt"].startswith("not an image of a known format")
    assert reasons["dog/desk.ico"].startswith("not an image of a known format")
    assert reasons["dog/gone.png"].startswith("cannot be read: ")
    assert reasons["readme.md"] == "not in a class folder"
    assert len(index.splits["train"]) + len(index.splits["val"]) == 16


def test_files_with_several_frames_are_taken_and_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, frames in {"cat/moving.gif": 3, "cat/still.gif": 1, "dog/stack.tif": 2}.items():
        pictures = [noise(710 + i + frames) for i in range(frames)]
        format = "GIF" if name.endswith("gif") else "TIFF"
        (source / name).write_bytes(encode(pictures[0], format, save_all=True, append_images=pictures[1:]))
    out = tmp_path / "out"
    index = prepare(source, out)
    assert sum(map(len, index.splits.values())) == 19
    assert audit(out)["several_frames"] == ["cat/moving.gif", "dog/stack.tif"]
    assert "2 files with several frames, of which the first is used" in capsys.readouterr().err
    stored = {**files_of(index, "train"), **files_of(index, "val")}
    assert {"cat/moving.gif", "cat/still.gif", "dog/stack.tif"} <= stored.keys()


def test_files_beside_the_split_folders_are_quarantined(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/dog": 2})
    write_images(source, {"extra/cat": 1, "train": 1}, first_seed=3)
    out = tmp_path / "out"
    assert prepare(source, out).classes == ("cat", "dog")
    assert {q["file"]: q["reason"] for q in audit(out)["quarantined"]} == {
        "extra/cat/000.png": "outside the train, val and test folders",
        "train/000.png": "not in a class folder",
    }


def test_exact_duplicates_are_dropped(source: Path, tmp_path: Path) -> None:
    for name in ("copy.png", "again.png"):
        shutil.copy(source / "cat" / "003.png", source / "cat" / name)
    out = tmp_path / "out"
    index = prepare(source, out)
    assert audit(out)["duplicates"] == [
        {"file": "cat/again.png", "same_as": "cat/003.png"},
        {"file": "cat/copy.png", "same_as": "cat/003.png"},
    ]
    assert index.meta["leaks"] == 0
    keys = np.concatenate([split.rows["key"] for split in index.splits.values()])
    assert len(keys) == len(set(keys.tolist())) == 16


def test_an_image_in_several_splits_is_a_leak_and_the_held_out_copy_is_kept(tmp_path: Path) -> None:
    layout = {f"{split}/{name}": 4 for split in ("train", "val", "test") for name in ("cat", "dog")}
    source = write_images(tmp_path / "source", layout)
    shutil.copy(source / "val/cat/000.png", source / "train/cat/leak.png")
    shutil.copy(source / "test/dog/000.png", source / "train/dog/leak.png")
    shutil.copy(source / "test/dog/000.png", source / "val/dog/leak.png")
    out = tmp_path / "out"
    index = prepare(source, out)
    assert index.meta["leaks"] == 2
    assert sorted((leak["kind"], sorted(leak["files"])) for leak in audit(out)["leaks"]) == [
        (
            "one image in several splits (kept: test)",
            ["test/dog/000.png", "train/dog/leak.png", "val/dog/leak.png"],
        ),
        ("one image in several splits (kept: val)", ["train/cat/leak.png", "val/cat/000.png"]),
    ]
    assert {name: len(split) for name, split in index.splits.items()} == {"train": 8, "val": 8, "test": 8}
    assert not any("leak" in file for split in index.splits for file in files_of(index, split))


def test_one_image_under_two_labels_is_dropped_everywhere(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "cat" / "000.png", source / "dog" / "also.png")
    shutil.copy(source / "cat" / "000.png", source / "cat" / "copy.png")
    out = tmp_path / "out"
    index = prepare(source, out)
    (leak,) = audit(out)["leaks"]
    assert leak["kind"].startswith("one image under several labels")
    assert sorted(leak["files"]) == ["cat/000.png", "cat/copy.png", "dog/also.png"]
    seen = {**files_of(index, "train"), **files_of(index, "val")}
    assert len(seen) == 15
    assert not seen.keys() & set(leak["files"])


def test_every_file_of_the_source_has_one_fate_in_the_audit(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"train/cat": 6, "train/dog": 6, "val/cat": 3, "val/dog": 3})
    shutil.copy(source / "val/cat/000.png", source / "train/cat/leak.png")
    shutil.copy(source / "train/cat/001.png", source / "train/cat/copy.png")
    shutil.copy(source / "train/cat/002.png", source / "train/dog/two labels.png")
    (source / "train/dog/broken.jpg").write_bytes(b"\xff\xd8\xff")
    (source / "stray.txt").write_bytes(b"x")
    out = tmp_path / "out"
    prepare(source, out)
    found = audit(out)
    accepted = [file for files in found["accepted"].values() for file in files]
    leaked = [file for leak in found["leaks"] for file in leak["files"] if file not in accepted]
    others = [entry["file"] for kind in ("quarantined", "duplicates") for entry in found[kind]]
    assert Counter([*accepted, *others, *leaked]) == Counter(contents(source).keys())
    assert found["counts"]["files"] == len(contents(source))
    assert found["counts"]["accepted"] == len(accepted) == 17
    assert (len(found["quarantined"]), len(found["duplicates"]), len(found["leaks"])) == (2, 1, 2)


# -- the split


def test_images_added_later_do_not_move_old_ones(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"cat": 60, "dog": 60}, side=5)
    before = prepare(source, tmp_path / "before", Options(val=0.3, test=0.2))
    write_images(source / "more", {"x": 40}, first_seed=9, side=5)
    (source / "more" / "x").rename(source / "cat" / "more")
    (source / "more").rmdir()
    after = prepare(source, tmp_path / "after", Options(val=0.3, test=0.2))
    for name in ("train", "val", "test"):
        old, new = (set(index.splits[name].rows["key"].tolist()) for index in (before, after))
        assert old
        assert old <= new
    assert sum(map(len, after.splits.values())) == 160


def test_the_split_follows_the_content_and_the_seed_and_not_the_names(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"cat": 30, "dog": 30}, side=5)
    renamed = tmp_path / "renamed"
    for i, path in enumerate(sorted(source.rglob("*.png"))):
        target = renamed / path.parent.name / f"{97 * i % 61}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    first = prepare(source, tmp_path / "a")
    assert prepare(renamed, tmp_path / "b").fingerprint == first.fingerprint
    other = prepare(source, tmp_path / "c", Options(seed=1))
    assert set(other.splits["val"].rows["key"].tolist()) != set(first.splits["val"].rows["key"].tolist())


def test_shares_are_what_was_asked_for(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"cat": 200, "dog": 200}, side=4)
    index = prepare(source, tmp_path / "out", Options(val=0.3, test=0.1))
    sizes = {name: len(split) for name, split in index.splits.items()}
    assert 90 < sizes["val"] < 150
    assert 22 < sizes["test"] < 60
    assert sum(sizes.values()) == 400


@pytest.mark.parametrize("seed", range(4))
def test_a_small_class_has_an_image_to_train_and_one_to_check(tmp_path: Path, seed: int) -> None:
    source = write_images(tmp_path / "source", {"cat": 12, "dog": 3, "owl": 2}, first_seed=seed)
    for number, (val, test) in enumerate([(0.01, 0.0), (0.2, 0.0), (0.9, 0.0), (0.99, 0.0)]):
        index = prepare(source, tmp_path / f"out{number}", Options(val=val, test=test, seed=seed))
        assert (index.splits["val"].per_class(3) >= 1).all()
        assert (index.splits["train"].per_class(3) >= 1).all()
    index = prepare(source, tmp_path / "test", Options(val=0.1, test=0.1, seed=seed))
    assert (index.splits["test"].per_class(3) >= 1).all()
    assert (index.splits["train"].per_class(3) >= 1).all()
    assert index.splits["val"].per_class(3)[0] >= 1


def test_the_only_image_of_a_class_trains(tmp_path: Path) -> None:
    for seed in range(8):
        source = write_images(tmp_path / f"source{seed}", {"cat": 6, "dog": 1}, first_seed=seed)
        index = prepare(source, tmp_path / f"out{seed}", Options(val=0.5))
        assert index.splits["train"].per_class(2)[1] == 1


def test_without_val_everything_trains_and_with_only_val_nothing_does(source: Path, tmp_path: Path) -> None:
    assert prepare(source, tmp_path / "all", Options(val=0)).splits.keys() == {"train"}
    index = prepare(source, tmp_path / "none", Options(val=1))
    assert index.splits.keys() == {"val"}
    assert len(index.splits["val"]) == 16


# -- what is written


def test_several_shards_hold_every_class_and_are_read_by_plain_webdataset(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"cat": 8, "dog": 8, "owl": 8}, side=300)  # noise: 270 kB each
    index = prepare(source, tmp_path / "out", Options(shard_mib=1))
    train = index.splits["train"]
    assert len(train.shards) >= 3
    assert all(2**20 <= shard.bytes < 1.5 * 2**20 for shard in train.shards[:-1])
    assert len(files_of(index, "train")) + len(files_of(index, "val")) == 24
    whole = [set(train.rows["label"][train.rows["shard"] == i].tolist()) for i in range(len(train.shards))]
    assert max(map(len, whole)) == 3, "not one shard after the other filled with one class"


def test_max_side_makes_large_pictures_smaller_and_leaves_small_ones_alone(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"cat": 3, "dog": 3})
    exif = Image.Exif()
    exif[0x0112] = 6
    (source / "cat" / "photo.jpg").write_bytes(encode(photo(), "JPEG", quality=95, exif=exif.tobytes()))
    (source / "dog" / "wide.png").write_bytes(encode(noise(1, 2000, 3), "PNG"))
    index = prepare(source, tmp_path / "out", Options(max_side=64, val=0))
    urls = [str(index.root / "train-000000.tar")]
    samples = {json.loads(s["json"])["file"]: s for s in read_with_webdataset(urls)}
    turned = pixels(samples["cat/photo.jpg"]["jpg"])
    assert turned.shape == (64, 43, 3)
    expected = np.asarray(photo().resize((64, 43), Image.Resampling.LANCZOS).transpose(Image.Transpose.ROTATE_270))
    assert np.abs(turned - expected).mean() < 6
    assert pixels(samples["dog/wide.png"]["png"]).shape == (1, 64, 3)
    for i in range(3):
        assert samples[f"cat/00{i}.png"]["png"] == (source / f"cat/00{i}.png").read_bytes()


def test_a_smaller_max_side_is_another_data_set(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"cat": 3, "dog": 3}, side=40)
    prints = {prepare(source, tmp_path / f"{side}", Options(max_side=side)).fingerprint for side in (None, 20, 16)}
    assert len(prints) == 3


def test_statistics_are_those_of_the_training_pictures(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, colour in {"cat": (255, 0, 51), "dog": (0, 0, 153)}.items():
        for split, side in (("train", 10), ("val", 30)):
            (source / split / name).mkdir(parents=True)
            shade = tuple(c if split == "train" else 255 for c in colour)
            image = Image.new("RGB", (side, side * 2 if name == "cat" else side), shade)
            image.save(source / split / name / "a.png")
    (source / "val" / "dog" / "a.png").write_bytes(encode(noise(3), "PNG"))  # not the cat's
    meta = prepare(source, tmp_path / "out").meta
    assert meta["mean"] == pytest.approx([0.5, 0, 0.4], abs=1e-5)
    assert meta["std"] == pytest.approx([0.5, 0, 0.2], abs=1e-5)
    assert meta["image_size_px"] == {
        "width": {"min": 10, "median": 10, "max": 10},
        "height": {"min": 10, "median": 15, "max": 20},
    }


def test_the_same_set_prepared_twice_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, tmp_path / "a", Options(max_side=16))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)  # a time stamp would differ
    prepare(source, tmp_path / "b", Options(max_side=16))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert names(tmp_path / "a") == [
        "audit.json",
        "index.json",
        "train-000000.tar",
        "train.samples.npy",
        "val-000000.tar",
        "val.samples.npy",
    ]


def test_all_cores_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_images(tmp_path / "source", {"cat": 40, "dog": 40}, side=20)
    (source / "cat" / "broken.png").write_bytes(b"no")
    prepare(source, tmp_path / "one", Options(max_side=16))
    for module in (scan, prepare_module):
        monkeypatch.setattr(module, "on_all_cores", ON_ALL_CORES)
    prepare(source, tmp_path / "many", Options(max_side=16))
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_the_fingerprint_changes_with_a_label(source: Path, tmp_path: Path) -> None:
    before = prepare(source, tmp_path / "a", Options(val=0)).fingerprint
    (source / "cat" / "000.png").rename(source / "dog" / "from cat.png")
    assert prepare(source, tmp_path / "b", Options(val=0)).fingerprint != before
    (source / "dog" / "from cat.png").rename(source / "cat" / "000.png")
    assert prepare(source, tmp_path / "c", Options(val=0)).fingerprint == before


@pytest.mark.parametrize("name", ["a.b c", 'say "hi"', "ünïcode", "line\nbreak", "100%d:{0..3}", "%s"])
def test_classes_and_files_may_have_any_name(tmp_path: Path, name: str) -> None:
    source = write_images(tmp_path / "source", {name: 3, "other": 3})
    (source / name / "000.png").rename(source / name / f"{name}.png")
    index = prepare(source, tmp_path / "out")
    assert set(index.classes) == {name, "other"}
    assert f"{name}/{name}.png" in {**files_of(index, "train"), **files_of(index, "val")}


@pytest.mark.parametrize("where", ["file", "class"])
def test_names_that_are_not_utf8_are_no_reason_to_fail(source: Path, tmp_path: Path, where: str) -> None:
    """As they come out of old zip files."""
    folder = os.fsencode(source / "cat")
    if where == "file":
        os.rename(folder + b"/000.png", folder + b"/caf\xe9.png")  # noqa: PTH104
    else:
        os.rename(folder, folder + b"\xe9")  # noqa: PTH104
    index = prepare(source, tmp_path / "out")
    assert len(index.classes) == 2
    assert sum(map(len, index.splits.values())) == 16


# -- again, interrupted, and side by side


def test_preparing_again_does_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = prepare(source, out)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}

    def never(*_: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(scan, "_examine", never)
    monkeypatch.setattr(prepare_module, "_content", never)
    assert prepare(source, out).fingerprint == first.fingerprint
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_preparing_into_other_data_is_refused_and_leaves_it_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, out)
    before = contents(out)
    with pytest.raises(TlearnError, match=r"out: was prepared from other files or with other options"):
        prepare(source, out, Options(val=0.5))
    write_images(source, {"owl": 2}, first_seed=4)
    with pytest.raises(TlearnError, match=r"choose another OUT or remove it"):
        prepare(source, out)
    assert contents(out) == before


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, function: str, n: int) -> list[str]:
    """Ctrl-C after n calls; returns the list of files that it was called with."""
    module = scan if hasattr(scan, function) else prepare_module
    real, calls = getattr(module, function), []

    def interrupted(*args: Any) -> Any:
        if len(calls) == n:
            raise KeyboardInterrupt
        calls.append(args[-1].file)
        return real(*args)

    monkeypatch.setattr(module, function, interrupted)
    return calls


def test_an_interrupted_run_goes_on_where_it_was(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prepare(source, tmp_path / "straight")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        before = _interrupt_after(patch, "_examine", 6)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out)
    assert not out.exists()
    after = _interrupt_after(monkeypatch, "_examine", 1000)
    assert prepare(source, out).fingerprint == expected.fingerprint
    assert sorted(before + after) == sorted(contents(source))
    assert contents(out) == contents(tmp_path / "straight")
    assert names(tmp_path) == ["out", "source", "straight"]


def test_a_run_cut_off_twice_keeps_what_both_did(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time in the middle of a line of the journal."""
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "scan.jsonl"
    for n in (6, 7):
        with monkeypatch.context() as patch:
            _interrupt_after(patch, "_examine", n)
            with pytest.raises(KeyboardInterrupt):
                prepare(source, out)
        if n == 6:
            os.truncate(journal, journal.stat().st_size - 10)
    last = _interrupt_after(monkeypatch, "_examine", 1000)
    prepare(source, out)
    assert len(last) == 16 - 5 - 7


def test_a_file_that_changed_since_the_interruption_is_looked_at_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        done = _interrupt_after(patch, "_examine", 6)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out)
    (source / done[2]).write_bytes(b"broken meanwhile")
    (source / done[3]).unlink()
    again = _interrupt_after(monkeypatch, "_examine", 1000)
    prepare(source, out)
    assert len(again) == 11
    assert [q["file"] for q in audit(out)["quarantined"]] == [done[2]]
    assert audit(out)["counts"]["files"] == 15


@pytest.mark.parametrize("n", [3, 14])
def test_a_run_interrupted_while_writing_ends_like_any_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    prepare(source, tmp_path / "straight")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, "_content", n)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out)
    examined = _interrupt_after(monkeypatch, "_examine", 0)
    prepare(source, out)
    assert examined == []
    assert contents(out) == contents(tmp_path / "straight")


def test_an_interrupted_run_leaves_nothing_in_the_output_of_a_run_with_other_options(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale test shard would hold images that now train."""
    prepare(source, tmp_path / "straight", Options(val=0))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, "_content", 15)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out, Options(val=0.3, test=0.3))
    prepare(source, out, Options(val=0))
    assert names(out) == names(tmp_path / "straight")


def test_an_interrupted_run_leaves_no_shard_to_a_run_with_larger_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_images(tmp_path / "source", {"cat": 6, "dog": 6}, side=300)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _interrupt_after(patch, "_content", 11)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out, Options(val=0, shard_mib=1))
    assert (tmp_path / "out.partial" / "train-000001.tar").exists()
    index = prepare(source, out, Options(val=0))
    assert [shard.samples for shard in index.splits["train"].shards] == [12]
    assert [name for name in names(out) if name.endswith(".tar")] == ["train-000000.tar"]


def _killed_after(n: int) -> Callable[..., Any]:
    """A progress bar that ends this process outright once n images are done."""

    @contextmanager
    def bar(*_: object, **__: object) -> Iterator[Callable[..., None]]:
        left = [n]

        def advance(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        yield advance

    return bar


def test_a_run_that_was_killed_ends_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_images(tmp_path / "source", {"cat": 15, "dog": 15})
    prepare(source, tmp_path / "straight")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(scan, "progress_bar", _killed_after(29))
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(source, out))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    examined = _interrupt_after(monkeypatch, "_examine", 1000)
    prepare(source, out)
    assert len(examined) < 30, "the journal is written out as it grows"
    assert contents(out) == contents(tmp_path / "straight")
    assert names(tmp_path) == ["out", "source", "straight"]


def test_a_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", {"cat": 40, "dog": 40})
    mark = f"TLEARN_TEST_{os.getpid()}"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_scan as t; t.scan.progress_bar = t._killed_after(3)\n"
        "t.prepare(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, mark: "1"}, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL

    def orphans() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if mark in process.environ():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    end = time.monotonic() + 3
    while (left := orphans()) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        process.kill()
    assert not left


def test_two_processes_may_prepare_the_same_output(source: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=prepare, args=(source, tmp_path / "out")) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert prepare(source, tmp_path / "straight").fingerprint == read_index(tmp_path / "out").fingerprint
    assert contents(tmp_path / "straight") == contents(tmp_path / "out")
    assert names(tmp_path) == ["out", "source", "straight"]


# -- what is refused


def _no_folder(source: Path) -> None:
    shutil.rmtree(source)


def _empty_folder(source: Path) -> None:
    shutil.rmtree(source)
    source.mkdir()


def _one_class(source: Path) -> None:
    shutil.rmtree(source / "dog")


def _flat(source: Path) -> None:
    for path in (source / "cat").iterdir():
        path.rename(source / path.name)
    shutil.rmtree(source / "dog")
    (source / "cat").rmdir()


def _unreadable_class(source: Path) -> None:
    for path in (source / "dog").iterdir():
        path.write_bytes(b"woof")


def _all_leaked(source: Path) -> None:
    shutil.rmtree(source / "dog")
    (source / "dog").mkdir()
    shutil.copy(source / "cat" / "000.png", source / "dog" / "000.png")


def _unknown_class_in_val(source: Path) -> None:
    for name in ("cat", "dog"):
        (source / name).rename(source.parent / name)
        (source / "train").mkdir(exist_ok=True)
        (source.parent / name).rename(source / "train" / name)
    write_images(source, {"val/cat": 1, "val/owl": 1}, first_seed=2)


REFUSED = [
    (_no_folder, r"source: no such folder or file; give one of\n .*sub-folder of images per class"),
    (_empty_folder, r"source: the folder is empty; expected one sub-folder of images per class"),
    (_one_class, r"source: only one class \('cat'\); a classifier needs two or more"),
    (_flat, r"source: 8 files but none in a class folder \(first: 000\.png: not in a class folder\)"),
    (_unreadable_class, r"without a usable image: 'dog' \(dog/000\.png: not an image of a known format"),
    (_all_leaked, r"without a usable image: 'dog' \(every image also has another label\)"),
    (_unknown_class_in_val, r"class 'owl' has no image in train but some elsewhere"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED)
def test_a_source_that_cannot_make_a_classifier_is_refused_and_nothing_is_left_behind(
    source: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(source)
    before = names(tmp_path)
    with pytest.raises(TlearnError, match=message):
        prepare(source, tmp_path / "out")
    assert names(tmp_path) == before


def test_an_output_in_use_for_something_else_is_refused_and_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    before = names(tmp_path)
    for out in (tmp_path / "out", tmp_path / "file", source):
        with pytest.raises(TlearnError, match="exists and is not prepared data; choose another OUT or remove it"):
            prepare(source, out)
    assert contents(tmp_path / "out") == {"thesis.tex": b"mine"}
    assert names(tmp_path) == before


def test_an_empty_output_folder_is_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("out", "link"):
        assert len(prepare(source, tmp_path / name).classes) == 2


def test_a_folder_of_the_user_that_is_called_partial_survives_an_error(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "dog")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(TlearnError):
        prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out.partial") == {"thesis.tex": b"mine"}


def test_a_folder_of_the_user_that_is_called_partial_survives_preparing_again(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
    with suppress(TlearnError):
        prepare(source, tmp_path / "out")
    assert contents(tmp_path / "out.partial") == {"thesis.tex": b"mine"}


def test_a_file_that_changes_while_it_is_prepared_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = prepare_module._content

    def late(*args: Any) -> Any:
        (source / "dog" / "005.png").write_bytes(encode(noise(77), "PNG"))
        return real(*args)

    monkeypatch.setattr(prepare_module, "_content", late)
    with pytest.raises(TlearnError, match=r"dog/005\.png: changed while it was being prepared; start again"):
        prepare(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": -0.1}, "--val -0.1"),
        ({"val": 0.6, "test": 0.5}, "together at most 1"),
        ({"val": float("nan")}, "--val nan"),
        ({"max_side": 15}, "--max-side 15: at least 16 px"),
        ({"shard_mib": 0}, "--shard-mib 0: at least 1 MiB"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TlearnError, match=message):
        Options(**options)


# -- training on a plain folder


def test_a_plain_folder_is_prepared_once_into_the_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    first = open_or_prepare(source)
    assert first.root.is_relative_to(tmp_path / "cache")
    assert open_or_prepare(str(source)).root == first.root
    assert open_or_prepare(first.root).fingerprint == first.fingerprint
    write_images(source, {"owl": 2}, first_seed=8)
    changed = open_or_prepare(source)
    assert changed.classes == ("cat", "dog", "owl")
    assert changed.root != first.root
    assert prepare_cached(source, Options(val=0.5)).root not in (first.root, changed.root)
    with pytest.raises(TlearnError, match=r"data\.path: .*nowhere: no such folder"):
        open_or_prepare(tmp_path / "nowhere")


def test_a_signal_is_no_fault_of_the_picture_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_images(tmp_path / "source", {"a": 3, "b": 3})

    def stopped(data: bytes) -> Any:
        raise StoppedBySignalError("stopped by SIGTERM")

    monkeypatch.setattr("tlearn.data.decode.Image.open", lambda *_, **__: stopped(b""))
    with pytest.raises(StoppedBySignalError):
        prepare(source, tmp_path / "out")
    monkeypatch.undo()
    assert len(prepare(source, tmp_path / "out").splits["train"]) == 4


@pytest.mark.slow
def test_a_script_without_a_guard_prepares(tmp_path: Path) -> None:
    """Worker processes that import the script would begin it again, and wait for each other."""
    source = write_images(tmp_path / "source", {"a": 30, "b": 30})
    script = tmp_path / "script.py"
    script.write_text(
        f"import tlearn\nprint(len(tlearn.prepare({str(source)!r}, {str(tmp_path / 'out')!r}).classes))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2\n"
