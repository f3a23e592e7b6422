"""Learning rates follow torch's own schedules at any number of steps; optimizers go on bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from tlearn.config import SGD, Adam, AdamW, Constant, Cosine, CosineWarmRestarts, Step
from tlearn.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    load_named_state,
    lr_factor,
    named_state,
    set_learning_rates,
)

MakeScheduler = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]

CONFIGS: dict[str, OptimizerConfig] = {
    "adam": Adam(lr=0.02, weight_decay=0.1),
    "adamw": AdamW(lr=0.02, weight_decay=0.1),
    "sgd": SGD(lr=0.02, momentum=0.9, weight_decay=0.1),
    "plain_sgd": SGD(lr=0.02, momentum=0.0),
}


def torch_factors(make: MakeScheduler, steps: int, stride: float = 1.0) -> list[float]:
    """What torch gives for `steps` optimizer steps; `stride` is the time from one to the next."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1, dtype=torch.float64))], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for step in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if stride == 1.0:
            scheduler.step()
        else:
            scheduler.step((step + 1) * stride)
    return factors


def our_factors(schedule: ScheduleConfig, steps_per_epoch: int, epochs: int) -> list[float]:
    return [lr_factor(schedule, k / steps_per_epoch, epochs) for k in range(epochs * steps_per_epoch)]


@pytest.mark.parametrize("steps_per_epoch", [1, 4, 10])
@pytest.mark.parametrize("t_mult", [1, 2, 3])
@pytest.mark.parametrize("t_0", [1, 2, 3])
def test_warm_restarts_in_whole_epochs_are_those_of_torch(t_0: int, t_mult: int, steps_per_epoch: int) -> None:
    schedule = CosineWarmRestarts(t_0=t_0, t_mult=t_mult, min_lr_ratio=0.05)
    expected = torch_factors(
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=t_0 * steps_per_epoch, T_mult=t_mult, eta_min=0.05),
        9 * steps_per_epoch,
    )

    assert our_factors(schedule, steps_per_epoch, 9) == pytest.approx(expected, abs=1e-7)
    assert expected.count(1.0) >= 2


@pytest.mark.parametrize("t_mult", [1, 2])
@pytest.mark.parametrize(("t_0", "steps_per_epoch"), [(0.5, 6), (0.5, 2), (1.5, 4), (0.1, 10), (0.3, 10), (1 / 3, 3)])
def test_warm_restarts_of_a_part_of_an_epoch_are_those_of_torch_in_steps(
    t_0: float, steps_per_epoch: int, t_mult: int
) -> None:
    schedule = CosineWarmRestarts(t_0=t_0, t_mult=t_mult)
    first_cycle = round(t_0 * steps_per_epoch)
    expected = torch_factors(
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=first_cycle, T_mult=t_mult), 3 * steps_per_epoch
    )

    assert our_factors(schedule, steps_per_epoch, 3) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps_per_epoch", [3, 7, 13, 1000])
def test_torch_fed_with_fractions_of_epochs_agrees(steps_per_epoch: int) -> None:
    epochs = 3
    expected = torch_factors(
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=1, T_mult=2),
        epochs * steps_per_epoch,
        stride=1 / steps_per_epoch,
    )
    ours = our_factors(CosineWarmRestarts(t_0=1.0, t_mult=2), steps_per_epoch, epochs)

    assert ours == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("t_mult", [1, 2, 3])
@pytest.mark.parametrize("steps_per_epoch", [3, 7, 10, 13, 49, 999])
def test_every_restart_falls_on_its_step(steps_per_epoch: int, t_mult: int) -> None:
    schedule = CosineWarmRestarts(t_0=1.0, t_mult=t_mult)
    starts = [sum(t_mult**i for i in range(n)) for n in range(5)]

    for start in starts:
        assert lr_factor(schedule, start * steps_per_epoch / steps_per_epoch, 200) == pytest.approx(1.0, abs=1e-6)
        k = start * steps_per_epoch
        assert lr_factor(schedule, k / steps_per_epoch, 200) > lr_factor(schedule, (k + 1) / steps_per_epoch, 200)
        if start:
            assert lr_factor(schedule, (k - 1) / steps_per_epoch, 200) < 0.5


