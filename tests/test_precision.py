"""`precision: auto` is a property of the device, measured once where it depends on the model, and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tlearn import precision
from tlearn.config import Config
from tlearn.errors import TlearnError
from tlearn.models.build import build_model
from tlearn.precision import choose_precision
from tlearn.run import train

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "precision.json"


def timed(monkeypatch: pytest.MonkeyPatch, fp32_ms: float, bf16_ms: float) -> list[int]:
    """As if steps took that long; returns the sizes that were timed."""
    sizes: list[int] = []

    def measure(net: Any, size_px: int) -> dict[str, float]:
        sizes.append(size_px)
        return {"fp32_ms": fp32_ms, "bf16_ms": bf16_ms}

    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(precision, "_time_steps", measure)
    return sizes


@pytest.mark.parametrize(("bf16_ms", "chosen"), [(4.0, "bf16"), (8.0, "bf16"), (9.0, "fp32"), (20.0, "fp32")])
def test_auto_on_a_cpu_is_bf16_where_it_is_worth_it(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, bf16_ms: float, chosen: str
) -> None:
    timed(monkeypatch, 10.0, bf16_ms)
    record = {"fp32_ms": 10.0, "bf16_ms": bf16_ms}
    assert choose_precision("auto", CPU, build_model(tiny(), 10)) == (chosen, record)


def test_a_model_is_measured_once_a_size_and_machine(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    sizes = timed(monkeypatch, 10.0, 1.0)
    for size_px in (32, 32, 48, 32):
        choose_precision("auto", CPU, build_model(tiny(f"data.image_size={size_px}"), 10))
    assert sizes == [32, 48]
    assert len(json.loads(cache.read_text())) == 2
    cache.write_text("{torn")
    choose_precision("auto", CPU, build_model(tiny(), 10))
    assert sizes == [32, 48, 32]


def test_auto_without_bf16_instructions_is_fp32_and_measures_nothing(
    tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = timed(monkeypatch, 10.0, 1.0)
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    assert choose_precision("auto", CPU, build_model(tiny(), 10)) == ("fp32", {})
    assert sizes == []


def test_the_measurement_is_of_both_and_leaves_the_model_alone(tiny: MakeConfig) -> None:
    model = build_model(tiny("model.batch_norm=train"), 10)
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    record = precision._time_steps(model.net, 32)
    assert record.keys() == {"fp32_ms", "bf16_ms"}
    assert all(value > 0 for value in record.values())
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_what_was_measured_is_recorded_and_kept_when_the_run_goes_on(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    timed(monkeypatch, 10.0, 1.0)
    config = tiny("precision=auto", "epochs=1")
    train(config, tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["precision"] == "bf16"
    assert environment["precision_measured"] == {"fp32_ms": 10.0, "bf16_ms": 1.0}
    cache.unlink()
    timed(monkeypatch, 1.0, 10.0)  # another machine
    train(config, tmp_path / "run")
    assert "precision: bf16" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("precision=fp16", "precision = 'fp16': needs an accelerator; use bf16 or fp32 on a CPU"),
        ("model.sync_batchnorm=true", "model.sync_batchnorm: needs an accelerator"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_before_any_work(
    tiny: MakeConfig, tmp_path: Path, option: str, message: str
) -> None:
    with pytest.raises(TlearnError, match=message):
        train(tiny(option, "data.path=/nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
