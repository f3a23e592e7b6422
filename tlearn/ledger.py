"""The account of training steps: what they summed up to, read one step late so that the device never waits for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from tlearn.checkpoint import Progress
from tlearn.data.loader import Batch
from tlearn.data.order import mix_array
from tlearn.data.shards import UNLABELLED
from tlearn.errors import DivergedError
from tlearn.runtime import Runtime
from tlearn.saver import Saver
from tlearn.tracking import Row, Tracker

MAX_REJECTED = 20
"""So many steps in a row with a gradient that is not finite end the run."""


class StepSums(NamedTuple):
    """Of one step, over all processes."""

    loss: float
    correct: float
    rejected: float
    """Processes whose gradient norm was not finite: all or none."""
    stop: float
    """Processes that a signal asked to stop."""
    save: float
    """Not 0: a checkpoint is due by rank 0's clock."""


class _Pending(NamedTuple):
    row: Row
    read: Callable[[], list[float]]
    weight: float
    keys: list[torch.Tensor]


class Ledger:
    """Turns the sums of a step into a row of metrics.

    Args:
        runtime, tracker: of the run.
        weigh: labels of a batch -> what its loss sum is divided by.
        progress: counted up here.
        stage: its name.
        saver: is told how long steps take, and knows the newest checkpoint.
        audit: write the hash of every batch.
    """

    def __init__(
        self,
        runtime: Runtime,
        weigh: Callable[[torch.Tensor], float],
        tracker: Tracker,
        progress: Progress,
        stage: str,
        saver: Saver,
        *,
        audit: bool,
    ) -> None:
        self.runtime, self.weigh, self.tracker, self.progress = runtime, weigh, tracker, progress
        self.stage, self.saver, self.audit = stage, saver, audit
        self.stop = self.save_due = False
        self.note = ""
        self._pending: _Pending | None = None
        self._clock = time.perf_counter()

    def add(self, sums: torch.Tensor, micro_batches: list[Batch], epoch: int, rates: dict[str, float]) -> None:
        """Count a step that was just taken; an accelerator may still be busy with it, so the one before is settled.

        Args:
            sums: StepSums, (5,), on the device.
            micro_batches: of this rank.
            epoch: over all stages.
            rates: learning rate by multiplier.
        """
        self.settle()
        progress, labels = self.progress, micro_batches[0].global_labels
        progress.step += 1
        progress.stage_step += 1
        progress.samples += len(labels)
        row: Row = {
            "kind": "step",
            "stage": self.stage,
            "epoch": epoch,
            "step": progress.step,
            "samples": progress.samples,
            "n": len(labels),
            "labelled": int((labels != UNLABELLED).sum()),
            "lr": rates,
        }
        keys = [batch.keys for batch in micro_batches]
        if self.audit:
            row["batch_hash"] = _batch_hash(self.runtime, keys)
        self._pending = _Pending(row, self.runtime.fetch(sums), self.weigh(labels), keys)
        if self.runtime.device.type == "cpu":  # it has waited already
            self.settle()

    def settle(self) -> None:
        """Read the sums of the last step and log it.

        Raises:
            DivergedError: too many steps in a row had a gradient that is not finite.
        """
        if self._pending is None:
            return
        (row, read, weight, keys), self._pending = self._pending, None
        sums = StepSums(*read())
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        progress, n, labelled = self.progress, row.pop("n"), row.pop("labelled")
        progress.seconds += seconds
        self.saver.step_took(seconds)
        row["train/loss"] = sums.loss / weight if math.isfinite(sums.loss) else None
        row["images_per_s"] = round(n / seconds, 2)
        if sums.rejected:
            progress.rejected += 1
            progress.rejected_in_all += 1
            row["rejected"] = self.runtime.gather_lists(
                [f"{key & (1 << 64) - 1:016x}" for key in torch.cat(keys).tolist()]
            )
        else:
            progress.rejected = 0
            for name, value in {"loss": sums.loss, "weight": weight, "correct": sums.correct, "n": labelled}.items():
                progress.epoch_sums[name] = progress.epoch_sums.get(name, 0.0) + value
        self.stop, self.save_due = sums.stop > 0, sums.save > 0
        self.note = f"loss {sums.loss / weight:.3f}"
        self.tracker.log(row)
        if progress.rejected >= MAX_REJECTED:
            cause = "the gradient overflowed" if math.isfinite(sums.loss) else "the loss is not finite"
            rate = max(row["lr"].values())
            advice = f"a rate of {rate / 10:.1g} instead of {rate:.1g} (optimizer.lr of this stage, in a new --run)"
            newest = self.runtime.on_main(self.saver.wait) or "none yet"
            raise DivergedError(
                f"stage {self.stage}: {progress.rejected} steps in a row were skipped, because {cause}; their images "
                f"are named in metrics.jsonl. The last good checkpoint: {newest}. "
                f"Try {advice}, or precision=fp32"
            )

    def pause(self) -> None:
        """Leave the time since the last step out of the speed (evaluation, saving)."""
        self._clock = time.perf_counter()


def _batch_hash(runtime: Runtime, keys: list[torch.Tensor]) -> str:
    """An order-free hash of the sample keys of the global batch: a sum over all ranks."""
    hashes = mix_array(0, torch.cat(keys).numpy().view(np.uint64))
    total = torch.tensor(int(hashes.sum(dtype=np.uint64).view(np.int64)), device=runtime.device)
    return f"{int(runtime.sum(total)) & (1 << 64) - 1:016x}"
