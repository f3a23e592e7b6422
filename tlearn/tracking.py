"""Where metrics go: metrics.jsonl is the truth, W&B a copy of it. Rank 0 only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tlearn.config import Config
from tlearn.console import show

Row = dict[str, Any]


class Sink(Protocol):
    """Takes rows of metrics."""

    def log(self, row: Row) -> None:
        """Take a row."""

    def close(self) -> None:
        """Finish; nothing is logged after this."""


class JsonLines:
    """One JSON object a line. What is behind the first `size` bytes is dropped: a resumed run writes it again."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("ab")
        if self._file.tell() < size:
            show(f"WARNING: {path}: is shorter than when the run was saved; rows are missing")
        else:
            self._file.truncate(size)
            self._file.seek(size)

    def log(self, row: Row) -> None:
        """Append a line."""
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def written(self) -> int:
        """Bytes that are on the disk, whatever happens now."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandB:
    """Weights & Biases; offline where there is no key."""

    def __init__(self, config: Config, folder: Path, run_id: str | None) -> None:
        import wandb

        mode = config.tracking.wandb.mode
        if mode == "online" and os.environ.get("WANDB_MODE") in ("offline", "disabled"):
            mode = "offline"
        if mode == "online" and not wandb.login(prompt=False):
            show("W&B: no API key, recording offline (`wandb sync` uploads it later)")
            mode = "offline"
        self._teardown = wandb.teardown
        self._run: Any = wandb.init(
            project=config.tracking.wandb.project,
            dir=folder,
            mode=mode,
            id=run_id,
            resume="allow",
            name=folder.name,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("samples")
        self._run.define_metric("*", step_metric="samples")
        self.id: str = self._run.id

    def log(self, row: Row) -> None:
        """Send the numbers of a row, rates as `lr/MULTIPLIER`."""
        flat = {key: value for key, value in row.items() if isinstance(value, int | float)}
        flat |= {f"lr/{name}": value for name, value in row.get("lr", {}).items()}
        # W&B leaves out what a resumed run sends again, but not the mark of the start
        mark = row["kind"] == "start"
        self._try(lambda run: run.log(flat, step=max(row["step"], run.step) if mark else row["step"]))

    def close(self) -> None:
        """Finish the W&B run."""
        self._try(lambda run: run.finish())

    def _try(self, use: Callable[[Any], None]) -> None:
        """W&B's own process is gone, say (`scancel` signals every process of a job): the run goes on without it."""
        if self._run is None:
            return
        try:
            use(self._run)
        except Exception as error:  # whatever a client of a far server happens to raise
            self._run = None
            show(f"WARNING: W&B is lost ({type(error).__name__}: {error}); metrics.jsonl goes on")
            with suppress(Exception):  # else it complains once more at the end of the program
                self._teardown()


class Tracker:
    """The sinks of one run."""

    def __init__(self, config: Config, folder: Path, size: int, wandb_id: str | None, *, active: bool) -> None:
        self._sinks: list[Sink] = []
        self._lines: JsonLines | None = None
        self.wandb_id = wandb_id
        if not active:
            return
        self._lines = JsonLines(folder / "metrics.jsonl", size)
        self._sinks.append(self._lines)
        if config.tracking.wandb.mode != "disabled" and os.environ.get("WANDB_MODE") != "disabled":
            wandb = WandB(config, folder, wandb_id)
            self.wandb_id = wandb.id
            self._sinks.append(wandb)

    def log(self, row: Row) -> None:
        """Write one row: `kind`, `step` and measures."""
        for sink in self._sinks:
            sink.log(row)

    def written(self) -> int:
        """Length of metrics.jsonl, which a run that goes on from here cuts it to; 0 where it is not written."""
        return self._lines.written() if self._lines is not None else 0

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not KeyboardInterrupt:  # to finish may take long: W&B sends what is left
            self.close()

    def close(self) -> None:
        """Finish all sinks."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []
