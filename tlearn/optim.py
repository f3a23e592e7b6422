"""Optimizers over the trainable parameters, their state by name, and learning rates as functions of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from tlearn.config import SGD, Adam, AdamW, Constant, Cosine, CosineWarmRestarts, Step

OptimizerConfig = Adam | AdamW | SGD
ScheduleConfig = Constant | Step | Cosine | CosineWarmRestarts

_AVERAGE = "ema"

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def build_optimizer(config: OptimizerConfig, net: nn.Module, multipliers: Mapping[str, float]) -> torch.optim.Optimizer:
    """An optimizer over the parameters with a multiplier above 0, grouped by multiplier and weight decay.

    Every group carries `multiplier`, and `names` in the order of its parameters. Fused: a step that `found_inf`
    rejects costs no synchronisation.
    """
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in net.named_parameters():
        if multipliers[name] > 0:
            # biases and the scales of norm layers: shrinking them does not regularise (He et al. 2019, 3.1)
            decays = parameter.ndim > 1 and config.weight_decay > 0
            groups.setdefault((multipliers[name], decays), []).append((name, parameter))
    options = config.model_dump(exclude={"name", "weight_decay"})
    optimizer = OPTIMIZERS[config.name](
        [
            {
                "params": [parameter for _, parameter in members],
                "names": [name for name, _ in members],
                "multiplier": multiplier,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (multiplier, decays), members in groups.items()
        ],
        fused=True,
        **options,
    )
    if options.get("momentum"):
        # torch makes these in the first step: of uninitialised memory if `found_inf` rejects it, and not where other
        # parameters of the group have theirs already. From zeros the first step comes out the same.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, lr: float) -> dict[str, float]:
    """Give every group `lr` times its multiplier; returns {multiplier: rate} for the log."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["multiplier"]
    return {f"{group['multiplier']:g}": group["lr"] for group in optimizer.param_groups}


def named_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as `parameter/state -> tensor`."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor)
    }


def load_named_state(optimizer: torch.optim.Optimizer, state: Mapping[str, torch.Tensor]) -> None:
    """Put state back by name.

    Parameters without saved state start afresh; state of other parameters, or of another kind of optimizer (Adam and
    AdamW count as one), is left out.
    """
    expected = _state_keys(optimizer)
    by_parameter: dict[str, dict[str, torch.Tensor]] = {}
    for path, value in state.items():
        name, _, key = path.rpartition("/")
        if key == _AVERAGE:
            continue
        by_parameter.setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            saved = by_parameter.get(name, {})
            for key, value in saved.items() if saved.keys() == expected else ():
                # Adam's `step` is a float32 scalar whatever the parameter's dtype. The others must lie in memory like
                # the parameter (channels last), which a file does not keep: fused kernels do not look at strides.
                like = value.to(parameter.device) if key == "step" else parameter
                optimizer.state[parameter][key] = torch.empty_like(like).copy_(value)


class WeightAverage:
    """Exponential moving average of the weights that train (Polyak & Juditsky 1992): those of the last steps smoothed.

    With them BatchNorm's running statistics, which belong to them. What stands still in a stage is not averaged.

    Args:
        net: the network.
        moving: its buffers that change in training.
        decay: of the average, per step; None: there is none.
        state: by `NAME/ema`, of the stage before or of a checkpoint.
    """

    def __init__(
        self,
        net: nn.Module,
        moving: Sequence[torch.Tensor],
        decay: float | None,
        state: Mapping[str, torch.Tensor],
    ) -> None:
        self.decay = decay
        changing = {id(buffer) for buffer in moving if buffer.is_floating_point()}
        tensors = [*net.named_parameters(), *net.named_buffers()] if decay else []
        self.weights = {name: tensor for name, tensor in tensors if tensor.requires_grad or id(tensor) in changing}
        self.averages = {
            name: torch.empty_like(p).copy_(state.get(f"{name}/{_AVERAGE}", p.detach()))
            for name, p in self.weights.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` of the run; at its beginning the average forgets sooner."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.averages.values()), list(self.weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the averages for weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, torch.Tensor]:
        """By `NAME/ema`."""
        return {f"{name}/{_AVERAGE}": average for name, average in self.averages.items()}

    def _swap(self) -> None:
        for name, weight in self.weights.items():
            weight.data, self.averages[name] = self.averages[name], weight.data


def state_to_come(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """For every tensor that the first step will add to the state, the parameter of whose size it is."""
    tensors = len(_state_keys(optimizer) - {"step"})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter for parameter in parameters if not optimizer.state.get(parameter) for _ in range(tensors)]


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    return {"step", "exp_avg", "exp_avg_sq"}


def lr_factor(schedule: ScheduleConfig, epoch: float, epochs: int) -> float:
    """Learning rate as a share of the peak rate: a function of time alone, equal at every number of processes.

    Args:
        schedule: the stage's.
        epoch: time since the stage began, in epochs: optimizer steps done / steps per epoch.
        epochs: length of the stage.
    """
    warmup = schedule.warmup_epochs
    if epoch < warmup:
        return epoch / warmup
    t, total = epoch - warmup, max(epochs - warmup, 1e-9)
    match schedule:
        case Constant():
            return 1.0
        case Step():
            return math.pow(schedule.gamma, math.floor(t / schedule.step_epochs + 1e-9))
        case Cosine():
            return _cosine(min(t / total, 1.0), schedule.min_lr_ratio)
        case CosineWarmRestarts():
            return _cosine(_cycle_position(t, _epochs_of(schedule.t_0, total), schedule.t_mult), schedule.min_lr_ratio)


def _epochs_of(duration: float | str, total: float) -> float:
    """Epochs of a number of epochs, or of a share such as `25%`."""
    return duration if isinstance(duration, float | int) else float(duration[:-1]) / 100 * total


def _cosine(position: float, floor: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * position)) / 2


def _cycle_position(t: float, t_0: float, t_mult: int) -> float:
    """Where in its cycle, 0 to 1, time t lies; equation 5 of SGDR (Loshchilov & Hutter 2017)."""
    # a restart falls on a whole step, but k * (t_0 / k) may come out just below t_0
    t += 1e-9
    if t_mult == 1:
        return t % t_0 / t_0
    n = math.floor(math.log(t / t_0 * (t_mult - 1) + 1, t_mult) + 1e-12)
    growth: int = t_mult**n
    start = t_0 * (growth - 1) / (t_mult - 1)
    return max(0.0, t - start) / (t_0 * growth)
