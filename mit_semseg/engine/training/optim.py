"""Optimizers, and the moving average of weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def parameter_groups(
    module: nn.Module, weight_decay: float, scales: Mapping[nn.Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """Convolution and linear weights with weight decay, every other parameter without.

    Args:
        module: whose parameters are grouped, but for those without gradients.
        weight_decay: of the first of each two groups.
        scales: factors on the learning rate, each of which makes two groups of its own (see
            `finetune.layer_scales`); parameters that it does not name have the factor 1.
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
) -> torch.optim.Optimizer:
    """One optimizer for all parts, which step together or not at all.

    Args:
        kind: SGD, Adam or AdamW.
        parts: modules, already on their device, each with its learning rate before the schedule.
        beta1: momentum of SGD, first beta of the others.
        weight_decay: of convolution and linear weights.
        scales: factors on the learning rate (see `parameter_groups`).
        of_first: modules inside other parts that learn at the rate of the first one.
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
    if kind == "SGD":
        return torch.optim.SGD(groups, momentum=beta1, fused=True)
    return {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[kind](
        groups, betas=(beta1, 0.999), fused=True
    )


class OptimizerState:
    """An optimizer as part of the state of a run: the entries `optim`, its kind, and `optimizer`.

    Of a state of another kind nothing is taken: momentum starts afresh.
    """

    def __init__(self, kind: str, optimizer: torch.optim.Optimizer) -> None:
        self.kind, self.optimizer = kind, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Both entries."""
        return {"optim": self.kind, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the momentum; the settings stay."""
        if state.get("optim") == self.kind:
            before = "optimizers" in state  # one for each half
            saved = joined_states(state["optimizers"]) if before else state["optimizer"]
            load_optimizer(self.optimizer, saved)


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


def set_learning_rates(optimizer: torch.optim.Optimizer, *rates: float) -> None:
    """Give the groups of each part of an optimizer its learning rate times their own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]] * group["lr_scale"]


class MovingAverage(Generic[M]):
    """An exponential moving average of all weights and running statistics of a module.

    The first update copies. The decay then grows with the number of updates, (1 + n) / (10 + n),
    up to `decay`, so that the random start does not linger. Updates are counted on the host, so
    that none of them waits for the device; `torch.optim.swa_utils.AveragedModel`, whose state
    dict this has, reads its counter there.

    Args:
        module: on its device, in its layout; what it becomes is averaged.
        decay: within [0, 1).

    Attributes:
        module: a copy with the averages.
        updates: how many there were.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.module, self.decay, self.updates = copy.deepcopy(module), decay, 0
        self._live = module

    @torch.no_grad()
    def update(self) -> None:
        """Follow the module by one step."""
        weight = 1.0 - min(self.decay, (1.0 + self.updates) / (10.0 + self.updates))
        # Tensors of one type at a time.
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
        """Go on from an earlier average.

        Raises:
            KeyError, RuntimeError: the state is that of another module.
        """
        self.updates = int(state["n_averaged"])
        tensors = {name: value for name, value in state.items() if name != "n_averaged"}
        self.module.load_state_dict(
            {name.removeprefix("module."): value for name, value in tensors.items()}
        )

    def restart(self) -> None:
        """Take the module's present weights for the average."""
        self.module.load_state_dict(self._live.state_dict())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
