"""From a config to a finished run: the straight line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tlearn import checkpoint
from tlearn.checkpoint import Progress
from tlearn.config import Config
from tlearn.console import show
from tlearn.data.loader import Loader, Share, eval_loader
from tlearn.data.prepare import open_or_prepare
from tlearn.data.shards import Index, Split
from tlearn.engine import Run, run_stage
from tlearn.errors import TlearnError
from tlearn.evaluate import evaluate
from tlearn.folder import Resume, RunFolder, new_path, write_json
from tlearn.models.backbones import full_name
from tlearn.models.build import Model, build_model
from tlearn.models.weights import check_weights
from tlearn.objectives import build_objective
from tlearn.runtime import Runtime, start
from tlearn.stages import expand, filled, resolve
from tlearn.tables import show_result, show_stages
from tlearn.tracking import Tracker


def train(config: Config, folder: str | Path | None = None, *, resume: Resume = "auto") -> dict[str, Any]:
    """Train, evaluate, write a run folder.

    Args:
        config: the run, from `load_config`.
        folder: where the run lives; default: `runs/<time>-<strategy>`.
        resume: auto: go on where the folder's checkpoints end, if there are any; must: fail if there are none;
            never: fail if the folder holds a run.

    Returns:
        What result.json holds.

    Raises:
        TlearnError: bad input or configuration; nothing was written.
        StoppedBySignalError: a signal came; everything is saved.
    """
    runtime = start(config.precision)
    _check_names(config)
    index = open_or_prepare(config.data.path)
    splits = _splits(index, config)
    share = _share(config, runtime)
    model = build_model(config, len(index.classes), runtime.dtype)
    config = _resolved(config, model, runtime)
    stages = filled(config)
    sizes = {name: parameter.numel() for name, parameter in model.net.named_parameters()}
    plan = [resolve(stage, list(sizes), model.head, model.blocks) for stage in stages]

    place = RunFolder(Path(folder) if folder is not None else new_path(config))
    restored = place.restore(config, index.fingerprint, resume)
    progress = restored.progress if restored else Progress(data_fingerprint=index.fingerprint)
    optimizer_state: Mapping[str, torch.Tensor] = restored.optimizer if restored else {}
    if restored:
        model.net.load_state_dict(restored.model)
    model.net.to(runtime.device)
    if runtime.is_main:
        place.open(config, runtime, model, index.classes)
    counts = torch.from_numpy(splits["train"].per_class(len(index.classes)))
    run = Run(
        config=config,
        runtime=runtime,
        folder=place,
        classes=index.classes,
        train_split=splits["train"],
        val_loader=_eval_loader(splits["val"], config, model, share, runtime),
        share=share,
        model=model,
        objective=build_objective(config.objective, model.net, counts).to(runtime.device),
        tracker=Tracker(config, place.path, progress.step, progress.wandb_id, active=runtime.is_main),
        progress=progress,
    )
    _introduce(run, index)
    show_stages(stages, plan, sizes)

    try:
        with runtime.catch_signals():
            for number, (stage, multipliers) in enumerate(zip(stages, plan, strict=True)):
                if number >= progress.stage:
                    first_epoch = sum(s.epochs for s in stages[:number])
                    optimizer_state = run_stage(run, stage, multipliers, first_epoch, optimizer_state)
        result = _result(run, index, splits)
    finally:
        run.tracker.close()
    if runtime.is_main:
        write_json(place.result, result)
    show_result(place.path, result)
    return result


def _check_names(config: Config) -> None:
    """What can be known to be wrong before a long `prepare` or download begins."""
    full_name(config.model.backbone)
    check_weights(config.model.weights)
    filled(config)


def _splits(index: Index, config: Config) -> dict[str, Split]:
    """The splits as the run uses them: capped, and large enough for one batch."""
    splits = dict(index.splits)
    for name, limit in (("train", config.data.max_train), ("val", config.data.max_val)):
        if name not in splits:
            raise TlearnError(f"{index.root}: has no {name} images; prepare the data again, with --val 0.2, say")
        if limit is not None:
            splits[name] = splits[name].balanced(limit, config.seed)
    if config.batch.size > (n := len(splits["train"])):
        raise TlearnError(f"batch.size = {config.batch.size}: there are only {n} train images; use batch.size={n}")
    return splits


def _share(config: Config, runtime: Runtime) -> Share:
    size, world_size = config.batch.size, runtime.world_size
    if size < world_size:
        raise TlearnError(f"batch.size = {size}: smaller than the {world_size} processes that share it")
    per_process = -(-size // world_size)
    return Share(size, runtime.rank, world_size, accumulate=-(-per_process // (config.batch.micro or per_process)))


def _resolved(config: Config, model: Model, runtime: Runtime) -> Config:
    """The config with every default that depends on model or machine filled in: what the run folder records."""
    return expand(
        config.model_copy(
            update={
                "data": config.data.model_copy(update={"image_size": model.preprocessing.size_px}),
                "model": config.model.model_copy(update={"backbone": model.backbone, "weights": model.weights}),
                "precision": runtime.precision,
            }
        )
    )


def _eval_loader(split: Split, config: Config, model: Model, share: Share, runtime: Runtime) -> Loader:
    return eval_loader(
        split, model.preprocessing, share, device=runtime.device, dtype=runtime.dtype, workers=config.data.workers
    )


def _introduce(run: Run, index: Index) -> None:
    if leaks := index.meta["leaks"]:
        show(f"WARNING: {leaks} leaks were found in the data; see {index.root / 'audit.json'}")
    counts = f"train {len(run.train_split):,}, val {run.val_loader.samples_per_epoch:,}"
    show(f"data      {run.config.data.path}: {len(index.classes)} classes, {counts}")
    show(f"model     {run.model.backbone}, weights {run.model.weights}, {run.model.preprocessing.size_px} px")
    where = f"{run.runtime.device.type}, {run.runtime.precision}, processes: {run.runtime.world_size}"
    show(f"compute   {where}, batch {run.config.batch.size} in {run.share.accumulate} parts each")
    resumed = f", resumed at step {run.progress.step:,}" if run.progress.step else ""
    show(f"run       {run.folder.path}{resumed}")


def _result(run: Run, index: Index, splits: Mapping[str, Split]) -> dict[str, Any]:
    """Reload the best weights and score val, and test where there is one."""
    state, best = checkpoint.load_best(run.folder.best)
    run.model.net.load_state_dict(state)
    progress, runtime, net = run.progress, run.runtime, run.model.net
    result = {"val": evaluate(runtime, net, run.val_loader, run.classes)}
    if "test" in splits:
        loader = _eval_loader(splits["test"], run.config, run.model, run.share, runtime)
        result["test"] = evaluate(runtime, net, loader, run.classes)
    return result | {
        "best": best,
        "image_size_px": run.model.preprocessing.size_px,
        "world_size": runtime.world_size,
        "steps": progress.step,
        "seconds": round(progress.seconds, 3),
        "train_images_per_s": round(progress.samples / progress.seconds, 2),
        "backbone": run.model.backbone,
        "weights": run.model.weights,
        "classes": list(run.classes),
        "data_fingerprint": index.fingerprint,
    }
