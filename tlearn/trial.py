"""What a verdict rests on beside the quick run itself. Each function is for a process of its own.

What they set up (precision, random numbers, threads of a loader) is none of the run's, and a peak of memory can only be
told of a process that has done nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections import Counter
from contextlib import closing, redirect_stderr, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tlearn.config import Config, Constant
from tlearn.configfile import load_config
from tlearn.data.loader import EVAL_IMAGES, Share
from tlearn.data.shards import Split
from tlearn.data.source import Indexed, Source, open_source
from tlearn.data.workers import available_cores
from tlearn.errors import TlearnError
from tlearn.faults import Against, Colours, Copy, Leaks
from tlearn.features import why_not
from tlearn.forecast import Forecast, Measured, Room, StageCost, forecast
from tlearn.models.build import Card, Model, build_model
from tlearn.models.text import text_features
from tlearn.models.weights import BESIDE, CARD
from tlearn.predict import Classifier, load
from tlearn.probe import Labels, Matrix, fitted, frozen_features
from tlearn.run import train
from tlearn.runtime import Runtime, use_cpu
from tlearn.stages import expand, filled, resolve

STEPS = 4
"""Of every stage of a trial; the first one is left out, since memory is found and kernels are chosen in it."""
VAL_IMAGES = 2 * EVAL_IMAGES
"""That a trial evaluates after every stage."""
ALIKE = 0.85
"""Cosine of standardised features from which on two images are copies of one picture. EfficientNet-Lite0 at 128 px on
the ten-class set: 31 copies at nine tenths of the size, as JPEG of quality 80, have 0.865 to 0.999; without them the
nearest train images of 102 val images have 0.80 (one), 0.67 and less (raw cosines: from 0.89 on, up to 0.85)."""
CERTAIN = 0.95
"""Cosine beyond that of any two different pictures seen so far: on Fashion-MNIST at 64 px, 14 of 402 val images have a
neighbour above 0.85, the nearest at 0.914."""
LISTED = 20
_ROWS = 1024


class Evidence(NamedTuple):
    """About the images of a quick run, and what frozen features say of them."""

    against: Against | None
    no_probe: str | None
    leaks: Leaks
    missing: tuple[str, ...]
    own: Colours | None
    """Mean and deviation that the weights know, where the run normalises by others."""


def look(run: Path, full: Config) -> Evidence:
    """Compare a finished run with a linear probe, and its train images with its val images.

    Args:
        run: its folder.
        full: the run that it is to decide on, which sees more images.
    """
    config = load_config(run / "config.yaml")
    if config.data.reader != "indexed":
        why = "data.reader: stream has no index"
        return Evidence(None, why, Leaks(unseen=why), (), None)
    with redirect_stderr(io.StringIO()):  # of a run nobody asked for
        source = Indexed(config)
        whole = Indexed(full)
        per_class = whole.splits["val"].per_class(len(whole.classes))
        missing = tuple(name for name, n in zip(whole.classes, per_class, strict=True) if n == 0)
        leaks = Leaks(
            dropped=_dropped(whole.splits["train"].root),
            exact=len(np.intersect1d(whole.splits["train"].rows["key"], whole.splits["val"].rows["key"])),
            train=whole.sizes["train"],
        )
        try:
            if "random" in Card.read(run / CARD).weights.split(BESIDE):
                raise TlearnError("the weights were random")
            _, x, y = frozen_features(config)
        except TlearnError as error:
            return Evidence(None, str(error), dataclasses.replace(leaks, unseen=str(error)), missing, None)
        copies = near_copies(x["train"], x["val"])
        listed = tuple(
            Copy(_name(source.splits["val"], i), _name(source.splits["train"], j), round(cosine, 4))
            for i, j, cosine in copies[:LISTED]
        )
        looked_at = source.sizes["train"], source.sizes["val"]
        certain = sum(cosine >= CERTAIN for _, _, cosine in copies)
        leaks = dataclasses.replace(leaks, copies=len(copies), certain=certain, listed=listed, looked_at=looked_at)
        own = _own_colours(config, source) if config.data.normalise == "own" else None
        try:
            predicted = fitted(config, x, y, "linear").predicted
        except TlearnError as error:
            return Evidence(None, str(error), leaks, missing, own)
        return Evidence(_against(load(run), source, predicted, y["val"]), None, leaks, missing, own)


def _dropped(root: Path) -> dict[str, int]:
    with suppress(OSError, ValueError, LookupError):  # data that something else has written
        audit = json.loads((root / "audit.json").read_text(encoding="utf-8"))
        return dict(Counter(leak["kind"] for leak in audit["leaks"]))
    return {}


def near_copies(train: Matrix, val: Matrix) -> list[tuple[int, int, float]]:
    """Val images whose nearest train image is a copy, it, and how near; the nearest first.

    Args:
        train, val: (n, features) of frozen layers.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    a, b = ((x - mean) / std for x in (train, val))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (a, b))
    found = []
    for some in np.array_split(np.arange(len(b)), -(-len(b) // _ROWS)):  # not all of a large matrix at once
        cosines = b[some] @ a.T
        nearest = cosines.argmax(1)
        values = cosines[np.arange(len(some)), nearest]
        found += [(int(i), int(j), float(c)) for i, j, c in zip(some, nearest, values, strict=True) if c >= ALIKE]
    return sorted(found, key=lambda copy: -copy[2])


def _name(split: Split, i: int) -> str:
    """The source file of a sample, as `prepare` wrote it beside the image."""
    row = split.rows[i]
    key = f"{row['key']:016x}"
    with (
        suppress(OSError, KeyError, ValueError, tarfile.TarError),
        tarfile.open(split.root / split.shards[row["shard"]].name) as tar,
    ):
        about = tar.extractfile(f"{key}.json")
        assert about is not None
        return str(json.load(about)["file"])
    return key


def _own_colours(config: Config, source: Indexed) -> Colours:
    data = config.data.model_copy(update={"normalise": "weights"})
    p = build_model(config.model_copy(update={"data": data}), len(source.classes)).preprocessing
    return p.mean, p.std


def _against(run: Classifier, source: Indexed, probe: Labels, labels: Labels) -> Against:
    answers = []
    where = run.preprocessing, Share(EVAL_IMAGES), run.runtime.device, run.runtime.dtype
    with (
        closing(source.eval_loader("val", *where)) as loader,
        torch.no_grad(),
        run.runtime.accelerator.autocast(),
        loader.steps(0, loader.steps_per_epoch) as steps,
    ):
        for (batch,) in steps:
            answers.append(run.net(batch.images).argmax(1).cpu().numpy())
    ours, theirs = np.concatenate(answers) == labels, probe == labels
    return Against(int((ours & theirs).sum()), int((ours & ~theirs).sum()), int((~ours & theirs).sum()))


def mapped_mib() -> float:
    """What this process has in memory of files such as torch's libraries; a fork counts only what it has touched."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("RssFile")), 0.0)
    return 0.0


def _allowed_bytes() -> float:
    """Memory that this process's cgroup may have, as a Slurm job's or a container's is bounded; none: infinite."""
    found = float("inf")
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        inside = next(line.partition("::")[2] for line in lines if line.startswith("0::"))
        here = Path("/sys/fs/cgroup") / inside.lstrip("/")
        for group in (here, *here.parents):
            with suppress(OSError, ValueError):  # `max`, or not a group
                found = min(found, int((group / "memory.max").read_text(encoding="ascii")))
    return found


def foresee(config: Config, processes: int, here: int, mapped: float, place: Path) -> Forecast:
    """Train a few steps of every stage at full size, with the part of a batch that one process has.

    Args:
        config: of the full run, with an index.
        processes: of the run.
        here: of these on this machine.
        mapped: `mapped_mib` of a process like those of the run.
        place: where there is room for what a run saves.

    Raises:
        TlearnError: what the full run would raise.
    """
    with suppress(OSError):  # where memory runs out this process is to be killed, and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    with redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory(prefix=".trial-", dir=place) as folder:
        sizes = open_source(config).sizes
        measured = _measured(expand(config), Path(folder) / "run", sizes, processes)
    memory_mib = measured.memory_mib + max(0.0, mapped - mapped_mib())
    measured = dataclasses.replace(measured, memory_mib=memory_mib)
    device = None if use_cpu() else torch.accelerator.get_memory_info()[1] / 2**20
    memory = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _allowed_bytes()) / 2**20
    return forecast(measured, sizes, processes, Room(memory, device, here))


def _measured(config: Config, folder: Path, sizes: dict[str, int], processes: int) -> Measured:
    part = -(-config.batch.size // processes)
    trial = _short(config, part, sizes)
    began = time.perf_counter()
    result = train(trial, folder)
    wall_s = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    val, took, done = min(VAL_IMAGES, sizes["val"]), dict[str, list[tuple[int, float]]](), 0
    for row in rows:
        if row["kind"] == "step":
            took.setdefault(row["stage"], []).append((row["samples"] - done, 1 / row["images_per_s"]))
            done = row["samples"]
    whole = {row["stage"]: row["seconds"] for row in rows if row["kind"] == "stage"}
    val_s = statistics.median(whole[name] - sum(n * s for n, s in steps) for name, steps in took.items())
    recorded = load_config(folder / "config.yaml")
    views = _stored_views(
        config.model_copy(update={"data": config.data.model_copy(update={"image_size": result["image_size_px"]})})
    )
    costs = tuple(
        StageCost(stage.name, stage.epochs, _image_s(took[stage.name]), views[stage.name])
        for stage in config.stages or []
    )
    return Measured(
        stages=costs,
        val_image_s=val_s / val,
        loaded_per_s=_loaded_per_s(recorded, part),
        shared=min(1.0, config.data.workers / available_cores()) if use_cpu() else 0.0,
        once_s=max(0.0, wall_s - sum(whole.values()) - val_s),
        memory_mib=peak,
        device_mib=result["peak_device_mib"],
        image_size_px=result["image_size_px"],
    )


def _image_s(steps: list[tuple[int, float]]) -> float:
    """Seconds per image of a stage's steps, without the first one, from (images, seconds per image) of each."""
    return statistics.median(seconds for _, seconds in steps[1:] or steps)


def _short(config: Config, part: int, sizes: dict[str, int]) -> Config:
    """A few steps of every stage, and a few val images; nothing stored, nothing saved but at the end of a stage."""
    some: dict[str, Any] = {
        "max_train": min(sizes["train"], STEPS * part),
        "max_val": min(sizes["val"], VAL_IMAGES),
        "score_test": False,
    }
    update = {
        "data": config.data.model_copy(update=some),
        "batch": config.batch.model_copy(update={"size": part}),
        "stages": [
            stage.model_copy(update={"epochs": 1, "patience": None, "schedule": _FLAT}) for stage in config.stages or []
        ],
        "schedule": _FLAT,
        "patience": None,
        "features": config.features.model_copy(update={"cache": "off"}),
        "save_every": config.save_every.model_copy(update={"epochs": None, "steps": None, "minutes": None}),
        "tracking": config.tracking.model_copy(
            update={"wandb": config.tracking.wandb.model_copy(update={"mode": "disabled"})}
        ),
    }
    return config.model_copy(update=update)


_FLAT = Constant()


def _stored_views(config: Config) -> dict[str, int | None]:
    """Views of the stages whose frozen layers' outputs the full run stores."""
    source = open_source(config)
    model = _untrained(config, source)
    names, stored = [name for name, _ in model.net.named_parameters()], dict[str, int | None]()
    for stage in filled(config):
        model.set_trainable(resolve(stage, names, model.head, model.blocks))
        stored[stage.name] = stage.views if why_not(config, model, source, stage, None) is None else None
    return stored


def _untrained(config: Config, source: Source) -> Model:
    """The run's network but for its weights."""
    model = config.model.model_copy(update={"weights": "random"})
    texts = text_features(config.model.head, source.classes)
    return build_model(
        config.model_copy(update={"model": model}), len(source.classes), None, source.colours, texts=texts
    )


def _loaded_per_s(config: Config, part: int) -> float:
    """Images that the train loader gives while nothing else is done."""
    runtime, source = Runtime(), open_source(config)
    model = _untrained(config, source)
    stage = filled(config)[-1]
    p = model.sized(stage.image_size or model.preprocessing.size_px)
    loader = source.train_loader(p, Share(part), runtime.device, torch.float32, views=stage.views)
    n = max(STEPS, 2 * config.data.workers)
    began = time.perf_counter()
    with loader.steps(0, n) as steps:
        images = sum(len(batch.labels) for (batch,) in islice(steps, n))
    return images / (time.perf_counter() - began)
