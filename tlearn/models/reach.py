"""Whether the weights of a backbone can be had: from the cache, the hub, or a package that pip has installed."""

from __future__ import annotations

import importlib.metadata

import timm
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

from tlearn.models.weights import PACKAGES

PATIENCE_S = 3.0
"""So long the hub has to answer."""

_FILES = ("model.safetensors", "pytorch_model.bin")


def hub_has(backbone: str) -> bool:
    """Whether the default weights of `timm:NAME` are cached, or the hub answers for them."""
    cfg = timm.get_pretrained_cfg(backbone.removeprefix("timm:"))
    repository = str(cfg.hf_hub_id) if cfg is not None and cfg.hf_hub_id else None
    if repository is None:
        return False
    if any(isinstance(try_to_load_from_cache(repository, name), str) for name in _FILES):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(repository, _FILES[0]), timeout=PATIENCE_S)
    except Exception:  # whatever a client of a far server happens to raise
        return False
    return True


def installed_packages() -> dict[str, str]:
    """`model.weights` of the packages that are installed, by backbone, the smallest network first."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[f"timm:{package.backbone}"] = f"package:{name}"
    return found
