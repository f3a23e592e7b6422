"""Small pictures and folders of them, shared by the data tests."""

from __future__ import annotations

import gc
import importlib.util
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tlearn.data.decode import load_rgb, open_image


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed: int, width: int = 12, height: int = 12) -> Image.Image:
    """Different for every seed."""
    rng = np.random.default_rng([seed, width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiles(seed: int, columns: int, rows: int, side: int = 16) -> npt.NDArray[np.uint8]:
    """(rows * side, columns * side, 3): flat squares of random colours, no two alike, which JPEG keeps well."""
    rng = np.random.default_rng([seed, columns, rows])
    colours = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return colours.repeat(side, axis=0).repeat(side, axis=1)


def photo() -> Image.Image:
    """A photograph, 640 x 427 (CC BY 2.0, flickr.com/photos/danielbuechele)."""
    spec = importlib.util.find_spec("sklearn")  # found, not imported: its import takes a second
    assert spec is not None
    assert spec.submodule_search_locations
    with Image.open(Path(spec.submodule_search_locations[0], "datasets", "images", "china.jpg")) as image:
        return image.convert("RGB")


def pixels(data: bytes) -> npt.NDArray[np.int64]:
    """(H, W, 3) as tlearn decodes it; signed, so that differences are differences."""
    return np.asarray(load_rgb(open_image(data))).astype(np.int64)


def write_images(root: Path, counts: Mapping[str, int], first_seed: int = 0, side: int = 12) -> Path:
    """root/<folder>/000.png, ...: no two pictures alike, also not across folders."""
    seed = first_seed * 100_000
    for folder, n in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / folder / f"{i:03d}.png").write_bytes(encode(noise(seed, side, side), "PNG"))
            seed += 1
    return root


def psnr_db(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def read_with_webdataset(urls: list[str], decode: str | None = None) -> list[dict[str, Any]]:
    """Every sample, by webdataset alone, which leaves closing the files to the garbage collector."""
    import webdataset as wds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        data = wds.WebDataset(urls, shardshuffle=False)
        samples = list(data if decode is None else data.decode(decode))
        del data
        gc.collect()
    return samples
