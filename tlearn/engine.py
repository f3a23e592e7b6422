"""The one loop. It trains a stage, whatever the strategy and the objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tlearn import checkpoint
from tlearn.checkpoint import Progress
from tlearn.config import Config, SaveEvery, Stage
from tlearn.console import progress_bar, show
from tlearn.data.loader import Batch, Loader, Share, train_loader
from tlearn.data.order import mix, mix_array
from tlearn.data.shards import Split
from tlearn.errors import DivergedError, StoppedBySignalError, TlearnError
from tlearn.evaluate import evaluate
from tlearn.folder import RunFolder
from tlearn.models.build import Model
from tlearn.objectives import LossSum, Objective
from tlearn.optim import build_optimizer, load_named_state, lr_factor, named_state, set_learning_rates
from tlearn.runtime import Runtime
from tlearn.tracking import Row, Tracker

MAX_REJECTED = 20
"""So many steps in a row with a gradient that is not finite end the run."""

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Run:
    """What a training run is made of."""

    config: Config
    runtime: Runtime
    folder: RunFolder
    classes: tuple[str, ...]
    train_split: Split
    val_loader: Loader
    share: Share
    model: Model
    objective: Objective
    tracker: Tracker
    progress: Progress


class Shell(nn.Module):
    """A fresh thin wrapper per stage: what is prepared (DDP, autocast) is this, so nothing is wrapped twice."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> LossSum:
        """Loss sums of a micro-batch."""
        result: LossSum = self.objective(batch)
        return result


def run_stage(
    run: Run, stage: Stage, multipliers: Mapping[str, float], first_epoch: int, optimizer_state: Tensors
) -> dict[str, torch.Tensor]:
    """Train one stage from `run.progress` to its end.

    Args:
        run: model, data and progress; changed in place.
        stage: with optimizer, schedule and image size filled in.
        multipliers: learning-rate multiplier of every parameter, 0 where it is frozen.
        first_epoch: epochs of the stages before.
        optimizer_state: by parameter name, of the stage before or of a checkpoint.

    Returns:
        The optimizer's state by parameter name, for the next stage.

    Raises:
        StoppedBySignalError: after everything was saved.
        TlearnError: a trainable parameter without gradient.
        DivergedError: gradients that stay non-finite.
    """
    assert stage.optimizer is not None
    assert stage.schedule is not None
    config, runtime, model, progress = run.config, run.runtime, run.model, run.progress
    model.set_trainable(multipliers)
    optimizer = build_optimizer(stage.optimizer, model.net, multipliers)
    load_named_state(optimizer, optimizer_state)
    shell, stepper = runtime.accelerator.prepare(Shell(run.objective), optimizer)
    loader = _stage_loader(run, stage)
    total = stage.epochs * loader.steps_per_epoch
    ledger = _Ledger(run, stage)
    started = time.perf_counter()

    with (
        loader.steps(progress.stage_step, total, first_epoch) as steps,
        progress_bar(stage.name, total, progress.stage_step) as advance,
    ):
        model.train()
        for micro_batches in steps:
            epoch = progress.stage_step / loader.steps_per_epoch
            lr = stage.optimizer.lr * lr_factor(stage.schedule, epoch, stage.epochs)
            rates = set_learning_rates(optimizer, lr)
            sums = _train_step(run, shell, optimizer, stepper, micro_batches)
            ledger.add(sums, micro_batches, first_epoch + int(epoch), rates)
            advance(note=ledger.note)
            if progress.stage_step % loader.steps_per_epoch == 0:
                _finish_epoch(run, ledger, first_epoch + int(epoch))
            if ledger.stop or _save_is_due(config.save_every, progress, loader.steps_per_epoch, total):
                ledger.settle()
                _save(run, optimizer)
                ledger.pause()
            if ledger.stop:
                raise StoppedBySignalError(
                    f"stopped by {runtime.stop.signal or 'another process'}, everything is saved; "
                    f"go on with: tlearn train --run {run.folder.path}"
                )
    run.tracker.log(
        {
            "kind": "stage",
            "stage": stage.name,
            "epoch": first_epoch + stage.epochs - 1,
            "step": progress.step,
            "samples": progress.samples,
            "trainable_parameters": sum(p.numel() for p in model.net.parameters() if p.requires_grad),
            "seconds": round(time.perf_counter() - started, 3),
        }
    )
    progress.stage, progress.stage_step = progress.stage + 1, 0
    _save(run, optimizer)
    runtime.accelerator.free_memory()
    return named_state(optimizer)


