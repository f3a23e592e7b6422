"""The process: accelerator, precision, stop flag, record of the environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather,
    gather_object,
    reduce,
)
from torch import nn

from tlearn import console
from tlearn.errors import TlearnError
from tlearn.rendezvous import check_rendezvous, job_id, resolved
from tlearn.signals import StopFlag, handled_by

T = TypeVar("T")

_RECORDED = ("tlearn", "torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "pillow", "safetensors")


class Runtime:
    """Where and how this process computes, alone or with others.

    Raises:
        TlearnError: an environment in which the processes would not find each other.
    """

    accelerator: Accelerator
    precision: str

    def __init__(self) -> None:
        os.environ.update(resolved(os.environ))
        check_rendezvous(os.environ)
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if not use_cpu() and here > torch.accelerator.device_count():
            raise TlearnError(
                f"{here} processes on a machine with {torch.accelerator.device_count()} devices; start one per device"
            )
        # while the processes look for each other nothing is under way, and no handler of ours could run; in a job
        # they wait for the end of it, or it would count as failed
        with nullcontext() if job_id(os.environ) else handled_by(signal.SIG_DFL):
            self.state = PartialState(cpu=use_cpu())
        asked = int(os.environ.get("WORLD_SIZE") or 1)
        if asked != self.world_size:
            raise TlearnError(
                f"the launcher started {asked} processes, but this one sees a world of {self.world_size}: every "
                "process would train alone. With accelerate use a file of launch/; on a machine without an accelerator "
                "distributed_type must be MULTI_GPU with use_cpu: false"
            )
        self.stop = StopFlag()
        console.configure(quiet=not self.is_main)

    def unsupported(self, precision: str) -> str | None:
        """Why the device cannot compute in this precision, or None."""
        if precision == "fp64" and self.device.type == "mps":
            return "not supported on mps; use fp32"
        if precision == "fp16" and self.device.type == "cpu":
            return "needs an accelerator; use bf16 or fp32 on a CPU"
        if precision == "bf16" and self.device.type == "cuda" and not cuda_has_bf16():
            return f"{torch.cuda.get_device_name(self.device)} does not have it; use fp16 or fp32"
        return None

    def set_precision(self, precision: str) -> None:
        """Compute in fp32, bf16, fp16 or fp64 from here on: one that is not `unsupported`."""
        # Accelerate keeps the precision of the first run of a process; a second run may want another
        AcceleratorState._reset_state()
        self.precision = precision
        self.accelerator = Accelerator(
            mixed_precision=precision if precision in ("bf16", "fp16") else "no",
            cpu=use_cpu(),
            # else a variable of the environment would divide every loss
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            # BatchNorm statistics are averaged; DDP would overwrite them with rank 0's in every forward
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )

    def prepare(self, shell: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Wrapped for this device, these processes and this precision."""
        with warnings.catch_warnings():
            # torch 2.14 renamed the option; Accelerate knows the old name only
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            wrapped: tuple[nn.Module, Any] = self.accelerator.prepare(shell, optimizer)
        return wrapped

    def scaler_state(self) -> dict[str, float]:
        """Of the loss scaler that fp16 needs; empty without one."""
        return dict(self.accelerator.scaler.state_dict()) if self.accelerator.scaler is not None else {}

    def load_scaler(self, state: Mapping[str, float]) -> None:
        """Go on with what `scaler_state` gave."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(dict(state))

    @property
    def device(self) -> torch.device:
        """Where the model and the batches are."""
        device: torch.device = self.state.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and images; under bf16 autocast both stay fp32."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of sums over many samples: float64 where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def rank(self) -> int:
        """Of this process, over all machines."""
        return int(self.state.process_index)

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return int(self.state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return reduce(values, "sum") if self.world_size > 1 else values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(n, ...) of every process -> (world size * n, ...), by rank; the same n everywhere."""
        return gather(values) if self.world_size > 1 else values

    def gather_lists(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one behind the other, by rank."""
        return list(gather_object(values)) if self.world_size > 1 else values

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank; also a TlearnError that it raises there."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except TlearnError as error:
                outcome[1] = error
        if self.world_size > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def wait(self) -> None:
        """Until every process is here."""
        self.state.wait_for_everyone()

    def fetch(self, values: torch.Tensor) -> Callable[[], list[float]]:
        """Start to copy a small tensor to the host; the function that is returned waits for it and gives the numbers.

        On CUDA `tolist` would wait for all that was launched since, so the copy is asynchronous, with an event.
        """
        if self.device.type != "cuda":
            return values.tolist
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def read() -> list[float]:
            arrived.synchronize()
            numbers: list[float] = host.tolist()
            return numbers

        return read

    def peak_device_mib(self) -> float | None:
        """The most that tensors of this process have filled of its accelerator's memory, MiB; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)

    def environment(self) -> dict[str, Any]:
        """environment.json: versions, machine, devices; no variables, no paths."""
        return {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {name: _version(name) for name in _RECORDED},
            "backend": self.state.backend,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device.type),
            "precision": self.precision,
            "world_size": self.world_size,
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }

    def start_row(self) -> dict[str, Any]:
        """For metrics.jsonl: when, where and as which job this start of the run began."""
        nodes = os.environ.get("SLURM_JOB_NODELIST") or platform.node()
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return {"kind": "start", "processes": self.world_size, "nodes": nodes, "job": job_id(os.environ), "time": now}


def leave() -> None:
    """Part from the other processes once all is done; after a failure it could wait for ranks that are gone."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def use_cpu() -> bool:
    """Whether to compute on the CPU: no accelerator is there, or accelerate was told not to use it."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return told or not torch.accelerator.is_available()


def cuda_has_bf16() -> bool:
    """In hardware."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
