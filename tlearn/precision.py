"""Which precision `precision: auto` means: a property of the device, measured where it depends on the model."""

from __future__ import annotations

import copy
import json
import statistics
import time

import torch
from torch import nn

from tlearn.files import cache_folder, write_json
from tlearn.models.build import Model
from tlearn.runtime import cuda_has_bf16

WORTH_IT = 1.2
"""bf16 has to be this many times as fast as fp32 on a CPU: it costs accuracy of the sums."""
_BATCH_SIZE, _ROUNDS = 8, 3

Record = dict[str, float]


def choose_precision(wanted: str, device: torch.device, model: Model) -> tuple[str, Record]:
    """The precision, and what was measured to choose it (empty if nothing was). Rank 0 decides for all.

    On CUDA `auto` is bf16 where the device has it, on other accelerators fp32. On a CPU with bf16 instructions a few
    training steps of this model are timed, once per model, size and machine.
    """
    if wanted != "auto":
        return wanted, {}
    if device.type == "cuda":
        return ("bf16" if cuda_has_bf16() else "fp32"), {}
    if device.type != "cpu" or not _cpu_has_bf16():
        return "fp32", {}
    record = _measured(model)
    return ("bf16" if record["fp32_ms"] > WORTH_IT * record["bf16_ms"] else "fp32"), record


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _measured(model: Model) -> Record:
    """Milliseconds per training step, from the cache of this machine or now."""
    cpu = torch.cpu.get_capabilities().get("cpu_name", "")
    threads, size_px = torch.get_num_threads(), model.preprocessing.size_px
    key = f"{model.backbone} {size_px} px, torch {torch.__version__}, {cpu}, threads: {threads}"
    cache = cache_folder() / "precision.json"
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = _time_steps(model.net, size_px)
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, known)
    record: Record = known[key]
    return record


def _time_steps(net: nn.Module, size_px: int) -> Record:
    """Forward and backward of a copy that trains in full, both precisions in turn; the medians."""
    net = copy.deepcopy(net).requires_grad_(True)
    net.train()
    images = torch.randn(_BATCH_SIZE, 3, size_px, size_px).to(memory_format=torch.channels_last)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for round_ in range(_ROUNDS + 1):
        for dtype, times in seconds.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = net(images).float().square().mean()
            loss.backward()
            if round_:  # the first one allocates
                times.append(time.perf_counter() - start)
    return {
        f"{name}_ms": round(1000 * statistics.median(seconds[dtype]), 2)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