@pytest.mark.parametrize(("share", "cycles"), [("100%", 1), ("50%", 2), ("25%", 4), ("12.5%", 8)])
def test_a_first_cycle_can_be_a_share_of_the_stage(share: str, cycles: int) -> None:
    epochs, steps_per_epoch = 8, 6
    schedule = CosineWarmRestarts(t_0=share, t_mult=1)
    cycle = epochs * steps_per_epoch // cycles
    assert our_factors(schedule, steps_per_epoch, epochs) == pytest.approx(
        torch_factors(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=cycle), epochs * steps_per_epoch),
        abs=1e-7,
    )


@pytest.mark.parametrize("steps_per_epoch", [1, 4, 7])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_torchs(floor: float, steps_per_epoch: int) -> None:
    steps = 3 * steps_per_epoch
    expected = torch_factors(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=steps, eta_min=floor), steps)

    assert our_factors(Cosine(min_lr_ratio=floor), steps_per_epoch, 3) == pytest.approx(expected, abs=1e-9)
    assert lr_factor(Cosine(min_lr_ratio=floor), 3.0, 3) == pytest.approx(floor)


@pytest.mark.parametrize(("step_epochs", "steps_per_epoch"), [(1.0, 4), (2.0, 3), (0.5, 6), (0.1, 10), (0.3, 10)])
def test_step_is_torchs(step_epochs: float, steps_per_epoch: int) -> None:
    every = round(step_epochs * steps_per_epoch)
    expected = torch_factors(lambda o: lr_scheduler.StepLR(o, every, gamma=0.3), 3 * steps_per_epoch)
    ours = our_factors(Step(step_epochs=step_epochs, gamma=0.3), steps_per_epoch, 3)

    assert ours == pytest.approx(expected, rel=1e-9)


def test_constant_stays() -> None:
    assert set(our_factors(Constant(), 7, 3)) == {1.0}


@pytest.mark.parametrize("schedule_type", [Constant, Step, Cosine, CosineWarmRestarts])
@pytest.mark.parametrize("warmup", [0.5, 1.0, 2.0])
def test_warm_up_rises_linearly_and_then_the_schedule_begins(
    schedule_type: type[ScheduleConfig], warmup: float
) -> None:
    schedule = schedule_type(warmup_epochs=warmup)
    rising = [lr_factor(schedule, k / 8, 4) for k in range(int(warmup * 8))]
    without, length = schedule_type(), 4 - warmup

    assert rising == pytest.approx([k / 8 / warmup for k in range(len(rising))])
    assert lr_factor(schedule, warmup, 4) == pytest.approx(1.0)
    if length.is_integer():
        for t in (0.25, 0.5, 1.0, 1.5):
            expected = lr_factor(without, t, int(length))
            assert lr_factor(schedule, warmup + t, 4) == pytest.approx(expected, abs=1e-6)


schedules = st.one_of(
    st.builds(Constant),
    st.builds(Step, step_epochs=st.floats(0.05, 5), gamma=st.floats(0.01, 1), warmup_epochs=st.floats(0, 3)),
    st.builds(Cosine, min_lr_ratio=st.floats(0, 1), warmup_epochs=st.floats(0, 3)),
    st.builds(
        CosineWarmRestarts,
        t_0=st.floats(0.05, 5),
        t_mult=st.integers(1, 4),
        min_lr_ratio=st.floats(0, 1),
        warmup_epochs=st.floats(0, 3),
    ),
)


@settings(max_examples=200, deadline=None)
@given(schedule=schedules, epochs=st.integers(1, 50), position=st.floats(0, 1))
def test_a_factor_is_a_share(schedule: ScheduleConfig, epochs: int, position: float) -> None:
    factor = lr_factor(schedule, position * epochs, epochs)

    assert math.isfinite(factor)
    assert 0.0 <= factor <= 1.0 + 1e-12


