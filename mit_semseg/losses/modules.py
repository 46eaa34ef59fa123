"""Losses by name: thin modules over the functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mit_semseg.losses import functional
from mit_semseg.registry import Registry

LOSSES = Registry("loss")


class Loss(nn.Module):
    """`crit(log_probs, label)` -> scalar, with class weights that follow the module's device."""

    weight: Tensor | None
    function: Callable[..., Tensor]

    def __init__(self, weight: Tensor | None = None) -> None:
        """Keep the class weights.

        Args:
            weight: (C,) float class weights, or None.
        """
        super().__init__()
        # Comes from the configuration, so it has no place in a checkpoint.
        self.register_buffer("weight", weight, persistent=False)

    def denominator(self, label: Tensor) -> Tensor:
        """What the mean divides by: valid pixels, or the sum of their class weights.

        It is what weighs this batch against others: losses weighted by it add up to the loss of
        the union (exactly for means over pixels, that is nll and focal).
        """
        return functional.denominator(label, self.weight)

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Loss of (B, C, h, w) log-probabilities against (B, h, w) int64 labels, -1 ignored."""
        return type(self).function(log_probs, label, self.weight)


@LOSSES.register("nll")
class NLL(Loss):
    """See `functional.nll`."""

    function = staticmethod(functional.nll)


@LOSSES.register("focal")
class Focal(Loss):
    """See `functional.focal`."""

    function = staticmethod(functional.focal)


class _ClassMean(Loss):
    """Mean over classes: class weights act there, so batches count by their valid pixels."""

    def denominator(self, label: Tensor) -> Tensor:
        return functional.denominator(label)


@LOSSES.register("dice")
class Dice(_ClassMean):
    """See `functional.dice`."""

    function = staticmethod(functional.dice)


@LOSSES.register("ohem")
class OHEM(Loss):
    """See `functional.ohem`."""

    function = staticmethod(functional.ohem)


@LOSSES.register("lovasz")
class Lovasz(_ClassMean):
    """See `functional.lovasz`."""

    function = staticmethod(functional.lovasz)


class Sum(nn.Module):
    """Several losses added up; the first one says how a batch weighs against others."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def denominator(self, label: Tensor) -> Tensor:
        """That of the first loss."""
        return cast(Loss, self.parts[0]).denominator(label)

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Sum of the losses."""
        return torch.stack([part(log_probs, label) for part in self.parts]).sum()


def build_loss(
    name: str = "nll", num_class: int = 150, class_weights: Tensor | None = None
) -> nn.Module:
    """A loss by name.

    Args:
        name: nll, focal, dice, ohem or lovasz, or a sum such as "nll+dice".
        num_class: classes told apart.
        class_weights: (num_class,) float, or None.

    Returns:
        `crit(log_probs (B, C, h, w), label (B, h, w))` -> scalar, with `denominator(label)`.

    Raises:
        ValueError: an unknown name, or class weights of another length.

    Example:
        >>> crit = build_loss("nll+dice", num_class=2)
        >>> label = torch.full((1, 3, 3), -1)
        >>> crit(torch.zeros(1, 2, 3, 3).log_softmax(1), label).item()
        0.0
    """
    if class_weights is not None:
        class_weights = torch.as_tensor(class_weights, dtype=torch.get_default_dtype())
        if class_weights.shape != (num_class,):
            raise ValueError(
                f"class_weights has shape {tuple(class_weights.shape)}; TRAIN.class_weights needs "
                f"one weight for each of the {num_class} classes"
            )
    parts = [LOSSES.get(part.strip())(class_weights) for part in name.split("+")]
    return parts[0] if len(parts) == 1 else Sum(parts)
