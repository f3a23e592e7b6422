"""Labelled images, wherever they come from -> a verified, deduplicated, split set of shards. Imports no torch.

Two passes. The first decodes every file once, on all cores, and journals what it found, so that a killed run
goes on where it was. The second writes the shards. Everything is made in OUT.partial and renamed to OUT.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tlearn.console import progress_bar, show
from tlearn.data.decode import load_rgb, open_image
from tlearn.data.origins import open_origin
from tlearn.data.plan import Accepted, Options, Plan
from tlearn.data.scan import Origin, examine_all
from tlearn.data.shards import INDEX, SPLITS, Index, Sample, read_index, write_index, write_split
from tlearn.data.workers import on_all_cores
from tlearn.errors import TlearnError
from tlearn.files import cache_folder, write_json

_JOURNAL = "scan.jsonl"  # inside OUT.partial: what the scan found so far


def prepare(
    source: str | Path,
    out: str | Path,
    options: Options | None = None,
    *,
    classes: Sequence[str] = (),
    val_from: str | None = None,
) -> Index:
    """Turn labelled images into shards.

    Args:
        source: a folder with one sub-folder of images per class (perhaps below train, val and test), a CSV or TSV with
            the columns path, label and split, `x-{000000..000127}.tar`, a folder of idx files, or `torchvision:NAME`.
        out: new folder for shards, index.json and audit.json. If it already holds exactly this, nothing is done.
        options: shares of the splits, seed, largest side, shard size.
        classes: names of classes that the source numbers (shards, idx files, torchvision), in the order of the numbers.
        val_from: shards of the validation images, where the source is shards.

    Raises:
        TlearnError: nothing usable, one class only, a class without readable images, OUT in use for something else.
    """
    out, options = Path(out), options or Options()
    origin = open_origin(source, classes, val_from)
    if out.is_symlink():
        out = out.resolve()
    folder = Path(source).expanduser()
    if folder.is_dir() and folder.resolve() in out.resolve().parents:
        raise TlearnError(f"{out}: lies inside {source}; choose an OUT outside of the pictures")
    listing = origin.listing()
    about = {
        "source_fingerprint": listing.fingerprint(),
        "options": asdict(options),
    }
    with _locked_partial(out) as partial_dir:
        try:
            if done := _already_there(out, about):
                shutil.rmtree(partial_dir)
                return done
            examined = examine_all(origin, listing.found, partial_dir / _JOURNAL)
            plan = Plan(listing, examined, options)
            plan.check(origin.name, options)
            _write(origin, partial_dir, plan, options, about)
        except TlearnError:
            shutil.rmtree(partial_dir)
            raise
        partial_dir.rename(out)
        (out / _JOURNAL).unlink()
        plan.summarise(out)
    return read_index(out)


def open_or_prepare(path: str | Path) -> Index:
    """Prepared data as it is; a folder of images is prepared into the cache first, once per content.

    The cache is `$TLEARN_CACHE/prepared` (default: ~/.cache/tlearn/prepared).
    """
    path = Path(path).expanduser()
    if (path / INDEX).is_file():
        return read_index(path)
    return prepare_cached(path, Options())


def prepare_cached(source: Path, options: Options) -> Index:
    """`prepare` into the cache, under a name that changes with the folder's files and the options."""
    if not source.is_dir():
        raise TlearnError(
            f"data.path: {source}: no such folder; give a folder of class folders, or what `tlearn prepare` made"
        )
    fingerprint = open_origin(source).listing().fingerprint()
    digest = hashlib.sha256(json.dumps([str(source.resolve()), fingerprint, asdict(options)]).encode()).hexdigest()
    cache = cache_folder()
    return prepare(source, cache / "prepared" / f"{source.resolve().name}-{digest[:12]}", options)


def comes_split(source: Path) -> bool:
    """Whether a folder says which of its images are held out."""
    return any(f.split for f in open_origin(source).listing().found)


