"""Shards, tables, idx files and torchvision's data sets come to the same as a folder of the same images."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pictures import encode, noise, pixels, write_images
from PIL import Image
from test_cli import run as run_cli
from test_scan import audit, files_of, names
from torchvision import datasets

from tlearn.data import prepare as prepare_module
from tlearn.data import scan
from tlearn.data.folders import Folder
from tlearn.data.idx import Idx
from tlearn.data.listed import Listed
from tlearn.data.origins import open_origin
from tlearn.data.plan import Options
from tlearn.data.prepare import comes_split, open_or_prepare, prepare
from tlearn.data.shards import Index
from tlearn.data.tars import Tars
from tlearn.data.vision import Vision
from tlearn.errors import TlearnError


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes takes longer than reading small pictures."""
    for module in (scan, prepare_module):
        monkeypatch.setattr(module, "on_all_cores", map)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "folder", {"cat": 9, "dog": 9, "owl": 9})


def write_tar(path: Path, members: Mapping[str, bytes | str] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            content = data.encode() if isinstance(data, str) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def numbered(n: int, first: int = 0, classes: int = 3) -> dict[str, bytes | str]:
    """Samples that a number labels."""
    members: dict[str, bytes | str] = {}
    for i in range(first, first + n):
        members |= {f"{i:05d}.png": encode(noise(i), "PNG"), f"{i:05d}.cls": str(i % classes)}
    return members


def write_table(path: Path, rows: list[str], separator: str = ",") -> Path:
    path.write_text("".join(row.replace(",", separator) + "\n" for row in rows), encoding="utf-8")
    return path


def per_class(index: Index) -> dict[str, list[int]]:
    return {name: split.per_class(len(index.classes)).tolist() for name, split in index.splits.items()}


# -- all alike


def test_the_same_images_are_the_same_data_set_wherever_they_come_from(folder: Path, tmp_path: Path) -> None:
    options = Options(val=0.3, test=0.2, seed=3)
    expected = prepare(folder, tmp_path / "a", options)
    files = sorted(folder.rglob("*.png"))
    shards = [files[:10], files[10:]]
    for number, part in enumerate(shards):
        members = {
            f"{f.parent.name}{f.stem}.{e}": d
            for f in part
            for e, d in (("png", f.read_bytes()), ("txt", f.parent.name))
        }
        write_tar(tmp_path / "shards" / f"x-{number}.tar", members)
    write_table(tmp_path / "t.csv", ["label,path", *(f"{f.parent.name},{f.relative_to(tmp_path)}" for f in files)])
    for number, source in enumerate((f"{tmp_path}/shards/x-{{0..1}}.tar", tmp_path / "t.csv")):
        index = prepare(source, tmp_path / f"out{number}", options)
        assert index.fingerprint == expected.fingerprint
        assert {k: v for k, v in index.meta.items() if k in ("mean", "std", "image_size_px")} == {
            k: v for k, v in expected.meta.items() if k in ("mean", "std", "image_size_px")
        }
        for split in index.splits:
            assert sorted(files_of(index, split).values()) == sorted(files_of(expected, split).values())


@pytest.mark.parametrize("kind", ["tars", "table"])
def test_duplicates_leaks_and_broken_images_are_found_in_any_source(tmp_path: Path, kind: str) -> None:
    pictures = {f"{i}": encode(noise(i), "PNG") for i in range(12)}
    pictures |= {"copy": pictures["1"], "both": pictures["2"], "cut": pictures["3"][:90], "empty": b""}
    labels = {name: "cat" if i % 2 else "dog" for i, name in enumerate(pictures)} | {"copy": "cat", "both": "cat"}
    if kind == "tars":
        members = [(f"{n}.{e}", d) for n in pictures for e, d in (("png", pictures[n]), ("txt", labels[n].encode()))]
        source = write_tar(tmp_path / "x.tar", members)
    else:
        for name, data in pictures.items():
            (tmp_path / f"{name}.png").write_bytes(data)
        source = write_table(tmp_path / "t.csv", ["path,label", *(f"{n}.png,{labels[n]}" for n in pictures)])
    prepare(source, tmp_path / "out")
    report = audit(tmp_path / "out")
    assert report["counts"] == {"files": 16, "accepted": 11, "quarantined": 2, "duplicates": 1, "leaks": 1}
    assert [Path(f).stem for f in report["leaks"][0]["files"]] == ["2", "both"]
    assert {Path(q["file"]).stem: q["reason"].split(":")[0] for q in report["quarantined"]} == {
        "cut": "cannot be decoded",
        "empty": "empty file",
    }


def test_what_is_no_source_is_one_error_that_lists_the_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    write_tar(tmp_path / "shards" / "x-000000.tar", {})
    with pytest.raises(
        TlearnError, match=r"shards: is a folder of tar shards; name them as '.*/x-\{000000\.\.000127\}\.tar'"
    ):
        open_origin(tmp_path / "shards")
    for source, what in (("x.parquet", "cannot be prepared"), ("nothing", "no such folder or file")):
        assert run_cli(monkeypatch, "prepare", tmp_path / source, tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert f"{source}: {what}; give one of" in message
        assert all(kind in message for kind in ("sub-folder", "TABLE.csv", ".tar", "idx files", "torchvision:NAME"))
    assert names(tmp_path) == ["shards", "x.parquet"]


def test_options_without_an_effect_are_refused(folder: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", ["path,label"])
    for source in (folder, table):
        with pytest.raises(TlearnError, match="--classes: has no effect on"):
            open_origin(source, classes=["a", "b"])
        with pytest.raises(TlearnError, match="--val-from: has no effect on"):
            open_origin(source, val_from="x.tar")
    for wrong in (["a", "a"], ["a", ""], [""]):
        with pytest.raises(TlearnError, match=r"--classes .*: every name once"):
            open_origin("x.tar", classes=wrong)


def test_other_processes_read_from_an_origin_too(folder: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", numbered(6))
    write_table(tmp_path / "t.csv", ["path,label", "folder/cat/001.png,cat"])
    for origin in (Folder(folder), Tars(f"{tmp_path}/x.tar"), Listed(tmp_path / "t.csv")):
        listing = origin.listing()
        there = pickle.loads(pickle.dumps(origin))
        assert not origin.whole
        assert [there.read(f) for f in listing.found] == [origin.read(f) for f in listing.found]


# -- shards


def test_labels_stand_in_cls_json_or_txt_and_images_have_any_ending(tmp_path: Path) -> None:
    images = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "tiff": "TIFF"}
    members: dict[str, bytes | str] = {}
    for i, (ending, format) in enumerate({**images, "gif": "GIF"}.items()):
        members[f"part.1/{i}.{ending}"] = encode(noise(i), format)
        label = "owl" if i % 2 else "cat"
        members |= [
            {f"part.1/{i}.cls": f"{label}\n", f"part.1/{i}.txt": "a caption"},
            {f"part.1/{i}.json": json.dumps({"label": label, "width": 3})},
            {f"part.1/{i}.json": json.dumps({"width": 3}), f"part.1/{i}.txt": label},
        ][i % 3]
    source = write_tar(tmp_path / "x.tar", members)
    index = prepare(source, tmp_path / "out", Options(val=0))
    assert index.classes == ("cat", "owl")
    assert per_class(index) == {"train": [4, 4]}
    stored = {index.splits["train"].read(i) for i in range(8)}
    assert stored == {data for name, data in members.items() if isinstance(data, bytes)}


def test_numbered_classes_get_their_names_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        write_tar(tmp_path / "shards" / f"train-00000{number}.tar", numbered(6, first=6 * number))
    pattern = f"{tmp_path}/shards/train-{{000000..000003}}.tar"
    assert run_cli(monkeypatch, "prepare", pattern, tmp_path / "out", "--classes", "zebra, owl,ant,unseen") == 0
    assert "no image of 1 of 4 classes, left out: unseen" in capsys.readouterr().err
    index = open_or_prepare(tmp_path / "out")
    assert index.classes == ("zebra", "owl", "ant")
    assert [a + b for a, b in zip(*per_class(index).values(), strict=True)] == [8, 8, 8]
    for file, name in files_of(index, "train").items():
        assert index.classes[int(Path(file).stem) % 3] == name


def test_numbers_without_names_are_the_names_and_count_like_numbers(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "x.tar", numbered(36, classes=12))
    assert prepare(source, tmp_path / "out").classes == tuple(map(str, range(12)))


def test_val_from_holds_out_these_shards_and_the_leaks_between_them_are_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", numbered(20) | numbered(1, first=33))
    write_tar(tmp_path / "val-0.tar", numbered(9, first=30))
    index = prepare(f"{tmp_path}/train-0.tar", tmp_path / "out", val_from=f"{tmp_path}/val-{{0..0}}.tar")
    assert {name: len(split) for name, split in index.splits.items()} == {"train": 20, "val": 9}
    (leak,) = audit(tmp_path / "out")["leaks"]
    assert leak["kind"] == "one image in several splits (kept: val)"
    with pytest.raises(TlearnError, match=r"train-0\.tar is also among"):
        Tars(f"{tmp_path}/train-0.tar", val_from=f"{tmp_path}/train-0.tar")


def test_samples_that_cannot_be_used_are_quarantined_with_the_reason(tmp_path: Path) -> None:
    members = numbered(8) | {
        "no label.png": encode(noise(50), "PNG"),
        "no image.cls": "1",
        "no sense.png": encode(noise(51), "PNG"),
        "no sense.json": "{",
        "a list.png": encode(noise(52), "PNG"),
        "a list.json": "[1]",
        "latin.png": encode(noise(53), "PNG"),
        "latin.txt": b"caf\xe9",
        "__meta__/x.png": b"webdataset leaves this out",
    }
    prepare(write_tar(tmp_path / "x.tar", members), tmp_path / "out")
    reasons = {Path(q["file"]).name: q["reason"] for q in audit(tmp_path / "out")["quarantined"]}
    assert reasons.keys() == {"no label.png", "no image", "no sense.png", "a list.png", "latin.png"}
    assert reasons["no label.png"] == reasons["a list.png"] == "no label in its .cls, .json (label, class, cls) or .txt"
    assert reasons["no image"].startswith("no image beside it (.bmp")
    assert reasons["no sense.png"].startswith("its .json cannot be read")
    assert reasons["latin.png"].startswith("its .txt cannot be read")
    assert audit(tmp_path / "out")["counts"]["files"] == 13


def test_a_name_that_comes_again_is_another_sample(tmp_path: Path) -> None:
    samples = [list(numbered(4, first=i).items()) for i in (0, 4)]
    again = [(name.replace("00004", "00000"), data) for name, data in samples[1]]
    members = [(n, d.encode() if isinstance(d, str) else d) for n, d in [*samples[0], *again]]
    index = prepare(write_tar(tmp_path / "x.tar", members), tmp_path / "out", Options(val=0))
    assert len(index.splits["train"]) == 8
    assert len(set(files_of(index, "train"))) == 8


def test_listing_shards_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tar(tmp_path / "x.tar", numbered(20))
    sizes, real = [], Tars._bytes

    def counted(self: Tars, shard: int, span: tuple[int, int]) -> bytes:
        sizes.append(span[1])
        return real(self, shard, span)

    monkeypatch.setattr(Tars, "_bytes", counted)
    origin = Tars(str(source))
    found = origin.listing().found
    assert sizes == [1] * 20
    assert [origin.read(f) for f in found] == [encode(noise(i), "PNG") for i in range(20)]


def test_shards_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x-0.tar", numbered(9)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(whole))
    write_tar(tmp_path / "twice.tar", {"1.cls": "1", "1.CLS": "1"})
    write_tar(tmp_path / "empty.tar", {})
    for source, classes, message in (
        ("x-{0..1}.tar", (), r"x-1\.tar: no such shard \(of "),
        ("x-{0..1.tar", (), r"no such shard|not a pattern of shards"),
        ("cut.tar", (), r"cut\.tar: cannot be read"),
        ("packed.tar.gz", (), r"packed\.tar\.gz: cannot be read: .*have to be unpacked first"),
        ("twice.tar", (), r"twice\.tar: cannot be read: 1\.CLS: duplicate file name"),
        ("empty.tar", (), r"empty\.tar: no sample with an image and a label"),
        ("x-0.tar", ("a", "b"), r"x-0\.tar: label 2, but there are 2 names of classes, which count from 0"),
    ):
        with pytest.raises(TlearnError, match=message):
            open_origin(f"{tmp_path}/{source}", classes).listing()
    for url in ("http://host/x-{0..1}.tar", "pipe:cat x.tar"):
        with pytest.raises(TlearnError, match=r"copy them here, or .*data\.reader=stream"):
            open_origin(url)
    write_tar(tmp_path / "name.tar", {"1.png": b"", "1.cls": "owl"})
    with pytest.raises(TlearnError, match=r"name\.tar/1\.png: label 'owl' is none of --classes"):
        Tars(f"{tmp_path}/name.tar", ["cat", "dog"]).listing()


# -- tables


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_says_labels_and_splits(folder: Path, tmp_path: Path, ending: str) -> None:
    rows = ["\ufeffpath,split,id,label"]
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        path = file if i % 2 else file.relative_to(tmp_path)
        rows.append(f"{path},{('train', 'Validation', 'test')[i % 3]},{i},{file.parent.name}")
    table = write_table(tmp_path / f"t.{ending}", [*rows, ""], "," if ending == "csv" else "\t")
    index = prepare(table, tmp_path / "out", Options(val=0.5, test=0.5))
    assert index.classes == ("cat", "dog", "owl")
    assert per_class(index) == {"train": [3, 3, 3], "val": [3, 3, 3], "test": [3, 3, 3]}


def test_a_table_without_splits_for_some_rows_splits_those_by_content(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    rows = [f'"{f}",{f.parent.name},{"test" if i % 3 == 0 else ""}' for i, f in enumerate(files)]
    index = prepare(write_table(tmp_path / "t.csv", ["path,label,split", *rows]), tmp_path / "out", Options(val=0.3))
    assert per_class(index)["test"] == [3, 3, 3]
    assert min(per_class(index)["val"]) >= 1
    assert sum(map(len, index.splits.values())) == 27


def test_every_wrong_row_is_reported_with_its_line(folder: Path, tmp_path: Path) -> None:
    rows = [
        "path,label,split",
        "folder/cat/000.png,cat,train",
        "folder/cat/gone.png,cat,train",
        "folder/cat/001.png,,train",
        "folder/cat/002.png,cat,training",
        ",cat,train",
        "folder/cat/000.png,cat,train",
        "folder/cat/003.png",
        "folder/cat,cat,train",
        "folder/cat/004.png,cat,train,more",
        "folder/cat/gone2.png,cat,train",
    ]
    with pytest.raises(TlearnError) as caught:
        prepare(write_table(tmp_path / "t.csv", rows), tmp_path / "out")
    heading, *problems, rest = str(caught.value).splitlines()
    assert heading.endswith("t.csv: 9 rows cannot be used; mend or remove them:")
    assert [problem.strip() for problem in problems] == [
        "line 3: folder/cat/gone.png: no such file (paths are relative to the table, or absolute)",
        "line 4: no label for folder/cat/001.png",
        "line 5: split 'training': train, val or test",
        "line 6: no path",
        "line 7: folder/cat/000.png stands in line 2 too",
        "line 8: no label for folder/cat/003.png",
        "line 9: folder/cat: not a regular file",
        "line 10: more fields than the first line names",
    ]
    assert rest.strip() == "and 1 more"
    assert names(tmp_path) == ["folder", "t.csv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"line 1: no column label and path \(there are: none\)"),
        (b"file;label\n", r"line 1: no column label and path \(there are: file;label\)"),
        (b"path,class\n", r"line 1: no column label \(there are: path, class\)"),
        (b"path,label\n", "has no rows below its header"),
        (b"path,label\nx.png,caf\xe9\n", "not UTF-8 .*; save it as UTF-8"),
        (b'path,label\n"x.png,cat\n', r"t\.csv: after line 1: unexpected end of data"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(TlearnError, match=message):
        prepare(tmp_path / "t.csv", tmp_path / "out")


# -- idx files


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(root: Path, sizes: Mapping[str, int], classes: int = 3, *, packed: bool = True) -> Path:
    root.mkdir()
    for seed, (part, n) in enumerate(sizes.items()):
        images = np.random.default_rng(seed).integers(0, 256, (n, 7, 5), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % classes)):
            content = idx(array)
            path = root / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return root


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_give_train_val_and_test(tmp_path: Path, packed: bool) -> None:
    source = write_idx(tmp_path / "mnist", {"train": 60, "t10k": 9}, packed=packed)
    index = prepare(source, tmp_path / "out", Options(val=0.3), classes=["zero", "one", "a two"])
    assert index.classes == ("zero", "one", "a two")
    assert per_class(index)["test"] == [3, 3, 3]
    assert len(index.splits["train"]) + len(index.splits["val"]) == 60
    assert 6 <= len(index.splits["val"]) <= 32
    expected = np.random.default_rng(0).integers(0, 256, (60, 7, 5), dtype=np.uint8)
    train = index.splits["train"]
    stored = {
        pixels(train.read(i))[..., 0].astype(np.uint8).tobytes(): int(train.rows["label"][i]) for i in range(len(train))
    }
    assert stored.items() <= {image.tobytes(): i % 3 for i, image in enumerate(expected)}.items()
    plain = prepare(source, tmp_path / "plain", Options(val=0.3))
    assert plain.classes == ("0", "1", "2")
    assert len(plain.splits["val"]) == len(index.splits["val"])


def test_a_run_takes_a_folder_of_idx_files_as_it_takes_class_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    source = write_idx(tmp_path / "mnist", {"train": 30, "t10k": 6})
    assert set(open_or_prepare(source).splits) == {"train", "val", "test"}
    assert comes_split(source)


def _spoil(name: str, content: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        data = content((root / name).read_bytes())
        (root / name).unlink()
        if data is not None:
            (root / name).write_bytes(data)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "classes", "message"),
    [
        (_spoil("train-labels-idx1-ubyte", lambda d: None), (), "no train-labels-idx1-ubyte beside train-images"),
        (
            _spoil("train-images-idx3-ubyte", lambda d: d[:-1]),
            (),
            r"1,065 bytes instead of the 1,066 that it announces",
        ),
        (_spoil("t10k-images-idx3-ubyte", lambda d: b"\0\0\x0d" + d[3:]), (), "not an idx file of unsigned bytes in 3"),
        (_spoil("t10k-images-idx3-ubyte", lambda d: b""), (), "t10k-images-idx3-ubyte: cannot be read"),
        (
            _spoil("t10k-labels-idx1-ubyte", lambda d: idx(np.zeros(8, np.uint8))),
            (),
            r"t10k-labels-idx1-ubyte: 8 labels for the 9 images of t10k-images-idx3-ubyte",
        ),
        (lambda root: None, ("a", "b"), "label 2, but there are 2 names of classes"),
    ],
)
def test_idx_files_that_do_not_fit_are_named(
    tmp_path: Path, spoil: Callable[[Path], None], classes: tuple[str, ...], message: str
) -> None:
    source = write_idx(tmp_path / "mnist", {"train": 30, "t10k": 9}, packed=False)
    spoil(source)
    with pytest.raises(TlearnError, match=message):
        Idx(source, classes).listing()


def test_a_packed_idx_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    source = write_idx(tmp_path / "mnist", {"train": 30})
    path = source / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(TlearnError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
        Idx(source).listing()


# -- torchvision


class _Pictures:
    """What its classes have in common."""

    def __init__(self, first: int, n: int) -> None:
        self.first, self.n = first, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        if i >= self.n:
            raise IndexError
        return noise(self.first + i), (self.first + i) % 3


class _WithTrain(_Pictures):
    classes = ("cat", "dog", "owl")

    def __init__(self, root: str, train: bool = True, transform: Any = None, download: bool = False) -> None:
        assert download
        print("Files already downloaded and verified")
        super().__init__(0 if train else 100, 30 if train else 9)
        self.targets = [(self.first + i) % 3 for i in range(self.n)]


class _WithSplit(_Pictures):
    def __init__(self, root: str, split: str = "train", loader: Any = None) -> None:
        if split not in ("trainval", "valid"):
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are ...")
        super().__init__(0 if split == "trainval" else 200, 15)
        self.root, self.loader = Path(root), loader

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(i)
        (self.root / f"{self.first + i}.webp").write_bytes(encode(image, "WEBP"))
        return self.loader(self.root / f"{self.first + i}.webp"), label


class _Boxes(_Pictures):
    def __init__(self) -> None:
        super().__init__(0, 3)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return super().__getitem__(i)[0], {"boxes": []}


class _Small(datasets.FakeData):
    def __init__(self) -> None:
        super().__init__(size=24, image_size=(3, 9, 8), num_classes=2)


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[type], str]:
    """Puts a class in place of torchvision.datasets.FakeData; returns the name of the source."""
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))

    def put(kind: type) -> str:
        monkeypatch.setattr(datasets, "FakeData", kind)
        return "torchvision:FakeData"

    return put


def test_a_class_with_train_gives_train_val_and_test(
    vision: Callable[[type], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = prepare(vision(_WithTrain), tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert index.classes == ("cat", "dog", "owl")
    assert len(index.splits["train"]) + len(index.splits["val"]) == 30
    assert per_class(index)["test"] == [3, 3, 3]
    assert audit(tmp_path / "out")["accepted"]["test"] == [f"FakeData/test/{i:06d}" for i in range(9)]
    test = index.splits["test"]
    assert {pixels(test.read(i)).tobytes() for i in range(9)} == {
        np.asarray(noise(100 + i)).astype(np.int64).tobytes() for i in range(9)
    }


def test_a_class_with_splits_and_a_loader_gives_its_own_files(vision: Callable[[type], str], tmp_path: Path) -> None:
    index = prepare(vision(_WithSplit), tmp_path / "out", classes=["a", "b", "c"])
    assert index.classes == ("a", "b", "c")
    assert {name: len(split) for name, split in index.splits.items()} == {"train": 15, "val": 15}
    stored = {index.splits["val"].read(i) for i in range(15)}
    assert stored == {encode(noise(200 + i), "WEBP") for i in range(15)}


def test_a_class_without_either_is_split_by_content(vision: Callable[[type], str], tmp_path: Path) -> None:
    index = prepare(vision(_Small), tmp_path / "out", Options(val=0.3, test=0.2))
    assert index.classes == ("0", "1")
    assert set(index.splits) == {"train", "val", "test"}
    assert sum(map(len, index.splits.values())) == 24


def test_what_is_no_set_of_labelled_pictures_is_refused(vision: Callable[[type], str]) -> None:
    with pytest.raises(TlearnError, match="its samples are not pictures with one class each"):
        Vision(vision(_Boxes)).listing()
    with pytest.raises(
        TlearnError, match=r"torchvision:CIFAR11: torchvision has no such data set; did you mean .*CIFAR10"
    ):
        open_origin("torchvision:CIFAR11")
    with pytest.raises(TlearnError, match="EMNIST: none of its splits is called train or trainval"):
        Vision("torchvision:EMNIST").listing()


def test_without_a_network_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))

    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for name, call in (
        ("CIFAR10", "CIFAR10('FOLDER', train=True"),
        ("Flowers102", "Flowers102('FOLDER', split='train'"),
    ):
        assert run_cli(monkeypatch, "prepare", f"torchvision:{name}", tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert f"torchvision:{name}: cannot be had: " in message
        assert "Temporary failure in name resolution" in message
        assert f"{call}, download=True)" in message
        assert f"copy what it leaves in FOLDER to {tmp_path / 'cache' / 'torchvision' / name}" in message
    assert names(tmp_path) == ["cache"]


def test_pictures_of_several_frames_keep_their_bytes(tmp_path: Path) -> None:
    frames = [noise(i).quantize(16) for i in range(3)]
    moving = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    members = numbered(6) | {"moving.gif": moving, "moving.cls": "1"}
    index = prepare(write_tar(tmp_path / "x.tar", members), tmp_path / "out", Options(val=0))
    assert [Path(f).name for f in audit(tmp_path / "out")["several_frames"]] == ["moving.gif"]
    assert moving in {index.splits["train"].read(i) for i in range(7)}
    assert (pixels(moving) == np.asarray(Image.Image.convert(frames[0], "RGB"))).all()
