"""Shards without an index: equal steps on every rank, exact evaluation, clear errors, nothing unpickled."""

from __future__ import annotations

import http.server
import json
import pickle
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import ranks
import webdataset as wds
from conftest import TINY
from pictures import encode, noise
from test_cli import run as run_cli

from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.data.stream import open_shards
from tlearn.errors import TlearnError
from tlearn.launch import run_ranks

SIZES = (7, 1, 12, 3, 9)
"""Samples of five uneven shards."""
N = sum(SIZES)

MakeStream = Callable[..., Config]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train-000000.tar ... train-000004.tar, and the same as val: 32 noise pictures of three classes."""
    root = tmp_path_factory.mktemp("stream")
    for split in ("train", "val"):
        seed = 0
        for number, size in enumerate(SIZES):
            with wds.TarWriter(str(root / f"{split}-{number:06d}.tar")) as writer:
                for _ in range(size):
                    picture = encode(noise(seed, 20, 16), "PNG" if seed % 2 else "JPEG")
                    ending = "png" if seed % 2 else "jpg"
                    writer.write({"__key__": f"{seed:04d}", ending: picture, "cls": str(seed % 3)})
                    seed += 1
    return root


@pytest.fixture
def stream(folder: Path) -> MakeStream:
    """Makes configs that read the shards as a stream."""

    def make(*overrides: str, root: str | None = None, val_samples: int = N) -> Config:
        at = root or str(folder)
        options = (
            f"data.path='{at}/train-{{000000..000004}}.tar'",
            "data.reader=stream",
            f"data.stream={{val: '{at}/val-{{000000..000004}}.tar', classes: [a, b, c], train_samples: {N}, "
            f"val_samples: {val_samples}}}",
            "batch.size=8",
        )
        return load_config(None, [*TINY, *options, *overrides])

    return make


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [key for step in steps for micro in step for key in micro]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_rank_takes_equal_steps_from_uneven_shards(stream: MakeStream, workers: int, world_size: int) -> None:
    start = time.monotonic()
    taken = run_ranks(ranks.stream_steps, (stream(f"data.workers={workers}"), 1), world_size)
    assert time.monotonic() - start < 60  # nobody hangs
    assert [len(steps) for steps in taken] == [8] * world_size  # 2 epochs of 4
    for step in range(8):
        assert sum(len(micro) for steps in taken for micro in steps[step]) == 8
    # within an epoch no two ranks have a shard, and so a sample, in common
    for epoch in (slice(0, 4), slice(4, 8)):
        seen = [set(flat(steps[epoch])) for steps in taken]
        assert sum(map(len, seen)) == len(set().union(*seen))
    if world_size == 1 and workers == 0:
        assert sorted(flat(taken[0][:4])) == sorted(flat(taken[0][4:]))
        assert len(set(flat(taken[0][:4]))) == N  # one worker of one rank meets each once
        assert flat(taken[0][:4]) != flat(taken[0][4:])


def test_accumulation_cuts_the_same_steps(stream: MakeStream) -> None:
    (whole,) = run_ranks(ranks.stream_steps, (stream("data.workers=0"), 1), 1)
    (parts,) = run_ranks(ranks.stream_steps, (stream("data.workers=0"), 3), 1)
    assert [len(step) for step in parts] == [3] * 8
    assert [sorted(flat([step])) for step in parts] == [sorted(flat([step])) for step in whole]


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_counts_every_image_once(stream: MakeStream, world_size: int) -> None:
    config = stream("data.workers=3")
    for report in run_ranks(ranks.evaluated, (config,), world_size):  # seven ranks: two of them without a shard
        assert report["n"] == N
        assert [entry["n"] for entry in report["per_class"].values()] == [11, 11, 10]


def test_a_count_that_is_not_the_configs_fails_the_run(stream: MakeStream) -> None:
    with pytest.raises(TlearnError, match=r"32 images were evaluated instead of the 33 .*data\.stream\.val_samples"):
        ranks.evaluated(stream(val_samples=N + 1))


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The folder over http."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_http_and_pipes_are_read_like_files(stream: MakeStream, folder: Path, server: str, kind: str) -> None:
    root = server if kind == "http" else f"pipe:cat {folder}"
    here, there = (ranks.evaluated(stream(root=r)) for r in (None, root))
    assert here == there


@pytest.mark.slow
def test_two_processes_train_from_a_stream(
    stream: MakeStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tlearn.configfile import dump_config

    (tmp_path / "stream.yaml").write_text(dump_config(stream("epochs=3", "data.workers=1")))
    arguments = ("train", tmp_path / "stream.yaml", "--nproc", "2", "--run", tmp_path / "run")
    assert run_cli(monkeypatch, *arguments) == 0
    assert "gives up: equal batches at any number of processes" in (tmp_path / "run" / "log.txt").read_text()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["val"]["n"] == N
    assert result["steps"] == 12
    capfd.readouterr()
    assert run_cli(monkeypatch, "evaluate", tmp_path / "run", "--json") == 0
    assert json.loads(capfd.readouterr().out)["val"]["confusion"] == result["val"]["confusion"]


def test_fewer_shards_than_processes_are_refused(stream: MakeStream) -> None:
    with pytest.raises(TlearnError, match="5 shards for 6 processes"):
        run_ranks(ranks.stream_steps, (stream(), 1), 6)


def test_a_missing_shard_is_named(folder: Path) -> None:
    with pytest.raises(TlearnError, match=r"train-000005\.tar: no such shard"):
        open_shards(f"{folder}/train-{{000004..000005}}.tar", 3)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:head -c 3000 {shard}", "cannot be read"),
        ("pipe:cat {shard}; exit 3", "cannot be read: .*exit 3"),
        ("{server}/nothing.tar", "nothing.tar: cannot be read"),
    ],
)
def test_a_shard_that_ends_early_or_fails_is_named(folder: Path, server: str, url: str, message: str) -> None:
    shards = open_shards(url.format(shard=folder / "train-000002.tar", server=server), 3)
    with pytest.raises(TlearnError, match=message):
        list(shards.read([0]))


def write_sample(path: Path, **members: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for ending, data in members.items():
            entry = tarfile.TarInfo(f"0001.{ending}")
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))
    return path


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": b"x"}, "0001: needs an image .* and the number of its class in .cls"),
        ({"cls": b"1"}, "0001: needs an image"),
        ({"jpg": b"x", "cls": b"3"}, "0001: class 3, but data.stream.classes names 3"),
        ({"jpg": b"x", "cls": b"-1"}, "0001: needs an image"),
        ({"cls": b"1", "CLS": b"1"}, r"x\.tar: cannot be read: 0001.CLS: duplicate file name"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    shards = open_shards(str(write_sample(tmp_path / "x.tar", **members)), 3)
    with pytest.raises(TlearnError, match=message):
        list(shards.read([0]))


def test_nothing_in_a_shard_is_unpickled(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    shard = write_sample(tmp_path / "x.tar", jpg=encode(noise(0), "JPEG"), cls=b"2", pkl=trap, pyd=trap, pth=trap)
    (sample,) = open_shards(str(shard), 3).read([0])
    assert sample.label == 2
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.stream=null"], "data.reader: stream needs data.stream"),
        (["data.reader=indexed"], "data.stream has no effect"),
        (["data.max_val=3"], "need an index"),
        (["objective.class_weight=inverse"], "needs counts from an index"),
    ],
)
def test_contradictory_options_are_refused(stream: MakeStream, overrides: list[str], message: str) -> None:
    with pytest.raises(TlearnError, match=message):
        stream(*overrides)


def test_quick_shortens_the_epoch(stream: MakeStream, tmp_path: Path) -> None:
    from tlearn.configfile import dump_config

    (tmp_path / "x.yaml").write_text(dump_config(stream()))
    quick = load_config(tmp_path / "x.yaml", ["quick.samples=10"], quick=True)
    assert quick.data.stream is not None
    assert quick.data.stream.train_samples == 10
    assert quick.data.stream.val_samples == N  # every one is counted
