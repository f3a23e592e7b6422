"""Shards on disk: read back exactly, also by plain webdataset, and refused when they are not what was written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encode, noise, photo, pixels, read_with_webdataset

from tlearn.data.shards import SAMPLE, Sample, Shard, Split, read_index, write_index, write_split
from tlearn.errors import TlearnError

CLASSES = ("cat", "dog", "owl")
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP"}


def make_samples(n: int, first: int = 0, classes: Sequence[str] = CLASSES) -> list[Sample]:
    """In four formats, their classes in turn."""
    samples = []
    for i in range(first, first + n):
        ending = tuple(FORMATS)[i % 4]
        data = encode(noise(i), FORMATS[ending])
        label = i % len(classes)
        file = f"{classes[label]}/{i}.{ending}"
        key = hashlib.sha256(data).hexdigest()[:16]
        samples.append(Sample(key, ending, data, label, classes[label], file))
    return samples


def write(root: Path, samples: dict[str, list[Sample]], shard_bytes: int = 2**20) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    splits = {name: write_split(root, name, members, shard_bytes) for name, members in samples.items()}
    write_index(root, CLASSES, splits, {"leaks": 0})
    return root


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """30 samples to train in several shards, 6 for val in one."""
    return write(tmp_path / "data", {"train": make_samples(30), "val": make_samples(6, first=30)}, 4000)


def test_what_was_written_is_read_back(data: Path) -> None:
    index = read_index(data)
    assert index.classes == CLASSES
    assert set(index.splits) == {"train", "val"}
    for name, expected in {"train": make_samples(30), "val": make_samples(6, first=30)}.items():
        split = index.splits[name]
        assert len(split) == len(expected)
        assert [split.read(i) for i in range(len(split))] == [s.data for s in expected]
        assert split.rows["label"].tolist() == [s.label for s in expected]
        assert [f"{key:016x}" for key in split.rows["key"].tolist()] == [s.key for s in expected]


def test_the_index_counts_what_is_there(data: Path) -> None:
    index = read_index(data)
    train = index.splits["train"]
    assert len(train.shards) > 2
    assert train.shard_sizes().tolist() == [shard.samples for shard in train.shards]
    assert sum(shard.samples for shard in train.shards) == 30
    assert train.per_class(3).tolist() == [10, 10, 10] == index.meta["splits"]["train"]["per_class"]
    for shard in train.shards:
        content = (data / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_shard_is_closed_once_its_pictures_are_as_large_as_asked(data: Path) -> None:
    train = read_index(data).splits["train"]
    payload = np.bincount(train.rows["shard"], weights=train.rows["size"])
    assert (payload[:-1] > 3500).all(), "4000 asked, of which labels and file names take a little"
    assert (payload < 4800).all()


@pytest.mark.parametrize("name", ["plain", "10%d:80 [x]{0..3}", "ü"])
def test_the_name_of_the_folder_does_not_matter(tmp_path: Path, name: str) -> None:
    index = read_index(write(tmp_path / name, {"train": make_samples(6)}))
    assert [index.splits["train"].read(i) for i in range(6)] == [s.data for s in make_samples(6)]


def test_plain_webdataset_reads_the_shards(data: Path) -> None:
    urls = [str(data / shard.name) for shard in read_index(data).splits["train"].shards]
    seen = read_with_webdataset(urls)
    assert len(seen) == 30
    for got, sample in zip(seen, make_samples(30), strict=True):
        assert got["__key__"] == sample.key
        assert got[sample.ending] == sample.data
        assert int(got["cls"]) == sample.label
        assert json.loads(got["json"]) == {"class": sample.class_name, "file": sample.file}


def test_webdataset_decodes_pictures_and_labels_without_help(tmp_path: Path) -> None:
    samples = [s for s in make_samples(16) if s.ending != "bmp"]  # which it does not decode
    root = write(tmp_path / "data", {"train": samples})
    for got, sample in zip(read_with_webdataset([str(root / "train-000000.tar")], "pil"), samples, strict=True):
        assert got["cls"] == sample.label
        assert got["json"]["class"] == sample.class_name
        assert (np.asarray(got[sample.ending]) == pixels(sample.data)).all()


def test_samples_are_read_in_any_order_from_more_shards_than_stay_open(tmp_path: Path) -> None:
    samples = make_samples(150)
    split = read_index(write(tmp_path / "data", {"train": samples}, shard_bytes=1)).splits["train"]
    assert len(split.shards) == 150
    before = open_files()
    for i in np.random.default_rng(0).permutation(np.repeat(np.arange(150), 3)).tolist():
        assert split.read(i) == samples[i].data
    assert open_files() - before <= 64


def test_files_are_closed_with_the_split(data: Path) -> None:
    before = open_files()
    split = read_index(data).splits["train"]
    assert [len(split.read(i)) for i in range(30)]
    assert open_files() > before
    del split
    assert open_files() == before


def test_a_split_that_went_to_another_process_reads_the_same(data: Path) -> None:
    split = read_index(data).splits["train"]
    expected = [split.read(i) for i in range(30)]
    copy: Split = pickle.loads(pickle.dumps(split))
    assert [copy.read(i) for i in range(30)] == expected
    del copy
    assert [split.read(i) for i in range(30)] == expected
    child = os.fork()  # shares the open files; closing its copies must not close ours
    if child == 0:
        os._exit(0 if [split.read(i) for i in range(30)] == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [split.read(i) for i in range(30)] == expected


def test_a_shard_cut_short_while_in_use_is_named(data: Path) -> None:
    split = read_index(data).splits["val"]
    os.truncate(data / "val-000000.tar", 3000)
    with pytest.raises(TlearnError, match=r"val-000000\.tar: ends before sample [0-9a-f]{16}; prepare"):
        split.read(5)


def _cut(root: Path) -> None:
    os.truncate(root / "train-000001.tar", 512)


def _grow(root: Path) -> None:
    with (root / "train-000001.tar").open("ab") as file:
        file.write(b"\0" * 512)


def _remove(root: Path) -> None:
    (root / "train-000001.tar").unlink()


def _remove_table(root: Path) -> None:
    (root / "train.samples.npy").unlink()


def _cut_table(root: Path) -> None:
    os.truncate(root / "train.samples.npy", 200)


def _remove_index(root: Path) -> None:
    (root / "index.json").unlink()


def _garble_index(root: Path) -> None:
    (root / "index.json").write_text((root / "index.json").read_text()[:-20])


def _other_version(root: Path) -> None:
    meta = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps({**meta, "version": 99}))


def _other_format(root: Path) -> None:
    (root / "index.json").write_text(json.dumps({"files": []}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"train-000001\.tar: 512 bytes, the index says [\d,]+; prepare the data again"),
        (_grow, r"train-000001\.tar: [\d,]+ bytes, the index says [\d,]+; prepare the data again"),
        (_remove, r"train-000001\.tar: missing; prepare the data again"),
        (_remove_table, r"train\.samples\.npy: missing; prepare the data again"),
        (_cut_table, r"train\.samples\.npy: 200 bytes, the index says"),
        (_remove_index, r"index\.json: not found; `tlearn prepare SRC .*` makes it"),
        (_garble_index, r"index\.json: not valid JSON .*; prepare the data again"),
        (_other_version, r"index\.json: .*version 99, this tlearn reads 'tlearn-shards' version 1"),
        (_other_format, r"index\.json: format None version None, this tlearn reads"),
    ],
)
def test_data_that_is_not_what_was_written_is_refused(data: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(data)
    with pytest.raises(TlearnError, match=message):
        read_index(data)


def test_an_index_that_is_another_kind_of_json_is_refused(data: Path) -> None:
    (data / "index.json").write_text("[]")
    with pytest.raises(TlearnError, match=r"index\.json"):
        read_index(data)


def fingerprint(root: Path, samples: dict[str, list[Sample]], shard_bytes: int = 2**20) -> str:
    return read_index(write(root, samples, shard_bytes)).fingerprint


def test_the_fingerprint_is_that_of_classes_splits_labels_and_content(tmp_path: Path) -> None:
    samples = make_samples(12)
    same = fingerprint(tmp_path / "a", {"train": samples})
    relabelled = [samples[0]._replace(label=2, class_name="owl"), *samples[1:]]
    others = {
        "label": fingerprint(tmp_path / "b", {"train": relabelled}),
        "swap": fingerprint(
            tmp_path / "c",
            {"train": [samples[0]._replace(label=1), samples[1]._replace(label=0), *samples[2:]]},
        ),
        "content": fingerprint(tmp_path / "d", {"train": [*samples[:-1], *make_samples(1, first=50)]}),
        "fewer": fingerprint(tmp_path / "e", {"train": samples[:-1]}),
        "split": fingerprint(tmp_path / "f", {"train": samples[:-3], "val": samples[-3:]}),
    }
    assert len({same, *others.values()}) == 6
    # and not that of how they are stored
    assert fingerprint(tmp_path / "g", {"train": samples[::-1]}, shard_bytes=1) == same


def test_the_fingerprint_changes_with_the_pixels_that_are_stored(tmp_path: Path) -> None:
    """`--max-side` keeps the key of the source file and stores another picture."""
    sample = make_samples(1)[0]
    smaller = sample._replace(data=encode(noise(0).resize((6, 6)), "PNG"))
    rest = make_samples(5, first=1)
    assert fingerprint(tmp_path / "a", {"train": [sample, *rest]}) != fingerprint(
        tmp_path / "b", {"train": [smaller, *rest]}
    )


def test_large_pictures_lie_where_the_table_says(tmp_path: Path) -> None:
    data = encode(photo(), "JPEG")
    samples = [Sample("00000000000000ff", "jpg", data, 0, "cat", "x/" * 90 + "long name.jpg"), *make_samples(3)]
    split = read_index(write(tmp_path / "data", {"train": samples})).splits["train"]
    assert [split.read(i) for i in range(4)] == [s.data for s in samples]


def split_of(labels: Sequence[int], shards: int = 3) -> Split:
    rows = np.zeros(len(labels), dtype=SAMPLE)
    rows["key"] = np.random.default_rng(len(labels)).integers(0, 2**63, len(labels))
    rows["label"] = labels
    rows["shard"] = np.sort(np.arange(len(labels)) % shards)
    return Split("train", Path(), tuple(Shard(f"{i}", 0, 0, "") for i in range(shards)), rows)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 90), st.integers(0, 5))
def test_a_balanced_part_is_as_even_as_its_limit_and_classes_allow(labels: list[int], limit: int, seed: int) -> None:
    whole = split_of(labels)
    part = whole.balanced(limit, seed)
    assert len(part) == min(limit, len(labels))
    have, got = Counter(labels), Counter(part.rows["label"].tolist())
    fullest = max(got.values(), default=0)
    for label, n in have.items():
        assert got[label] >= min(n, fullest - 1), "a class is smaller only if it has no more"
    places = [int(np.flatnonzero(whole.rows["key"] == key)[0]) for key in part.rows["key"]]
    assert places == sorted(set(places)), "no sample twice, and in the order of the shards"
    assert (part.rows == whole.rows[places]).all()
    assert part.shard_sizes().sum() == len(part)
    assert len(part.shard_sizes()) == 3


def test_a_balanced_part_depends_on_the_seed_alone() -> None:
    whole = split_of([0, 1] * 50)
    parts = [whole.balanced(20, seed).rows["key"].tolist() for seed in (0, 0, 1, 2)]
    assert parts[0] == parts[1]
    assert len({tuple(part) for part in parts}) == 3
    assert whole.balanced(100, 0) is whole


def test_a_smaller_balanced_part_lies_within_a_larger_one() -> None:
    whole = split_of([0] * 70 + [1] * 20 + [2] * 10)
    keys = [set(whole.balanced(limit, 3).rows["key"].tolist()) for limit in (5, 20, 60)]
    assert keys[0] < keys[1] < keys[2]


def test_which_samples_are_chosen_does_not_depend_on_the_others_in_other_classes() -> None:
    whole = split_of([0] * 40 + [1] * 40)
    chosen = set(whole.balanced(20, 0).rows["key"][:10].tolist())
    shuffled = Split("train", Path(), whole.shards, whole.rows[np.random.default_rng(1).permutation(80)])
    again = shuffled.balanced(20, 0).rows
    assert set(again["key"][again["label"] == 0].tolist()) == chosen