@settings(max_examples=100, deadline=None)
@given(
    schedule=st.one_of(
        st.builds(Step, step_epochs=st.sampled_from([0.5, 1.0, 2.0])),
        st.builds(Cosine, warmup_epochs=st.sampled_from([0.0, 0.5, 1.0])),
        st.builds(CosineWarmRestarts, t_0=st.sampled_from([0.5, 1.0, 2.0]), t_mult=st.integers(1, 3)),
    ),
    steps=st.integers(1, 60),
    times=st.integers(2, 9),
)
def test_the_rate_at_a_time_does_not_depend_on_the_number_of_steps(
    schedule: ScheduleConfig, steps: int, times: int
) -> None:
    coarse = our_factors(schedule, steps, 3)
    fine = our_factors(schedule, steps * times, 3)

    assert fine[::times] == pytest.approx(coarse, abs=1e-6)


# optimizers


def make_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).to(dtype)


def everything(net: nn.Module, value: float = 1.0) -> dict[str, float]:
    return {name: value for name, _ in net.named_parameters()}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int, found_inf: float | None = 0.0) -> None:
    dtype = next(net.parameters()).dtype
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    optimizer.zero_grad()
    net(x).square().sum().backward()
    if found_inf is not None:
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
    optimizer.step()


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def bits_of(net: nn.Module) -> dict[str, bytes]:
    return bits(dict(net.named_parameters()))


def test_groups_hold_each_trained_parameter_once_with_its_multiplier() -> None:
    net = make_net()
    multipliers = {**everything(net, 0.1), "0.weight": 0.0, "0.bias": 0.0, "2.weight": 1.0, "2.bias": 1.0}
    optimizer = build_optimizer(AdamW(weight_decay=0.3), net, multipliers)
    parameters = dict(net.named_parameters())

    found = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is parameters[name]
            assert name not in found
            found[name] = (group["multiplier"], group["weight_decay"])
    assert found == {"2.weight": (1.0, 0.3), "2.bias": (1.0, 0.0), "1.weight": (0.1, 0.0), "1.bias": (0.1, 0.0)}


