"""Make real labelled picture folders for the demo, the tests and the benchmarks.

    python benchmarks/datasets.py tux10 OUT           # OUT/<class>/*.png, 359 colour cut-outs
    python benchmarks/datasets.py tux10_outlines OUT  # the same pictures, of which only edges are left: another domain
    python benchmarks/datasets.py openclipart10 OUT   # OUT/<class>/*.png, 2,233 drawings
    python benchmarks/datasets.py fashion_mnist OUT   # OUT/{train,test}/<class>/*.png, 70,000 grey 28x28
    python benchmarks/datasets.py photo_crops OUT     # OUT/{train,val}/<photo>/*.png, 320 crops of 10 photos
    python benchmarks/datasets.py demo OUT            # tux10 where apt is at hand, otherwise photo_crops

Nothing is redistributed here: the pictures come from Debian packages, or from wheels already installed.
A package that is not installed is fetched, without root, into $TLEARN_CACHE/debian (default
~/.cache/tlearn/debian) and stays there.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps

TUX10 = {
    "bird": ["animals/birds"],
    "insect": ["animals/insects"],
    "mammal": ["animals/mammals", "animals/marsupials"],
    "fruit": ["food/fruit"],
    "vegetable": ["food/vegetables"],
    "plant": ["plants"],
    "clothing": ["clothes"],
    "vehicle": ["vehicles", "military/vehicles"],
    "building": ["town/houses", "town/monuments"],
    "household": ["household"],
}
# fmt: off
OPENCLIPART10 = ("animals", "food", "people", "transportation", "tools",
                 "buildings", "plants", "electronics", "office", "recreation")
FASHION = ("t_shirt_top", "trouser", "pullover", "dress", "coat",  # in the order of the original labels
           "sandal", "shirt", "sneaker", "bag", "ankle_boot")
# fmt: on
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),  # NASA, public domain
    "camera": ("skimage", "data/camera.png"),  # CC0, Lav Varshney; the only grey one
    "cat": ("skimage", "data/chelsea.png"),  # CC0, Stefan van der Walt
    "coffee": ("skimage", "data/coffee.png"),  # CC0, Rachel Michetti
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),  # NASA, public domain
    "retina": ("skimage", "data/retina.jpg"),  # CC0, Mikael Häggström
    "rocket": ("skimage", "data/rocket.jpg"),  # SpaceX, public domain
    "tissue": ("skimage", "data/ihc.png"),  # no known copyright restrictions
    "flower": ("sklearn", "datasets/images/flower.jpg"),  # CC BY 2.0, flickr.com/photos/vultilion
    "temple": ("sklearn", "datasets/images/china.jpg"),  # CC BY 2.0, flickr.com/photos/danielbuechele
}
MARK = ".source"  # hidden, so that a reader of OUT sees class folders only


def debian(package: str, folder: str, probe: str) -> Path:
    """Return /usr/share/FOLDER of a Debian package: installed, unpacked by an earlier call, or fetched now.

    An installed folder counts only if it has PROBE inside: another package may own an empty one.
    """
    installed = Path("/usr/share", folder)
    if (installed / probe).exists():
        return installed
    cache = Path(os.environ.get("TLEARN_CACHE") or "~/.cache/tlearn").expanduser().absolute() / "debian"
    if not (cache / package).is_dir():
        _fetch(package, cache / package)
    return cache / package / "usr/share" / folder


def _fetch(package: str, target: Path) -> None:
    """Download and unpack PACKAGE to TARGET, which appears only when it is whole."""
    advice = f"Try `apt-get update && apt-get download {package}`, or use the photo_crops set."
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError(f"there is no apt-get here to get Debian's {package}; use the photo_crops set")
    import fcntl  # not on Windows, but neither is apt-get

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{package}.part")
    with target.with_name(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one call downloads, the others wait; a dead call's lock is freed
        if target.is_dir():
            return
        shutil.rmtree(part, ignore_errors=True)  # what a killed call left
        part.mkdir()

        def run(*command: str) -> str:
            """Run COMMAND; return what went wrong, or an empty string."""
            # The child holds the lock too: if this process is killed, the child still writes in `part`.
            fds = [lock.fileno()]
            done = subprocess.run(command, cwd=part, pass_fds=fds, capture_output=True, text=True)
            return done.stderr.strip() or f"{command[0]} failed" if done.returncode else ""

        try:
            print(f"fetching Debian's {package} into {target.parent}", flush=True)
            problem = run("apt-get", "download", package)
            if problem and os.geteuid() == 0:  # a fresh container has no package lists; root can get them
                run("apt-get", "update")
                problem = run("apt-get", "download", package)
            problem = problem or run("dpkg-deb", "-x", *map(str, part.glob("*.deb")), "tree")
            if problem:
                raise RuntimeError(f"could not get Debian's {package}: {problem}\n{advice}")
            (part / "tree").rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def tux10(out: Path) -> None:
    """359 cut-outs, most of them RGBA. Debian's tuxpaint-stamps-default, GPL-2: use, do not commit."""
    _copy(debian("tuxpaint-stamps-default", "tuxpaint/stamps", "animals/birds"), TUX10, out, expected=359)


