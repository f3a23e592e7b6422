"""The process: accelerator, precision, stop flag, record of the environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tlearn import console
from tlearn.errors import TlearnError

_RECORDED = ("tlearn", "torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "pillow", "safetensors")


class StopFlag:
    """Set by a signal, read at step boundaries. A SIGINT after that leaves at once, by KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def set(self, number: int, frame: FrameType | None) -> None:
        """The handler: no collective and no file access in here, only the flag."""
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Runtime:
    """Where and how this process computes."""

    def __init__(self, precision: str) -> None:
        # Accelerate keeps the precision of the first run of a process; a second run may want another
        AcceleratorState._reset_state()
        self.precision = _resolve(precision)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.precision == "bf16" else "no", cpu=not torch.accelerator.is_available()
        )
        self.stop = StopFlag()
        console.configure(quiet=not self.is_main)

    @property
    def device(self) -> torch.device:
        """Where the model and the batches are."""
        device: torch.device = self.accelerator.device
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
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        return self.accelerator.reduce(values, "sum") if self.world_size > 1 else values

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

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGUSR2 set the stop flag; the handlers of before come back at the end."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        # elsewhere (a notebook's worker thread, say) Python can set no handlers
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2) if in_main_thread else ()
        before = {number: signal.signal(number, self.stop.set) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def environment(self) -> dict[str, Any]:
        """environment.json: versions, machine, devices; no variables, no paths."""
        return {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {name: _version(name) for name in _RECORDED},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device.type),
            "precision": self.precision,
            "world_size": self.world_size,
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }


def _resolve(precision: str) -> str:
    if precision != "auto":
        return precision
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def start(precision: str) -> Runtime:
    """Start the process's accelerator.

    Raises:
        TlearnError: a precision that the device lacks.
    """
    runtime = Runtime(precision)
    if runtime.precision == "fp64" and runtime.device.type == "mps":
        raise TlearnError("precision: fp64 is not supported on mps; use fp32")
    return runtime