def _stage_loader(run: Run, stage: Stage) -> Loader:
    assert stage.image_size is not None
    config, runtime = run.config, run.runtime
    return train_loader(
        run.train_split,
        replace(run.model.preprocessing, size_px=stage.image_size),
        config.data.augment,
        run.share,
        seed=config.seed,
        device=runtime.device,
        dtype=runtime.dtype,
        workers=config.data.workers,
    )


def _train_step(
    run: Run, shell: nn.Module, optimizer: torch.optim.Optimizer, stepper: Any, micro_batches: list[Batch]
) -> torch.Tensor:
    """One optimizer step. Returns sums over all processes, not yet read: loss, correct, rejected, stop flags."""
    runtime, progress = run.runtime, run.progress
    accelerator = runtime.accelerator
    weight = run.objective.weight(micro_batches[0].global_labels)
    # a rejected step must not leave its mark on BatchNorm either
    statistics = [buffer.clone() for buffer in run.model.moving_statistics]
    sums = torch.zeros(4, dtype=runtime.sum_dtype, device=runtime.device)
    for i, batch in enumerate(micro_batches):
        # for dropout: a function of the position, so that no generator's state has to be saved
        torch.manual_seed(mix(run.config.seed, progress.step, i, runtime.rank))
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(shell):
            out: LossSum = shell(batch)
            # DDP takes the mean over processes: times their number it is the sum
            accelerator.backward(out.loss * (runtime.world_size / weight))
        sums[0] += out.loss.detach()
        sums[1] += out.correct
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if progress.stage_step == 0:
        _check_gradients(optimizer)
    norm = accelerator.clip_grad_norm_(parameters, run.config.clip_norm or float("inf"))
    # fused optimizers skip a step where found_inf is 1, without a synchronisation; the norm is equal on all ranks
    rejected = (~torch.isfinite(norm)).float().reshape(())
    optimizer.found_inf = rejected  # type: ignore[attr-defined]
    stepper.step()
    stepper.zero_grad()
    for buffer, before in zip(run.model.moving_statistics, statistics, strict=True):
        buffer.copy_(torch.where(rejected > 0, before, buffer))
    sums[2] = rejected / runtime.world_size
    sums[3] = float(bool(runtime.stop))
    return runtime.sum(sums)


def _check_gradients(optimizer: torch.optim.Optimizer) -> None:
    missing = [
        name
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter.grad is None
    ]
    if missing:
        raise TlearnError(
            f"stages: {len(missing)} trainable parameters get no gradient ({', '.join(missing[:3])}): the model "
            "does not use them; freeze them with a rule of multiplier 0"
        )


