"""Shared: a small real data set, and a config for runs of a second."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tlearn import apart
from tlearn.config import Config
from tlearn.configfile import load_config
from tlearn.data.prepare import prepare

# for tests of several processes: forked from a server that has imported all they need
multiprocessing.set_forkserver_preload(["tlearn.run"])
os.environ.setdefault("OMP_NUM_THREADS", "1")
# one thread: what these networks compute is too small to share, and two processes may run side by side
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent


LONG = ("test_slurm.py", "test_resume.py", "test_distributed.py", "test_features.py")
"""Files that take minutes: first, so that workers side by side end at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the order otherwise."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def load_script(name: str) -> ModuleType:
    """A script of benchmarks/ as a module, which imports others of them by name."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of ten photographs: train/<photo>/*.png (200) and val/<photo>/*.png (120)."""
    out: Path = load_script("datasets").make("photo_crops", tmp_path_factory.mktemp("photos") / "crops")
    return out


@pytest.fixture(scope="session")
def photos(photo_folder: Path) -> Path:
    """The same, prepared."""
    out = photo_folder.parent / "prepared"
    prepare(photo_folder, out)
    return out


TINY = (
    "model.backbone=test_efficientnet",
    "model.weights=random",
    "data.image_size=32",
    "data.workers=0",
    "tracking.wandb.mode=disabled",
    "run.audit=true",
    "precision=fp32",
)
"""A network of a few hundred thousand parameters on pictures of 32 px."""


@pytest.fixture
def tiny(photos: Path) -> Callable[..., Config]:
    """Makes configs of runs that take a second: `tiny("seed=3", ...)`."""

    def make(*overrides: str, quick: bool = False) -> Config:
        return load_config(None, [f"data.path={photos}", *TINY, *overrides], quick=quick)

    return make


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the place of `tlearn train`: appends its run to `order`, and does what the file `behave` says."""
    program = tmp_path / "stand_in"
    program.write_text(
        f"#!{sys.executable} -S\n"
        "import sys, time\n"
        f"sys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
        f"folder, here = sys.argv[-1], {str(tmp_path)!r}\n"
        "print('this is', folder, flush=True)\n"
        "open(here + '/order', 'a').write('/'.join(folder.split('/')[-2:]) + '\\n')\n"
        "exec(open(here + '/behave').read())\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(apart.sys, "executable", str(program))  # type: ignore[attr-defined]
    return tmp_path
