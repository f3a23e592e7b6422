"""What becomes of every file: accepted into a split, quarantined, dropped as a duplicate, or reported as a leak."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlearn.console import show
from tlearn.data.scan import Examined, Found, Listing
from tlearn.data.shards import SPLITS
from tlearn.errors import TlearnError


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
class Accepted:
    """An image that goes into the output."""

    found: Found
    split: str
    image: Examined

    @property
    def file(self) -> str:
        """Its name in the origin."""
        return self.found.file

    @property
    def class_name(self) -> str:
        """Its label."""
        return self.found.class_name

    @property
    def key(self) -> str:
        """Name inside the shard: the first 64 bits of the content's hash."""
        return self.image.sha256[:16]


class Plan:
    """What becomes of every file: accepted into a split, quarantined, dropped as a duplicate, or a leak."""

    def __init__(self, listing: Listing, examined: dict[str, Examined], options: Options) -> None:
        found = listing.found
        self.files = len(found) + len(listing.stray)
        self.quarantined = dict(listing.stray)
        self.duplicates: list[dict[str, str]] = []
        self.leaks: list[dict[str, Any]] = []
        self.accepted: list[Accepted] = []
        others = {f.class_name for f in found} - set(listing.classes)
        self.all_classes = [*listing.classes, *sorted(others)]
        self._files_of: dict[str, list[str]] = defaultdict(list)
        for f in found:
            self._files_of[f.class_name].append(f.file)
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
                self.accepted.append(Accepted(f, split, examined[f.file]))
        # by content: a shard holds every class, and is the same wherever the source lies
        self.accepted.sort(key=lambda a: a.image.sha256)
        trained = {a.class_name for a in self.accepted if a.split == "train"}
        self.classes = [name for name in self.all_classes if name in trained] or self.all_classes

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

    def check(self, source: str, options: Options) -> None:
        """Raise where no classifier can come of it."""
        usable = Counter(a.class_name for a in self.accepted)
        if empty := [name for name in self.all_classes if not usable[name]]:
            reasons = ", ".join(f"{name!r} ({self._why_unusable(name)})" for name in empty[:8])
            more = f" and {len(empty) - 8} more" if len(empty) > 8 else ""
            raise TlearnError(
                f"{source}: classes without a usable image: {reasons}{more}; mend their files or remove the classes"
            )
        if len(self.all_classes) < 2 and options.val < 1:
            raise TlearnError(f"{source}: only one class ({self.all_classes[0]!r}); a classifier needs two or more")
        trained = {a.class_name for a in self.accepted if a.split == "train"}
        if trained and (unknown := sorted(set(self.all_classes) - trained)):
            raise TlearnError(
                f"{source}: class {unknown[0]!r} has no image in train but some elsewhere; "
                "the class list comes from train: add images there or remove the class"
            )
        if not trained and options.val < 1:
            raise TlearnError(f"{source}: no image is left for training; use a smaller --val or --test")

    def _why_unusable(self, class_name: str) -> str:
        files = self._files_of[class_name]
        broken = (f"{file}: {self.quarantined[file]}" for file in files if file in self.quarantined)
        return next(broken, "every image also has another label" if files else "no file")

    def counts(self) -> dict[str, Counter[str]]:
        """Images per split and class."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for a in self.accepted:
            counts[a.split][a.class_name] += 1
        return counts

    def several_frames(self) -> list[str]:
        """Accepted files that hold more pictures than the first, which is used."""
        return sorted(a.file for a in self.accepted if a.image.frames > 1)

    def audit(self) -> dict[str, Any]:
        """audit.json: every file of the origin, once."""
        accepted: dict[str, list[str]] = defaultdict(list)
        for a in self.accepted:
            accepted[a.split].append(a.file)
        return {
            "counts": {
                "files": self.files,
                "accepted": len(self.accepted),
                "quarantined": len(self.quarantined),
                "duplicates": len(self.duplicates),
                "leaks": len(self.leaks),
            },
            "accepted": {split: sorted(files) for split, files in sorted(accepted.items())},
            "quarantined": [{"file": f, "reason": r} for f, r in sorted(self.quarantined.items())],
            "duplicates": sorted(self.duplicates, key=lambda d: d["file"]),
            "several_frames": self.several_frames(),
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
            ("files with several frames, of which the first is used", self.several_frames()),
            ("LEAKS: the same image in several splits or under several labels", self.leaks),
        ):
            if items:
                show(f"  {len(items):,} {problem}; see {out / 'audit.json'}")
        if "train" not in counts:
            show("  no train image: these data can be scored, not trained on")
        if "val" in counts and (missing := [c for c in self.classes if not counts["val"][c]]):
            show(f"  no val image for {len(missing)} classes: {', '.join(missing[:5])}; their accuracy is unknown")


def _split(members: list[Found], examined: dict[str, Examined], given: set[str | None], options: Options) -> list[str]:
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
        chosen = [i for i in free if start <= place[i] < start + fraction]
        start += fraction
        if not chosen and len(free) > 1:  # a small class: its lowest hash is promoted
            chosen = [min(free, key=lambda i: place[i])]
        if chosen and len(chosen) == len(free) and fraction < 1:  # train keeps one of every class
            chosen.remove(max(chosen, key=lambda i: place[i]))
        for i in chosen:
            splits[i] = name
        free = [i for i in free if splits[i] == "train"]
    return splits
