"""The copies of the model on all ranks: wrapped, warmed up, and proved equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from tlearn.data.loader import Batch
from tlearn.errors import NoGradientError, RankFailedError, TlearnError
from tlearn.optim import state_to_come
from tlearn.runtime import Runtime

_CHUNK = 2**22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(runtime: Runtime, net: nn.Module, when: str) -> None:
    """Compare a hash of every parameter and buffer over all ranks.

    Raises:
        RankFailedError: on every rank, with the names of the tensors that differ.
    """
    if runtime.world_size == 1:
        return
    tensors = net.state_dict()
    mine = torch.stack([_hash(tensor) for tensor in tensors.values()]).to(runtime.device)
    everyones = runtime.gather(mine).view(runtime.world_size, len(tensors))
    differs = (everyones != everyones[0]).any(dim=0).tolist()
    names = [name for name, wrong in zip(tensors, differs, strict=True) if wrong]
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise RankFailedError(f"{when} the ranks no longer hold the same model; these tensors differ: {shown}")


def _hash(tensor: torch.Tensor) -> torch.Tensor:
    """A number, int64, that changes with any bit and with the order of elements; computed on the tensor's device."""
    bits = tensor.detach().contiguous().view(-1)
    bits = bits.view(_BITS[bits.element_size()])
    # odd multipliers are invertible modulo 2^64: no single change can cancel out
    odd = 2 * torch.arange(min(len(bits), _CHUNK), device=bits.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    parts = bits.split(_CHUNK)  # type: ignore[no-untyped-call]
    for part in parts:  # in parts: eight bytes an element are much for a large layer
        total = total * 0x5851F42D4C957F2D + (part.to(torch.int64) * odd[: len(part)]).sum()
    return total


def average_statistics(runtime: Runtime, buffers: Sequence[torch.Tensor]) -> None:
    """Make running means and variances the mean over all ranks, each of which saw its own part of the batch.

    Done in every step: the average commutes with BatchNorm's moving average, so that evaluation, checkpoint and
    comparison find the same statistics whenever they come.
    """
    moving = [buffer for buffer in buffers if buffer.is_floating_point()]
    if runtime.world_size == 1 or not moving:
        return
    means = runtime.sum(torch.cat([buffer.view(-1) for buffer in moving])) / runtime.world_size
    parts = means.split([buffer.numel() for buffer in moving])  # type: ignore[no-untyped-call]
    for buffer, mean in zip(moving, parts, strict=True):
        buffer.copy_(mean.view_as(buffer))


def warm_up(runtime: Runtime, shell: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One forward and backward with a loss of zero after every wrap.

    DDP orders its buckets anew after the first backward, which changes the rounding of sums over three or more ranks:
    afterwards a resumed stage computes what an uninterrupted one does, bit for bit. It also shows which parameters the
    model does not use.

    Args:
        shell: prepared, its model in eval mode.
        batch: of one sample.

    Raises:
        NoGradientError: trainable parameters without gradient.
    """
    runtime.accelerator.backward(shell(batch).loss * 0)
    missing = [
        name
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter.grad is None
    ]
    if missing:
        raise NoGradientError(
            f"stages: {len(missing)} trainable parameters get no gradient ({', '.join(missing[:3])}): the model "
            "does not use them; freeze them with a rule of multiplier 0"
        )
    optimizer.zero_grad()


def find_micro_batch(
    runtime: Runtime, shell: nn.Module, optimizer: torch.optim.Optimizer, largest: int, blank: Callable[[int], Batch]
) -> int:
    """The largest micro-batch, halving from `largest`, of which a step fits the memory of every process.

    Raises:
        TlearnError: not even one image fits.
    """
    size = largest
    while size:
        failed = float(not _fits(runtime, shell, optimizer, partial(blank, size)))
        if runtime.sum(torch.tensor(failed, device=runtime.device)) == 0:
            return size
        size //= 2
    raise TlearnError("batch.find: not even one image fits the memory; use a smaller data.image_size")


def _fits(runtime: Runtime, shell: nn.Module, optimizer: torch.optim.Optimizer, blank: Callable[[], Batch]) -> bool:
    """Try a step beside the optimizer's state to come, without communication: another rank may run out of memory."""
    state: list[torch.Tensor] = []
    try:
        state += [torch.zeros_like(parameter) for parameter in state_to_come(optimizer)]
        with runtime.accelerator.no_sync(shell):
            runtime.accelerator.backward(shell(blank()).loss * 0)
    except RuntimeError as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
        if not out_of_memory and "CUBLAS_STATUS_ALLOC_FAILED" not in str(error):
            raise
        return False
    finally:
        optimizer.zero_grad()
        state.clear()
        if runtime.device.type != "cpu":
            torch.accelerator.empty_cache()
    return True


def blank_batch(runtime: Runtime, n: int, size_px: int) -> Batch:
    """`n` grey images of class 0."""
    images = torch.zeros(n, 3, size_px, size_px, dtype=runtime.dtype, device=runtime.device)
    labels = torch.zeros(n, dtype=torch.int64)
    return Batch(images.to(memory_format=torch.channels_last), labels.to(runtime.device), labels, labels)
