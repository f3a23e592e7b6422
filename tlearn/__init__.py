"""Transfer learning from a folder of labelled images, with the same numbers at any scale.

Names are loaded when they are first used, so that `import tlearn` and `tlearn --help` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tlearn.config import Config
    from tlearn.configfile import load_config
    from tlearn.data.prepare import prepare
    from tlearn.errors import TlearnError
    from tlearn.predict import load
    from tlearn.run import train

__all__ = ["Config", "TlearnError", "__version__", "load", "load_config", "prepare", "train"]

_HOME = {
    "Config": "tlearn.config",
    "TlearnError": "tlearn.errors",
    "load": "tlearn.predict",
    "load_config": "tlearn.configfile",
    "prepare": "tlearn.data.prepare",
    "train": "tlearn.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tlearn' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
