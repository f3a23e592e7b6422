"""A folder of labelled images -> a verified, deduplicated, split set of shards. Imports no torch.

Two passes. The first decodes every file once, on all cores, and journals what it found, so that a killed run
goes on where it was. The second writes the shards. Everything is made in OUT.partial and renamed to OUT.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from tlearn.console import progress_bar, show
from tlearn.data.decode import FORMATS, UnreadableImageError, load_rgb, open_image
from tlearn.data.shards import INDEX, SPLITS, Index, Sample, read_index, write_index, write_split
from tlearn.errors import TlearnError

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_IGNORED = ("__MACOSX", "Thumbs.db", "desktop.ini")
_CHUNK = 16  # files per message to a worker

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Options:
    """What shapes the output; kept in index.json."""

    val: float = 0.2
    test: float = 0.0
    seed: int = 0
    max_side: int | None = None
    shard_mib: int = 128

    def __post_init__(self) -> None:
        if not (0 <= self.val <= 1 and 0 <= self.test <= 1 and self.val + self.test <= 1):
            raise TlearnError(f"--val {self.val} --test {self.test}: shares of 0 to 1, together at most 1")
        if self.max_side is not None and self.max_side < 16:
            raise TlearnError(f"--max-side {self.max_side}: at least 16 px")
        if self.shard_mib < 1:
            raise TlearnError(f"--shard-mib {self.shard_mib}: at least 1 MiB")


@dataclass(frozen=True)
class Found:
    """A file of the source: `split` is None where the folder leaves it to us."""

    file: str
    class_name: str
    split: str | None
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Examined:
    """What decoding a file showed; `reason` is set where it cannot be used."""

    file: str
    size: int
    mtime_ns: int
    sha256: str = ""
    ending: str = ""
    width: int = 0
    height: int = 0
    sums: tuple[float, ...] = ()
    """Sum of x and of x^2 per RGB channel, x in 0..1."""
    reason: str = ""


@dataclass(frozen=True)
class Accepted:
    """An image that goes into the output."""

    file: str
    class_name: str
    split: str
    image: Examined

    @property
    def key(self) -> str:
        """Name inside the shard: the first 64 bits of the content's hash."""
        return self.image.sha256[:16]


def prepare(source: str | Path, out: str | Path, options: Options | None = None) -> Index:
    """Turn a folder of class folders into shards.

    Args:
        source: SOURCE/<class>/**/image, or SOURCE/{train,val,test}/<class>/**/image.
        out: new folder for shards, index.json and audit.json. If it already holds exactly this, nothing is done.
        options: shares of the splits, seed, largest side, shard size.

    Raises:
        TlearnError: nothing usable, one class only, a class without readable images, OUT in use for something else.
    """
    source, out, options = Path(source), Path(out), options or Options()
    if not source.is_dir():
        raise TlearnError(f"{source}: no such folder; give a folder with one sub-folder of images per class")
    found, stray = list_images(source)
    about = {
        "source": str(source.resolve()),
        "source_fingerprint": _listing_fingerprint(found, stray),
        "options": asdict(options),
    }
    with _locked_partial(out) as partial_dir:
        try:
            if done := _already_there(out, about):
                shutil.rmtree(partial_dir)
                return done
            if not found:
                raise TlearnError(_nothing_found(source, stray))
            examined = _examine_all(source, found, partial_dir / "scan.jsonl")
            plan = _Plan(found, examined, stray, options)
            plan.check(source, options)
            _write(source, partial_dir, plan, options, about)
        except TlearnError:
            shutil.rmtree(partial_dir)
            raise
        partial_dir.rename(out)
        plan.summarise(out)
    return read_index(out)


def list_images(source: Path) -> tuple[list[Found], dict[str, str]]:
    """Every file below `source`, sorted: those in a class folder, and the others with the reason.

    Hidden files and folders are ignored, links are followed (each folder once).
    """
    split_of = _split_folders(source)
    found, stray = [], {}
    for path in _walk(source, set()):
        parts = path.relative_to(source).parts
        file = "/".join(parts)
        split = split_of.get(parts[0]) if split_of else None
        below = parts[1:] if split_of else parts
        if split_of and split is None:
            stray[file] = "outside the train, val and test folders"
        elif len(below) < 2:
            stray[file] = "not in a class folder"
        else:
            try:
                stat = path.stat()
            except OSError as error:
                stray[file] = f"cannot be read: {error.strerror}"
                continue
            found.append(Found(file, below[0], split, stat.st_size, stat.st_mtime_ns))
    return found, stray