def tux10_outlines(out: Path) -> None:
    """Dark edges on white."""
    tux10(out)
    for file in out.rglob("*.png"):
        rgba = Image.open(file).convert("RGBA")
        grey = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("L")
        ImageOps.invert(grey.filter(ImageFilter.FIND_EDGES)).save(file)


def openclipart10(out: Path) -> None:
    """2,233 drawings. Debian's openclipart-png, dedicated to the public domain."""
    classes = {name: [name] for name in OPENCLIPART10}
    root = debian("openclipart-png", "openclipart/png", "animals")
    _copy(root, classes, out, expected=2233, min_side=24)


def _copy(root: Path, classes: dict[str, list[str]], out: Path, expected: int, min_side: int = 1) -> None:
    """Copy the PNG files under ROOT, bytes unchanged, to one folder per class.

    Sides under MIN_SIDE (nothing to see) and over 9 megapixels (slow, and few) are left out.
    """
    seen = set()
    for label, folders in classes.items():
        (out / label).mkdir()
        for folder in folders:
            for path in sorted((root / folder).rglob("*.png")):
                # A mirrored or an equal copy in the other part of a split would be a leak. openclipart
                # links some drawings into several classes: the class listed first keeps them.
                data = path.read_bytes()
                digest = hashlib.sha256(data).digest()
                width, height = _png_size(data)
                fits = min(width, height) >= min_side and width * height <= 9_000_000
                if path.stem.endswith(("_mirror", "_flip")) or digest in seen or not fits:
                    continue
                seen.add(digest)
                name = "_".join(path.relative_to(root / folder).parts)
                with (out / label / name).open("xb") as file:  # x: two files must never become one
                    file.write(data)
    if len(seen) != expected:
        warnings.warn(f"{len(seen)} pictures, not {expected}: another release of the package?", stacklevel=2)


def _png_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header of a PNG, (0, 0) for anything else.

    Not by Pillow, which refuses the largest drawing (623 megapixels) and warns of others.
    """
    is_png = data.startswith(b"\x89PNG\r\n\x1a\n")
    return (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) if is_png else (0, 0)


def fashion_mnist(out: Path, limit: int | None = None) -> None:
    """60,000 + 10,000 grey 28x28 pictures, or the first LIMIT of each split, classes balanced.

    Debian's dataset-fashion-mnist, MIT, Zalando SE. Folders sort by name, not by the original label.
    """
    root = debian("dataset-fashion-mnist", "datasets/fashion-mnist", "train-images-idx3-ubyte.gz")
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = _read_idx(root / f"{stem}-images-idx3-ubyte.gz")
        labels = _read_idx(root / f"{stem}-labels-idx1-ubyte.gz")
        for label, name in enumerate(FASHION):
            folder = out / split / name
            folder.mkdir(parents=True)
            share = None if limit is None else limit // 10 + (label < limit % 10)
            for index in np.flatnonzero(labels == label)[:share]:
                Image.fromarray(images[index]).save(folder / f"{index:05d}.png")


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzipped idx file of bytes: two zeros, a type, the number of dimensions, the sizes, the data."""
    data = gzip.decompress(path.read_bytes())
    start = 4 + 4 * data[3]
    return np.frombuffer(data, np.uint8, offset=start).reshape(struct.unpack(f">{data[3]}I", data[4:start]))


