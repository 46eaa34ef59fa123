"""Optimizers, the poly schedule and the running average of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mit_semseg.config.node import Config


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Convolution and linear weights with weight decay, every other parameter without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for child in module.modules():
        takes_decay = isinstance(child, (nn.Linear, nn.modules.conv._ConvNd))
        for name, parameter in child.named_parameters(recurse=False):
            (decayed if takes_decay and name == "weight" else plain).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def build_optimizer(cfg: Config, *parts: tuple[nn.Module, float]) -> torch.optim.Optimizer:
    """The optimizer named by TRAIN.optim; one for all parts, which step together or not at all.

    Args:
        cfg: TRAIN.optim (SGD, Adam, AdamW), TRAIN.beta1 (momentum or first beta),
            TRAIN.weight_decay.
        parts: modules, already on their device, each with its learning rate before the schedule.
            A part makes two groups: parameters with weight decay, then those without.
    """
    groups = [
        {**group, "lr": lr}
        for module, lr in parts
        for group in parameter_groups(module, cfg.TRAIN.weight_decay)
    ]
    if cfg.TRAIN.optim == "SGD":
        return torch.optim.SGD(groups, momentum=cfg.TRAIN.beta1, fused=True)
    kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[cfg.TRAIN.optim]
    return kind(groups, betas=(cfg.TRAIN.beta1, 0.999), fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer the momentum of a saved one; its own settings stay.

    Momentum takes the memory layout of its parameter, which may be another than it was saved with
    (TRAIN.channels_last): fused steps go through the memory of both side by side, whatever their
    strides are.

    Raises:
        ValueError, KeyError: the state is that of other parameters.
    """
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def joined_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of one optimizer per part as the state of one over all: numbers go on.

    What states of runs held before there was one optimizer: `"optimizers": [encoder, decoder]`.
    """
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    for one in states:
        first = sum(len(group["params"]) for group in groups)
        state.update({first + number: kept for number, kept in one["state"].items()})
        groups += [
            {**group, "params": [first + number for number in group["params"]]}
            for group in one["param_groups"]
        ]
    return {"state": state, "param_groups": groups}


def poly_factor(step: int, total: int, power: float, warmup: int = 0) -> float:
    """Factor on the learning rate at a step: (1 - step / total) ** power after a linear rise.

    Paper: Chen et al. 2017 (DeepLab), arXiv:1606.00915, sec. 4.3.

    Args:
        step: from 0 to total - 1.
        total: steps of the whole run.
        power: exponent, 0.9 as published.
        warmup: steps of the linear rise; 0 = none.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * (1.0 - step / total) ** power


def set_learning_rates(optimizer: torch.optim.Optimizer, *rates: float) -> None:
    """Give the parts of an optimizer, two groups each, their learning rates."""
    of_groups = [rate for rate in rates for _ in range(2)]
    for group, rate in zip(optimizer.param_groups, of_groups, strict=True):
        group["lr"] = rate


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of all weights and running statistics.

    The decay grows with the number of updates, (1 + n) / (10 + n), up to `decay`, so that the
    random start does not linger.
    """

    @torch.no_grad()
    def update(average: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        n = float(count)
        weight = 1.0 - min(decay, (1.0 + n) / (10.0 + n))
        if average[0].is_floating_point():
            torch._foreach_lerp_(list(average), list(current), weight)
        else:
            for old, new in zip(average, current):
                old.copy_(new)

    return AveragedModel(module, multi_avg_fn=update, use_buffers=True)