def _split_folders(source: Path) -> dict[str, str]:
    """{folder: split} where the source comes split, else {} (a class may well be called `train`)."""
    folders = {p.name for p in source.iterdir() if p.is_dir() and not _hidden(p)}
    splits = {name: _SPLIT_FOLDERS[name.lower()] for name in folders if name.lower() in _SPLIT_FOLDERS}
    nested = [name for name in splits if any(p.is_dir() and not _hidden(p) for p in (source / name).iterdir())]
    if "train" not in splits.values() or len(nested) < len(splits):
        return {}
    return splits if len(splits) == len(folders) or len(splits) > 1 else {}


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in _IGNORED


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:  # a loop of links
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if _hidden(path):
            continue
        if path.is_dir():
            yield from _walk(path, seen)
        else:
            yield path


def _listing_fingerprint(found: Iterable[Found], stray: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for f in found:
        digest.update(f"{f.file}\0{f.size}\0{f.mtime_ns}\n".encode(errors="surrogateescape"))
    for file in stray:
        digest.update(f"{file}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _nothing_found(source: Path, stray: dict[str, str]) -> str:
    layout = "expected one sub-folder of images per class (FOLDER/cat/1.jpg, FOLDER/dog/2.jpg)"
    if not stray:
        return f"{source}: the folder is empty; {layout}"
    file, reason = next(iter(stray.items()))
    return f"{source}: {len(stray)} files but none in a class folder (first: {file}: {reason}); {layout}"


@contextmanager
def _locked_partial(out: Path) -> Iterator[Path]:
    """OUT.partial, held by one process at a time; the kernel frees the lock when its holder dies."""
    path = out.parent / f"{out.name}.partial"
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                break
        except FileNotFoundError:
            continue
        # another process finished while this one waited: the folder is now OUT, or gone
        os.close(descriptor)
    try:
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
            f"({index.meta.get('source')}, {index.meta.get('options')}); choose another OUT or remove it"
        )
    show(f"{out}: already prepared from these files with these options")
    return index


def _examine_all(source: Path, found: list[Found], journal: Path) -> dict[str, Examined]:
    """Decode every file once, on all cores; what an interrupted run journalled is not done again."""
    examined = {e.file: e for e in _read_journal(journal)}
    todo = [f for f in found if (e := examined.get(f.file)) is None or (e.size, e.mtime_ns) != (f.size, f.mtime_ns)]
    with (
        journal.open("a", encoding="utf-8") as file,
        progress_bar("verifying images", total=len(found), done=len(found) - len(todo)) as advance,
    ):
        for result in _on_all_cores(partial(_examine, source), todo):
            examined[result.file] = result
            file.write(json.dumps(asdict(result)) + "\n")
            advance()
    return examined


def _read_journal(journal: Path) -> Iterator[Examined]:
    if not journal.exists():
        return
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            yield Examined(**json.loads(line))
        except ValueError:  # the line that a kill cut short
            return


def _examine(source: Path, found: Found) -> Examined:
    known = {"file": found.file, "size": found.size, "mtime_ns": found.mtime_ns}
    try:
        data = (source / found.file).read_bytes()
        image = open_image(data)
        ending = FORMATS[str(image.format)]
        rgb = load_rgb(image)
    except UnreadableImageError as error:
        return Examined(**known, reason=str(error))  # type: ignore[arg-type]
    except OSError as error:
        return Examined(**known, reason=f"cannot be read: {error.strerror}")  # type: ignore[arg-type]
    histogram = np.array(rgb.histogram(), dtype=np.float64).reshape(3, 256)
    levels = np.arange(256) / 255
    return Examined(
        **known,  # type: ignore[arg-type]
        sha256=hashlib.sha256(data).hexdigest(),
        ending=ending,
        width=rgb.width,
        height=rgb.height,
        sums=(*(histogram @ levels).tolist(), *(histogram @ levels**2).tolist()),
    )


def _on_all_cores(function: Callable[[T], R], items: list[T]) -> Iterator[R]:
    """`map` in worker processes, in order. A bounded number of items is under way at any time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(items) < 2 * _CHUNK or cores == 1:
        yield from map(function, items)
        return
    # not fork: this process may hold torch's or a progress bar's threads
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        rest = iter(items)
        while block := list(islice(rest, cores * _CHUNK * 16)):
            yield from pool.map(function, block, chunksize=_CHUNK)


class _Plan:
    """What becomes of every file: accepted into a split, quarantined, dropped as a duplicate, or a leak."""

    def __init__(
        self,
        found: list[Found],
        examined: dict[str, Examined],
        stray: dict[str, str],
        options: Options,
    ) -> None:
        self.quarantined = dict(stray)
        self.duplicates: list[dict[str, str]] = []
        self.leaks: list[dict[str, Any]] = []
        self.accepted: list[Accepted] = []
        self.all_classes = sorted({f.class_name for f in found})
        by_content: dict[str, list[Found]] = defaultdict(list)
        for f in found:
            if reason := examined[f.file].reason:
                self.quarantined[f.file] = reason
            else:
                by_content[examined[f.file].sha256].append(f)
        unique = [kept for same in by_content.values() if (kept := self._resolve(same)) is not None]
        has = {f.split for f in found}
        by_class: dict[str, list[Found]] = defaultdict(list)
        for f in unique:
            by_class[f.class_name].append(f)
        for class_name in sorted(by_class):
            members = sorted(by_class[class_name], key=lambda f: examined[f.file].sha256)
            for f, split in zip(members, _split(members, examined, has, options), strict=True):
                self.accepted.append(Accepted(f.file, class_name, split, examined[f.file]))
        # by content: a shard holds every class, and is the same wherever the source lies
        self.accepted.sort(key=lambda a: a.image.sha256)
        self.classes = sorted({a.class_name for a in self.accepted if a.split == "train"}) or self.all_classes

    def _resolve(self, same: list[Found]) -> Found | None:
        """One of several files with the same content, or None if none can be trusted."""
        files = [f.file for f in same]
        if len({f.class_name for f in same}) > 1:
            self.leaks.append({"kind": "one image under several labels (all dropped)", "files": files})
            return None
        # held-out splits keep their image: the number they give must not change meaning
        kept = max(same, key=lambda f: SPLITS.index(f.split) if f.split else 0)
        if len({f.split for f in same}) > 1:
            self.leaks.append({"kind": f"one image in several splits (kept: {kept.split})", "files": files})
        else:
            self.duplicates.extend({"file": f.file, "same_as": kept.file} for f in same if f is not kept)
        return kept

    def check(self, source: Path, options: Options) -> None:
        """Raise where no classifier can come of it."""
        usable = Counter(a.class_name for a in self.accepted)
        if empty := [name for name in self.all_classes if not usable[name]]:
            name = empty[0]
            why = next(
                (f"{file}: {why}" for file, why in self.quarantined.items() if name in file.split("/")[:-1]),
                "every image also has another label",
            )
            raise TlearnError(
                f"{source}: class {name!r} has no usable image ({why}); mend its files or remove the folder"
            )
        if len(self.all_classes) < 2:
            raise TlearnError(f"{source}: only one class ({self.all_classes[0]!r}); a classifier needs two or more")
        trained = {a.class_name for a in self.accepted if a.split == "train"}
        if trained and (unknown := sorted(set(self.all_classes) - trained)):
            raise TlearnError(
                f"{source}: class {unknown[0]!r} has no image in train but some elsewhere; "
                "the class list comes from train: add images there or remove the class"
            )
        if not trained and options.val < 1:
            raise TlearnError(f"{source}: no image is left for training; use a smaller --val or --test")

    def counts(self) -> dict[str, Counter[str]]:
        """Images per split and class."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for a in self.accepted:
            counts[a.split][a.class_name] += 1
        return counts

    def audit(self) -> dict[str, Any]:
        """audit.json: every file of the source, once."""
        accepted: dict[str, list[str]] = defaultdict(list)
        for a in self.accepted:
            accepted[a.split].append(a.file)
        return {
            "counts": {
                "files": len(self.accepted)
                + len(self.quarantined)
                + len(self.duplicates)
                + sum(len(leak["files"]) - ("kept" in leak["kind"]) for leak in self.leaks),
                "accepted": len(self.accepted),
                "quarantined": len(self.quarantined),
                "duplicates": len(self.duplicates),
                "leaks": len(self.leaks),
            },
            "accepted": {split: sorted(files) for split, files in sorted(accepted.items())},
            "quarantined": [{"file": f, "reason": r} for f, r in sorted(self.quarantined.items())],
            "duplicates": sorted(self.duplicates, key=lambda d: d["file"]),
            "leaks": self.leaks,
        }

    def summarise(self, out: Path) -> None:
        """Say what came of it."""
        counts = self.counts()
        splits = ", ".join(f"{split} {sum(counts[split].values()):,}" for split in SPLITS if split in counts)
        show(f"{out}: {len(self.classes)} classes, {splits}")
        for problem, items in (
            ("quarantined (unreadable or not an image)", self.quarantined),
            ("exact duplicates dropped", self.duplicates),
            ("LEAKS: the same image in several splits or under several labels", self.leaks),
        ):
            if items:
                show(f"  {len(items):,} {problem}; see {out / 'audit.json'}")
        if "val" in counts and (missing := [c for c in self.classes if not counts["val"][c]]):
            show(f"  no val image for {len(missing)} classes: {', '.join(missing[:5])}; their accuracy is unknown")


def _split(
    members: list[Found], examined: dict[str, Examined], given: set[str | None], options: Options
) -> list[str]:
    """Splits of one class's images. A threshold on a seeded hash: images added later do not move old ones."""
    place = [
        int.from_bytes(hashlib.sha256(f"{options.seed}:{examined[f.file].sha256}".encode()).digest()[:8]) / 2**64
        for f in members
    ]
    splits = [f.split or "train" for f in members]
    free = [i for i, split in enumerate(splits) if split == "train"]
    start = 0.0
    for name, fraction in (("test", options.test), ("val", options.val)):
        if name in given or fraction == 0:
            continue
        chosen = [
            i for i in free if start <= place[i] < start + fraction or (start + fraction >= 1 <= place[i] + 1)
        ]
        start += fraction
        if not chosen and len(free) > 1:  # a small class: its lowest hash is promoted
            chosen = [min(free, key=lambda i: place[i])]
        if len(chosen) == len(free) and fraction < 1 and len(free) > 1:
            chosen.remove(max(chosen, key=lambda i: place[i]))
        for i in chosen:
            splits[i] = name
        free = [i for i in free if splits[i] == "train"]
    return splits


def _write(source: Path, root: Path, plan: _Plan, options: Options, about: dict[str, Any]) -> None:
    classes = {name: i for i, name in enumerate(plan.classes)}
    splits = {}
    with progress_bar("writing shards", total=len(plan.accepted)) as advance:
        for split in SPLITS:
            members = [a for a in plan.accepted if a.split == split]
            if not members:
                continue
            for old in root.glob(f"{split}-*.tar"):  # of a run that was killed while writing
                old.unlink()

            def samples(members: list[Accepted] = members) -> Iterator[Sample]:
                read = partial(_content, source, options.max_side)
                # reading alone gains nothing from more processes, scaling down does
                contents = map(read, members) if options.max_side is None else _on_all_cores(read, members)
                for a, (ending, data) in zip(members, contents, strict=True):
                    advance()
                    yield Sample(a.key, ending, data, classes[a.class_name], a.class_name, a.file)

            splits[split] = write_split(root, split, samples(), options.shard_mib * 2**20)
    (root / "audit.json").write_text(json.dumps(plan.audit(), indent=1, ensure_ascii=False), encoding="utf-8")
    (root / "scan.jsonl").unlink()
    write_index(root, plan.classes, splits, {**_statistics(plan), **about, "leaks": len(plan.leaks)})


def _content(source: Path, max_side: int | None, a: Accepted) -> tuple[str, bytes]:
    """The bytes that go into the shard: the file's own, unless it is larger than `max_side` px."""
    data = (source / a.file).read_bytes()
    if hashlib.sha256(data).hexdigest() != a.image.sha256:
        raise TlearnError(f"{source / a.file}: changed while it was being prepared; start again")
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


def _statistics(plan: _Plan) -> dict[str, Any]:
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
        raise TlearnError(f"data.path: {source}: no such folder; give a folder of class folders or prepared data")
    fingerprint = _listing_fingerprint(*list_images(source))
    digest = hashlib.sha256(json.dumps([str(source.resolve()), fingerprint, asdict(options)]).encode()).hexdigest()
    cache = Path(os.environ.get("TLEARN_CACHE") or "~/.cache/tlearn").expanduser()
    return prepare(source, cache / "prepared" / f"{source.resolve().name}-{digest[:12]}", options)
