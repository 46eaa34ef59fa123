"""Optimizers, and the EMA of the weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mit_semseg.engine.training.fsdp import local

M = TypeVar("M", bound=nn.Module)


def parameter_groups(
    module: nn.Module, weight_decay: float, scales: Mapping[nn.Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups: convolution and linear weights with weight decay, the rest without.

    Args:
        module: whose parameters are grouped, except for those without gradients.
        weight_decay: of the first of each two groups.
        scales: factors on the learning rate, with two groups for each factor (see
            `finetune.layer_scales`); 1 for other parameters.
    """
    scales = scales or {}
    groups: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for child in module.modules():
        takes_decay = isinstance(child, (nn.Linear, nn.modules.conv._ConvNd))
        for name, parameter in child.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            scale = scales.get(parameter, 1.0)
            decayed, plain = groups.setdefault(scale, ([], []))
            (decayed if takes_decay and name == "weight" else plain).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for scale, pair in groups.items()
        for parameters, decay in zip(pair, (weight_decay, 0.0))
    ]


def build_optimizer(
    kind: str,
    *parts: tuple[nn.Module, float],
    beta1: float = 0.9,
    weight_decay: float = 1e-4,
    scales: Mapping[nn.Parameter, float] | None = None,
    of_first: Sequence[nn.Module] = (),
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """One optimizer for several modules.

    Args:
        kind: SGD, Adam or AdamW.
        parts: modules on their device, each with its initial learning rate.
        beta1: momentum of SGD, first beta of Adam and AdamW.
        weight_decay: of convolution and linear weights.
        scales: factors on the learning rate (see `parameter_groups`).
        of_first: modules inside other parts that learn at the rate of the first one.
        sharded: whether the parameters are sharded, for which torch has no fused SGD.
    """
    moved = {parameter for module in of_first for parameter in module.parameters()}
    groups = []
    for number, (module, _) in enumerate(parts):
        for group in parameter_groups(module, weight_decay, scales):
            by_part = {number: [p for p in group["params"] if p not in moved]}
            if moved and number:
                by_part[0] = [p for p in group["params"] if p in moved]
            for part, own in by_part.items():
                lr = parts[part][1] * group["lr_scale"]
                groups.append({**group, "params": own, "part": part, "lr": lr})
    # Not on Apple GPUs, whose fused kernels older versions of torch lack.
    fused = all(p.device.type != "mps" for group in groups for p in group["params"])
    if kind == "SGD":
        return torch.optim.SGD(
            groups, momentum=beta1, fused=fused and not sharded, foreach=sharded or None
        )
    return {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[kind](
        groups, betas=(beta1, 0.999), fused=fused
    )


class OptimizerState:
    """An optimizer in the state of a run: the entries `optim` (its kind) and `optimizer`.

    The state of an optimizer of another kind is not loaded.
    """

    def __init__(self, kind: str, optimizer: torch.optim.Optimizer) -> None:
        self.kind, self.optimizer = kind, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Both entries."""
        return {"optim": self.kind, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the momentum; learning rates and other settings stay."""
        if state.get("optim") == self.kind:
            two = "optimizers" in state  # earlier releases had one each for encoder and decoder
            saved = joined_states(state["optimizers"]) if two else state["optimizer"]
            load_optimizer(self.optimizer, saved)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the momentum of a saved optimizer; learning rates and other settings stay.

    Momentum is stored in the memory format of its parameter, which may differ from the saved one
    (`TRAIN.channels_last`): fused optimizers ignore strides.

    Raises:
        ValueError, KeyError: the state does not fit the parameters.
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
    """Join the states of one optimizer per module into the state of a single optimizer.

    States of earlier releases have `"optimizers": [encoder, decoder]`.
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


def set_learning_rates(optimizer: torch.optim.Optimizer, *rates: float) -> None:
    """Set the learning rates of the modules of `build_optimizer`, times the factors of groups."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]] * group["lr_scale"]


class MovingAverage(Generic[M]):
    """Exponential moving average (EMA) of the parameters and buffers of a module.

    The first update copies. The decay then grows with the number n of updates, (1 + n) / (10 + n),
    up to `decay`, so that the initial weights are forgotten quickly. The state dict is that of
    `torch.optim.swa_utils.AveragedModel`, which, however, waits for the device at every update to
    read its counter.

    Args:
        module: on its device and in its memory format.
        decay: in [0, 1).

    Attributes:
        module: a copy with the averages.
        updates: number of updates.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.module, self.decay, self.updates = copy.deepcopy(module), decay, 0
        self._live = module

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the module's current values."""
        weight = 1.0 - min(self.decay, (1.0 + self.updates) / (10.0 + self.updates))
        # The foreach operations need tensors of one dtype.
        pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for old, new in zip(_tensors(self.module), _tensors(self._live), strict=True):
            averages, current = pairs.setdefault(old.dtype, ([], []))
            averages.append(old)
            current.append(new)
        for dtype, (averages, current) in pairs.items():
            if self.updates and dtype.is_floating_point:
                torch._foreach_lerp_(averages, current, weight)
            else:
                torch._foreach_copy_(averages, current)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """`n_averaged`, the number of updates, and `module.NAME` for every tensor."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        return {"n_averaged": torch.tensor(self.updates), **tensors}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load an earlier average.

        Raises:
            KeyError, RuntimeError: the state does not fit the module.
        """
        self.updates = int(state["n_averaged"])
        tensors = {name: value for name, value in state.items() if name != "n_averaged"}
        self.module.load_state_dict(
            {name.removeprefix("module."): value for name, value in tensors.items()}
        )

    def restart(self) -> None:
        """Set the averages to the module's current values."""
        self.module.load_state_dict(self._live.state_dict())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return map(local, itertools.chain(module.parameters(), module.buffers()))