class _Ledger:
    """Turns the sums of a step into a row of metrics, one step late, so that the device never waits for the log."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run, self.stage = run, stage
        self.stop = False
        self.note = ""
        self._pending: tuple[Row, Callable[[], list[float]], float, int] | None = None
        self._clock = time.perf_counter()

    def add(self, sums: torch.Tensor, micro_batches: list[Batch], epoch: int, rates: dict[str, float]) -> None:
        """Count a step that was just taken; settles the one before."""
        self.settle()
        progress, labels = self.run.progress, micro_batches[0].global_labels
        progress.step += 1
        progress.stage_step += 1
        progress.samples += len(labels)
        row: Row = {
            "kind": "step",
            "stage": self.stage.name,
            "epoch": epoch,
            "step": progress.step,
            "samples": progress.samples,
            "lr": rates,
        }
        if self.run.config.run.audit:
            row["batch_hash"] = _batch_hash(self.run.runtime, micro_batches)
        self._pending = row, self.run.runtime.fetch(sums), self.run.objective.weight(labels), len(labels)

    def settle(self) -> None:
        """Read the sums of the last step and log it."""
        if self._pending is None:
            return
        (row, read, weight, n), self._pending = self._pending, None
        loss, correct, rejected, stop = read()
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        progress = self.run.progress
        progress.seconds += seconds
        row |= {"train/loss": loss / weight if math.isfinite(loss) else None, "images_per_s": round(n / seconds, 2)}
        if rejected:
            row["rejected"] = True
            progress.rejected += 1
        else:
            progress.rejected = 0
            for name, value in {"loss": loss, "weight": weight, "correct": correct, "n": n}.items():
                progress.epoch_sums[name] = progress.epoch_sums.get(name, 0.0) + value
        self.stop = stop > 0
        self.note = f"loss {loss / weight:.3f}"
        self.run.tracker.log(row)
        if progress.rejected >= MAX_REJECTED:
            raise DivergedError(
                f"stage {self.stage.name}: {progress.rejected} steps in a row had a gradient that is not finite; "
                "try a lower optimizer.lr, or precision=fp32. The last good checkpoint is kept"
            )

    def pause(self) -> None:
        """Leave the time since the last step out of the speed (evaluation, saving)."""
        self._clock = time.perf_counter()


def _batch_hash(runtime: Runtime, micro_batches: list[Batch]) -> str:
    """An order-free hash of the sample keys of the global batch."""
    total = torch.zeros((), dtype=torch.int64, device=runtime.device)
    for batch in micro_batches:
        hashes = mix_array(0, batch.keys.numpy().view(np.uint64))
        total += int(hashes.sum(dtype=np.uint64).view(np.int64))
    return f"{int(runtime.sum(total)) & (1 << 64) - 1:016x}"


def _finish_epoch(run: Run, ledger: _Ledger, epoch: int) -> None:
    """Evaluate, log the epoch, keep the best weights; `epoch` counts over all stages."""
    ledger.settle()
    progress, size_px, stage = run.progress, run.model.preprocessing.size_px, ledger.stage
    val = evaluate(run.runtime, run.model.net, run.val_loader, run.classes)
    run.model.train()
    sums, progress.epoch_sums = progress.epoch_sums, {}
    loss = sums["loss"] / sums["weight"] if sums else None  # none: every step was rejected
    top1 = sums["correct"] / sums["n"] if sums else None
    place = {"stage": stage.name, "epoch": epoch, "step": progress.step}
    measures = {
        "train/loss": loss,
        "train/top1": top1,
        f"val/top1@{size_px}": val["top1"],
        f"val/loss@{size_px}": val["loss"],
    }
    run.tracker.log({"kind": "epoch", **place, "samples": progress.samples, **measures})
    show(
        f"epoch {epoch + 1:3d}  {stage.name:12s}  train loss {_number(loss)}  top-1 {top1 or 0:6.1%}"
        f"  |  val@{size_px} loss {_number(val['loss'])}  top-1 {val['top1']:6.1%}"
    )
    if not progress.best or val["top1"] > progress.best["top1"]:
        progress.best = {**place, "top1": val["top1"], "loss": val["loss"], "selected_on": "val"}
        if run.runtime.is_main:
            checkpoint.save_best(run.folder.best, run.model.net.state_dict(), progress.best)
    ledger.pause()


def _number(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _save_is_due(every: SaveEvery, progress: Progress, steps_per_epoch: int, total: int) -> bool:
    """At a step boundary inside the stage; its end is saved as the beginning of the next one."""
    if progress.stage_step == total:
        return False
    epochs, into_epoch = divmod(progress.stage_step, steps_per_epoch)
    if into_epoch == 0 and epochs % every.epochs == 0:
        return True
    return every.steps is not None and progress.step % every.steps == 0


def _save(run: Run, optimizer: torch.optim.Optimizer) -> None:
    if run.runtime.is_main:
        run.progress.wandb_id = run.tracker.wandb_id
        checkpoint.save(run.folder.checkpoints, run.model.net.state_dict(), named_state(optimizer), run.progress)
    run.runtime.accelerator.wait_for_everyone()