def photo_crops(out: Path) -> None:
    """320 square crops of 96 to 200 px. The class is the photograph; sources and licences are in PHOTOS.

    Train crops come from the left 62 % of each and val crops from the rest, so no pixel is in both.
    """
    for name, (package, path) in PHOTOS.items():
        try:
            # The file itself, because skimage.data.NAME() may want pooch and a download.
            source = resources.files(package) / path
        except ModuleNotFoundError as error:
            raise RuntimeError("photo_crops needs `pip install scikit-image scikit-learn`") from error
        with source.open("rb") as file, Image.open(file) as photo:
            border = int(photo.width * 0.62)
            for split, left, right, count in (("train", 0, border, 20), ("val", border, photo.width, 12)):
                rng = random.Random(f"{name}/{split}")  # its own seed: adding a photo changes no other one
                folder = out / split / name
                folder.mkdir(parents=True)
                corners: set[tuple[int, int]] = set()
                while len(corners) < count:
                    side = rng.randint(96, min(200, right - left, photo.height))
                    x, y = rng.randint(left, right - side), rng.randint(0, photo.height - side)
                    if (x, y) not in corners:
                        photo.crop((x, y, x + side, y + side)).save(folder / f"{len(corners):02d}.png")
                        corners.add((x, y))


def demo(out: Path) -> Path:
    """Make tux10 if its package is at hand, otherwise photo_crops; keep what an earlier call made."""
    if _made(out) in ("tux10", "photo_crops"):
        return make(_made(out), out)
    try:
        debian("tuxpaint-stamps-default", "tuxpaint/stamps", "animals/birds")
    except RuntimeError as error:
        print(f"demo: photo_crops, because tux10 is not to be had: {error}")
        return make("photo_crops", out)
    print("demo: tux10, because Debian's tuxpaint-stamps-default is at hand")
    return make("tux10", out)


SETS: dict[str, Callable[[Path], None]] = {
    "tux10": tux10,
    "tux10_outlines": tux10_outlines,
    "openclipart10": openclipart10,
    "fashion_mnist": fashion_mnist,
    "photo_crops": photo_crops,
}


def _made(out: Path) -> str:
    """What an earlier call made of OUT: a set's name (and limit), or an empty string."""
    mark = out / MARK
    return mark.read_text().strip() if mark.is_file() else ""


def make(name: str, out: Path, limit: int | None = None) -> Path:
    """Make the set NAME in OUT, unless it is there already, and return OUT.

    OUT is built beside its place and renamed, so it is either whole or not there. (A call that is killed
    outright can leave its hidden `.NAME-xxxxxxxx` folder beside OUT; nothing ever reads it.)
    """
    out = Path(out).expanduser().absolute()
    if name not in SETS and name != "demo":
        raise ValueError(f"no set {name!r}; there are {', '.join(SETS)} and demo")
    if limit is not None and (name != "fashion_mnist" or limit < 10):
        raise ValueError("limit is for fashion_mnist, and at least 10: one picture per class")
    if name == "demo":
        return demo(out)
    recipe = name if limit is None else f"{name} limit={limit}"
    if _made(out) == recipe:
        print(f"{out}: {recipe} is there already")
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not {recipe}: remove it, or name another folder")

    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        build = Path(scratch, "build")
        build.mkdir()
        if limit is None:
            SETS[name](build)
        else:
            fashion_mnist(build, limit)
        (build / MARK).write_text(f"{recipe}\n")
        counts = Counter(path.parent.relative_to(build).as_posix() for path in build.rglob("*.png"))
        try:
            build.rename(out)
        except OSError:
            if _made(out) != recipe:  # otherwise a concurrent call was first, and its copy is as good
                raise
    print(f"{out}: {recipe}, {counts.total()} pictures in {time.perf_counter() - start:.1f} s")
    print("  " + ", ".join(f"{folder} {counts[folder]}" for folder in sorted(counts)))
    return out


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("name", choices=[*SETS, "demo"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, metavar="N", help="pictures per split of fashion_mnist")
    args = parser.parse_args()
    try:
        make(args.name, args.out, args.limit)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