def test_options_reach_the_optimizer() -> None:
    net = make_net()
    adam, adamw, sgd = (build_optimizer(CONFIGS[name], net, everything(net)) for name in ("adam", "adamw", "sgd"))

    assert (type(adam), type(adamw), type(sgd)) == (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.9
    assert all(group["lr"] == 0.02 and group["fused"] for o in (adam, adamw, sgd) for group in o.param_groups)


def test_learning_rates_are_the_rate_times_the_multiplier() -> None:
    net = make_net()
    multipliers = {**everything(net, 0.1), "2.weight": 1.0, "2.bias": 1.0}
    optimizer = build_optimizer(AdamW(weight_decay=0.3), net, multipliers)

    assert set_learning_rates(optimizer, 0.5) == {"1": 0.5, "0.1": 0.05}
    for group in optimizer.param_groups:
        assert group["lr"] == 0.5 * group["multiplier"]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_step_is_the_step_of_the_plain_optimizer(name: str) -> None:
    ours, theirs = make_net(torch.float64), make_net(torch.float64)
    optimizer = build_optimizer(CONFIGS[name], ours, everything(ours))
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    reference = kind([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.02, weight_decay=0.1)
    for seed in range(4):
        step(ours, optimizer, seed)
        step(theirs, reference, seed, found_inf=None)

    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_state_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    net = make_net(dtype)
    optimizer = build_optimizer(CONFIGS[name], net, everything(net))
    for seed in range(3):
        step(net, optimizer, seed)
    saved, weights = {k: v.clone() for k, v in named_state(optimizer).items()}, net.state_dict()

    resumed = make_net(dtype)
    resumed.load_state_dict({k: v.clone() for k, v in weights.items()})
    resumed_optimizer = build_optimizer(CONFIGS[name], resumed, everything(resumed))
    load_named_state(resumed_optimizer, saved)
    for seed in range(3, 6):
        step(net, optimizer, seed)
        step(resumed, resumed_optimizer, seed)

    assert bits_of(resumed) == bits_of(net)
    assert bits(named_state(resumed_optimizer)) == bits(named_state(optimizer))


def test_state_is_named_by_parameter() -> None:
    net = make_net()
    optimizer = build_optimizer(Adam(), net, everything(net))
    step(net, optimizer, 0)
    state = named_state(optimizer)

    assert {name.rpartition("/")[0] for name in state} == set(everything(net))
    assert {name.rpartition("/")[2] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert state["2.weight/exp_avg"].shape == (3, 8)


def test_loaded_state_shares_no_memory_with_what_was_given() -> None:
    net = make_net()
    optimizer = build_optimizer(Adam(), net, everything(net))
    step(net, optimizer, 0)
    saved = {k: v.clone() for k, v in named_state(optimizer).items()}
    before = bits(saved)
    load_named_state(optimizer, saved)
    step(net, optimizer, 1)

    assert bits(saved) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rejected_step_changes_nothing(name: str) -> None:
    net = make_net()
    optimizer = build_optimizer(CONFIGS[name], net, everything(net))
    step(net, optimizer, 0)
    weights, state = bits_of(net), bits(named_state(optimizer))
    step(net, optimizer, 1, found_inf=1.0)

    assert bits_of(net) == weights
    assert bits(named_state(optimizer)) == state


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rejected_first_step_leaves_no_trace_in_the_next(name: str) -> None:
    net, reference = make_net(), make_net()
    optimizer = build_optimizer(CONFIGS[name], net, everything(net))
    expected = build_optimizer(CONFIGS[name], reference, everything(reference))
    before = bits_of(net)
    dirty = [torch.full((32,), 1e30) for _ in range(2000)]  # freed memory is reused with what lay in it
    del dirty
    step(net, optimizer, 0, found_inf=1.0)
    assert bits_of(net) == before

    net[1].load_state_dict(reference[1].state_dict())  # type: ignore[index]
    step(net, optimizer, 1)
    step(reference, expected, 1)

    assert bits_of(net) == bits_of(reference)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(CONFIGS, CONFIGS)))
def test_a_stage_that_trains_more_goes_on_from_the_one_before(before: str, after: str) -> None:
    net = make_net()
    head_only = {**everything(net, 0.0), "2.weight": 1.0, "2.bias": 1.0}
    first = build_optimizer(CONFIGS[before], net, head_only)
    step(net, first, 0)
    second = build_optimizer(CONFIGS[after], net, everything(net))
    load_named_state(second, named_state(first))
    weights = bits_of(net)
    step(net, second, 1)
    step(net, second, 2)

    assert all(bits_of(net)[name] != weights[name] for name in weights if name != "0.bias")  # 0.bias: norm behind it
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(("before", "after"), [("adam", "sgd"), ("sgd", "adam"), ("adam", "plain_sgd")])
def test_state_of_another_kind_of_optimizer_is_left_out(before: str, after: str) -> None:
    net = make_net()
    first = build_optimizer(CONFIGS[before], net, everything(net))
    step(net, first, 0)
    second, fresh = (build_optimizer(CONFIGS[after], net, everything(net)) for _ in range(2))
    load_named_state(second, named_state(first))
    step(net, fresh, 1)
    step(net, second, 1)

    assert set(named_state(second)) == set(named_state(fresh))


def test_momentum_of_the_stage_before_is_kept_when_more_parameters_join() -> None:
    net = make_net(torch.float64)
    head_only = {**everything(net, 0.0), "2.weight": 1.0, "2.bias": 1.0}
    first = build_optimizer(SGD(lr=0.1), net, head_only)
    step(net, first, 0)
    momentum = named_state(first)["2.weight/momentum_buffer"].clone()
    second = build_optimizer(SGD(lr=0.1), net, everything(net))
    load_named_state(second, named_state(first))
    step(net, second, 1)
    gradient = net.get_parameter("2.weight").grad

    assert gradient is not None
    torch.testing.assert_close(named_state(second)["2.weight/momentum_buffer"], 0.9 * momentum + gradient)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_from_a_file_lies_in_memory_like_its_parameter(name: str) -> None:
    """A fused optimizer walks through parameter and state side by side, whatever their strides are."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(optimizer: torch.optim.Optimizer, net: nn.Module) -> None:
        images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        net(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, resumed = net(), net()
    multipliers = dict.fromkeys(dict(whole.named_parameters()), 1.0)
    optimizer = build_optimizer(CONFIGS[name], whole, multipliers)
    step(optimizer, whole)
    resumed.load_state_dict(whole.state_dict())
    from_file = {key: value.contiguous() for key, value in named_state(optimizer).items()}
    again = build_optimizer(CONFIGS[name], resumed, multipliers)
    load_named_state(again, from_file)
    step(optimizer, whole)
    step(again, resumed)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
