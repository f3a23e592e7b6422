"""Batches of two domains: the images of one with their labels, behind them as many of another one without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import torch

from tlearn.data.loader import Batch, Steps
from tlearn.data.shards import UNLABELLED


class PairedSteps:
    """The steps of `source`, each with one of `target` behind it, which begins anew when it has had all its images."""

    def __init__(self, source: Steps, target: Steps) -> None:
        self.source, self.target = source, target
        self.steps_per_epoch, self.samples_per_epoch = source.steps_per_epoch, source.samples_per_epoch

    @contextmanager
    def steps(self, first: int, last: int, first_epoch: int = 0) -> Iterator[Iterator[list[Batch]]]:
        """See `Steps`."""
        before = first_epoch * self.steps_per_epoch
        with (
            self.source.steps(first, last, first_epoch) as labelled,
            self.target.steps(before + first, before + last) as others,
        ):
            yield ([_joined(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(labelled, others, strict=True))

    def close(self) -> None:
        """See `Steps`."""
        with closing(self.source), closing(self.target):
            pass


def _joined(a: Batch, b: Batch) -> Batch:
    return Batch(
        torch.cat([a.images, b.images]).contiguous(memory_format=torch.channels_last),
        torch.cat([a.labels, torch.full_like(b.labels, UNLABELLED)]),
        torch.cat([a.keys, b.keys]),
        torch.cat([a.global_labels, torch.full_like(b.global_labels, UNLABELLED)]),
    )