@contextmanager
def _locked_partial(out: Path) -> Iterator[Path]:
    """OUT.partial, held by one process at a time; the kernel frees the lock when its holder dies."""
    path = out.parent / f"{out.name}.partial"
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TlearnError(f"{path}: cannot be made: {error.strerror}") from None
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # renamed by another process just now
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            break
        # another process finished while this one waited: the folder is now OUT, or gone
        os.close(descriptor)
    try:
        if any(path.iterdir()) and not (path / _JOURNAL).is_file():
            raise TlearnError(f"{path}: is in the way: tlearn works in a folder of this name; choose another OUT")
        yield path
    finally:
        os.close(descriptor)


def _already_there(out: Path, about: dict[str, Any]) -> Index | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if out.is_dir():
            out.rmdir()
        return None
    if not (out / INDEX).is_file():
        raise TlearnError(f"{out}: exists and is not prepared data; choose another OUT or remove it")
    index = read_index(out)
    if any(index.meta.get(key) != value for key, value in about.items()):
        raise TlearnError(
            f"{out}: was prepared from other files or with other options "
            f"({index.meta.get('options')}); choose another OUT or remove it"
        )
    show(f"{out}: already prepared from these files with these options")
    return index


def _write(origin: Origin, root: Path, plan: Plan, options: Options, about: dict[str, Any]) -> None:
    classes = {name: i for i, name in enumerate(plan.classes)}
    splits = {}
    with progress_bar("writing shards", total=len(plan.accepted)) as advance:
        for split in SPLITS:
            for old in (*root.glob(f"{split}-*.tar"), *root.glob(f"{split}.samples.npy")):
                old.unlink()  # of a run that was killed while writing
            members = [a for a in plan.accepted if a.split == split]
            if not members:
                continue

            def samples(members: list[Accepted] = members) -> Iterator[Sample]:
                read = partial(_content, origin, options.max_side)
                # reading alone gains nothing from more processes, scaling down does
                alone = origin.whole or options.max_side is None
                contents = map(read, members) if alone else on_all_cores(read, members)
                for a, (ending, data) in zip(members, contents, strict=True):
                    advance()
                    yield Sample(a.key, ending, data, classes[a.class_name], a.class_name, a.file)

            splits[split] = write_split(root, split, samples(), options.shard_mib * 2**20)
    write_json(root / "audit.json", plan.audit())
    write_index(root, plan.classes, splits, {**_statistics(plan), **about, "leaks": len(plan.leaks)})


def _content(origin: Origin, max_side: int | None, a: Accepted) -> tuple[str, bytes]:
    """The bytes that go into the shard: the file's own, unless it is larger than `max_side` px."""
    data = origin.read(a.found)
    if hashlib.sha256(data).hexdigest() != a.image.sha256:
        raise TlearnError(f"{origin.name}: {a.file}: changed while it was being prepared; start again")
    side = max(a.image.width, a.image.height)
    if max_side is None or side <= max_side:
        return a.image.ending, data
    scale = max_side / side
    size = (max(1, round(a.image.width * scale)), max(1, round(a.image.height * scale)))
    small = load_rgb(open_image(data), cover=size).resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # a lossy original stays JPEG; drawings stay lossless
    if a.image.ending == "jpg":
        small.save(buffer, "JPEG", quality=95, subsampling=0)
        return "jpg", buffer.getvalue()
    small.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _statistics(plan: Plan) -> dict[str, Any]:
    """Channel mean and std (of RGB in 0..1) and image sizes (px) of the training images."""
    images = [a.image for a in plan.accepted if a.split == "train"] or [a.image for a in plan.accepted]
    pixels = np.array([i.width * i.height for i in images], dtype=np.float64)
    # every image counts the same, however large it is
    moments = (np.array([i.sums for i in images]) / pixels[:, None]).mean(axis=0)
    sides = {"width": [i.width for i in images], "height": [i.height for i in images]}
    return {
        "mean": moments[:3].round(6).tolist(),
        "std": np.sqrt(np.maximum(0, moments[3:] - moments[:3] ** 2)).round(6).tolist(),
        "image_size_px": {
            name: {"min": min(values), "median": float(np.median(values)), "max": max(values)}
            for name, values in sides.items()
        },
    }
