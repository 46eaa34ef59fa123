"""Losses as modules, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from mit_semseg.losses import functional
from mit_semseg.registry import Registry

LOSSES: Registry[Callable[..., nn.Module]] = Registry("loss")


class Loss(nn.Module):
    """`crit(log_probs, label)` -> scalar, with class weights as a buffer."""

    weight: Tensor | None
    function: Callable[..., Tensor]
    # Whether it is a mean over pixels, weighted by class weights.
    over_pixels: ClassVar[bool] = True

    def __init__(self, weight: Tensor | None = None) -> None:
        """Initialise the loss.

        Args:
            weight: (C,) float class weights, or None.
        """
        super().__init__()
        # Not in checkpoints, as it comes from the configuration.
        self.register_buffer("weight", weight, persistent=False)

    def denominator(self, label: Tensor) -> Tensor:
        """The denominator of the mean: the number of labelled pixels, or the sum of their weights.

        It is the weight of a batch among others: the weighted mean of the losses of several batches
        is the loss of all of them together (exactly for means over pixels, nll and focal).
        """
        return functional.denominator(label, self.weight)

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Loss of (B, C, h, w) log-probabilities against (B, h, w) int64 labels, -1 ignored."""
        return type(self).function(log_probs, label, self.weight)


@LOSSES.register("nll")
class NLL(Loss):
    """See `functional.nll`."""

    function = staticmethod(functional.nll)


@LOSSES.register("smooth")
class Smooth(Loss):
    """See `functional.smooth`."""

    def __init__(self, weight: Tensor | None = None, eps: float = 0.1) -> None:
        """Initialise the loss with class weights (C,) and the smoothing eps in [0, 1]."""
        super().__init__(weight)
        if not 0 <= eps <= 1:
            raise ValueError(f"TRAIN.label_smoothing is {eps}; it must be within [0, 1]")
        self.eps = eps

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """See `Loss.forward`."""
        return functional.smooth(log_probs, label, self.weight, self.eps)


@LOSSES.register("focal")
class Focal(Loss):
    """See `functional.focal`."""

    function = staticmethod(functional.focal)


class _ClassMean(Loss):
    """Mean over classes. Batches are weighted by labelled pixels, without class weights."""

    over_pixels = False

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
    """Weighted sum of losses.

    Attributes:
        factors: factors of the losses.
        over_pixels: whether one of the losses is a mean over pixels.
    """

    def __init__(self, parts: Sequence[nn.Module], factors: Sequence[float] = ()) -> None:
        """Initialise the sum.

        Args:
            parts: losses with a method `denominator(label)`.
            factors: one for each loss; empty: 1.
        """
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.factors = tuple(factors) or (1.0,) * len(parts)
        # Batches are weighted as for means over pixels, because only those are then exact.
        over_pixels = [i for i, part in enumerate(parts) if getattr(part, "over_pixels", True)]
        self.over_pixels = bool(over_pixels)
        self._weighting = over_pixels[0] if over_pixels else 0

    def denominator(self, label: Tensor) -> Tensor:
        """The denominator of the first mean over pixels, or else of the first loss."""
        return cast(Loss, self.parts[self._weighting]).denominator(label)

    def forward(self, log_probs: Tensor, label: Tensor) -> Tensor:
        """Sum of the losses."""
        terms = zip(self.factors, self.parts, strict=True)
        return torch.stack([factor * part(log_probs, label) for factor, part in terms]).sum()


@LOSSES.register("focal_dice")
def focal_dice(weight: Tensor | None = None) -> Sum:
    """Same as "focal+dice".

    Paper: after Zhu et al. 2019 (AnatomyNet), arXiv:1808.05238, with lambda 1; lambda 2 is
    "focal+2*dice".
    """
    return Sum([Focal(weight), Dice(weight)])


def build_loss(
    name: str = "nll",
    num_class: int = 150,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.1,
) -> nn.Module:
    """Builds a loss by name.

    Args:
        name: nll, smooth, focal, dice, focal_dice, ohem or lovasz, or a sum of them with optional
            factors, such as "nll+0.5*dice".
        num_class: number of classes.
        class_weights: (num_class,) float, or None.
        label_smoothing: eps of `smooth`, in [0, 1].

    Returns:
        `crit(log_probs (B, C, h, w), label (B, h, w))` -> scalar, with `denominator(label)`.

    Raises:
        ValueError: a name is unknown, a factor is not a number above 0, or class weights have
            the wrong length, are negative or non-finite.

    Example:
        >>> crit = build_loss("nll+0.5*dice", num_class=2)
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
        if not ((class_weights >= 0) & class_weights.isfinite()).all():
            raise ValueError(
                f"TRAIN.class_weights are {class_weights.tolist()}; they must be numbers of 0 or "
                "more"
            )
    terms = [_factor_and_name(term) for term in name.split("+")]
    options = {"smooth": {"eps": label_smoothing}}
    parts = [LOSSES.get(part)(class_weights, **options.get(part, {})) for _, part in terms]
    factors = [factor for factor, _ in terms]
    return parts[0] if factors == [1.0] else Sum(parts, factors)


def _factor_and_name(term: str) -> tuple[float, str]:
    """ "0.5*dice" -> (0.5, "dice")."""
    factor, star, name = term.rpartition("*")
    if not star:
        return 1.0, name.strip()
    try:
        number = float(factor)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"TRAIN.loss has {term.strip()!r}: the factor before * must be a number above 0, as "
            "in nll+0.5*dice"
        )
    return number, name.strip()
