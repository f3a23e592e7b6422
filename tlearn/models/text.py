"""A text feature per class: from a file, or from the text tower of a CLIP model."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from tlearn.console import progress_bar, show
from tlearn.errors import TlearnError
from tlearn.files import cache_folder, replace, sha256
from tlearn.modelconfig import TextHead
from tlearn.models.heads import Prototypes
from tlearn.models.weights import is_file, tensors_only

START_SCALE = 1 / 0.07
"""Of cosines, where nothing else is known (Radford et al. 2021, section 2.5)."""

_TOWER = "open_clip:"
_VERSION = 1
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
_HOW = "write it by numpy.savez(PATH, classes=NAMES, features=ROWS)"


def text_features(options: TextHead | None, classes: Sequence[str]) -> Prototypes | None:
    """One text feature of length 1 per class, in the order of `classes`; None where the head needs none.

    Those of a text tower are kept in $TLEARN_CACHE/text (default: ~/.cache/tlearn/text).

    Raises:
        TlearnError: a file that cannot be read or lacks a class; an unknown tower; weights that cannot be had.
    """
    if options is None:
        return None
    if not options.text.startswith(_TOWER):
        return _read(Path(options.text).expanduser(), classes)
    model, _, weights = options.text.removeprefix(_TOWER).partition("/")
    texts = [
        [prompt.replace("{}", options.words.get(c, c.replace("_", " "))) for prompt in options.prompts] for c in classes
    ]
    source = sha256(Path(weights).expanduser()) if _exists(weights) else weights
    key = hashlib.sha256(json.dumps([_VERSION, model, source, classes, texts]).encode()).hexdigest()[:32]
    cache = cache_folder() / "text"
    path = cache / f"{key}.npz"
    with suppress(TlearnError):  # it is not there, or damaged
        return _read(path, classes)
    features, scale = _encode(model, weights, texts)
    cache.mkdir(parents=True, exist_ok=True)
    written = cache / f".{key}.{os.getpid()}.npz"
    np.savez(written, classes=list(classes), features=features.numpy(), scale=scale)
    replace(written, path)
    return Prototypes(features, scale)


def _exists(weights: str) -> bool:
    return is_file(weights) and Path(weights).expanduser().is_file()


def _read(path: Path, classes: Sequence[str]) -> Prototypes:
    key = f"model.head.text: {path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["classes"]]
            rows = torch.from_numpy(np.asarray(file["features"], dtype=np.float32))
            scale = float(file["scale"]) if "scale" in file else START_SCALE
    except FileNotFoundError:
        raise TlearnError(f"{key}: no such file; {_HOW}, or name a text tower: {_TOWER}MODEL/WEIGHTS") from None
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise TlearnError(f"{key}: cannot be read ({error}); {_HOW}") from None
    if rows.ndim != 2 or len(rows) != len(names) or len(set(names)) < len(names):
        shape = tuple(rows.shape)
        raise TlearnError(f"{key}: {len(names)} names and features of shape {shape}; every class needs one row: {_HOW}")
    if missing := [name for name in classes if name not in names]:
        raise TlearnError(f"{key}: no row for the classes {', '.join(missing[:5])}; it has {', '.join(names[:5])} ...")
    rows = rows[[names.index(name) for name in classes]]
    useless = [name for name, row in zip(classes, rows, strict=True) if not 0 < float(row.norm()) < float("inf")]
    if useless or not 0 < scale < float("inf"):
        raise TlearnError(f"{key}: {f'the row of {useless[0]}' if useless else 'scale'} is zero or not finite")
    return Prototypes(F.normalize(rows, dim=1), scale)


def _encode(model: str, weights: str, texts: Sequence[Sequence[str]]) -> tuple[torch.Tensor, float]:
    """(classes, width) features of length 1, and the scale of the cosines with images.

    Those of several prompts for one class are averaged (Radford et al. 2021, section 3.1.4).
    """
    try:
        import open_clip
    except ImportError:
        raise TlearnError(f"model.head.text: {_TOWER}{model} needs open_clip: pip install open_clip_torch") from None
    known = open_clip.list_models()
    if model not in known:
        close = ", ".join(difflib.get_close_matches(model, known, n=3)) or "open_clip.list_models()"
        raise TlearnError(f"model.head.text: open_clip has no model {model!r}; see {close}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights not in tags and not _exists(weights):
        raise TlearnError(
            f"model.head.text: {model} has no weights {weights!r}; name a file, or a tag as in {_TOWER}{model}/TAG: "
            f"{', '.join(tags) or 'there are none'}"
        )
    show(f"encoding the names of {len(texts)} classes by open_clip's {model}, weights {weights}")
    try:
        with tensors_only():
            tokens: Callable[[Sequence[str]], torch.Tensor] = open_clip.get_tokenizer(model)
            # of a tag open_clip knows, but does not heed, that its weights were trained with the other GELU
            other = bool((open_clip.get_pretrained_cfg(model, weights) or {}).get("quick_gelu"))
            tower = open_clip.create_model(model, weights, require_pretrained=True, force_quick_gelu=other).eval()
    except (OSError, RuntimeError, ValueError, ImportError, pickle.UnpicklingError, SafetensorError) as error:
        cause = str(error).strip().partition("\n")[0][:200]
        raise TlearnError(
            f"model.head.text: weights {weights} of open_clip's {model}, or its tokenizer, cannot be had, or do not "
            f"fit ({cause}). Fetch them once where there is a network, or give a file"
        ) from None
    rows = []
    with torch.no_grad(), progress_bar("encoding class names", len(texts)) as advance:
        for prompts in texts:
            rows.append(F.normalize(tower.encode_text(tokens(prompts)).float(), dim=1).mean(dim=0))
            advance()
    return F.normalize(torch.stack(rows), dim=1), float(tower.logit_scale.detach().exp())
