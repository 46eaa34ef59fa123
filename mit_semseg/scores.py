"""Logits of all scales and flips -> class map, without classes x height x width at full size.

The published procedure resizes the logits of every scale to the image, takes the softmax over
the classes, averages over the scales and takes the argmax. At 150 classes that is gigabytes for
one photograph. Bilinear resizing is separable, and an image row mixes just two rows of the
logits, so the same result can be had one band of image rows at a time: widen the logits' rows to
the image's width as they are reached, mix two of them for each image row, and let the band go.
Small bands also stay in the processor's cache, which makes this several times faster.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one band (all samples and classes): small enough for a processor's cache, large
# enough to keep an accelerator busy.
_BAND_CPU = 1 << 20
_BAND_DEVICE = 1 << 23


def interpolation_weights(
    n_in: int, n_out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Where bilinear resizing of one axis reads, with torch's `align_corners=False` rule.

    Output i is `(1 - weight[i]) * x[left[i]] + weight[i] * x[right[i]]`.

    Args:
        n_in: length of the axis before.
        n_out: length of the axis after.
        dtype: floating type of the weights and of their arithmetic; torch uses the data's.

    Returns:
        left and right, (n_out,) int64 in 0..n_in-1, and weight, (n_out,) in [0, 1].

    Raises:
        ValueError: a length is below 1.
    """
    if n_in < 1 or n_out < 1:
        raise ValueError(f"lengths must be at least 1, got n_in={n_in}, n_out={n_out}")
    step = torch.tensor(n_in, dtype=dtype) / n_out
    at = (step * (torch.arange(n_out, dtype=dtype) + 0.5) - 0.5).clamp_(0, n_in - 1)
    left = at.long()
    return left, (left + 1).clamp_(max=n_in - 1), at - left


class _Scale:
    """One scale's logits, resized band by band from top to bottom."""

    def __init__(self, logits: Tensor, H: int, W: int, dtype: torch.dtype) -> None:
        self.logits, self.W, self.dtype = logits, W, dtype
        above, below, weight = interpolation_weights(logits.shape[2], H, dtype)
        self.above, self.below = above.tolist(), below.tolist()
        self.weight = weight.to(logits.device).view(H, 1, 1, 1)
        self.wide: dict[int, Tensor] = {}

    def _widen(self, *rows: int) -> list[Tensor]:
        """Rows of the logits at the image's width, (N, C, W) each."""
        self.wide = {
            r: self.wide[r]
            if r in self.wide
            else F.interpolate(
                self.logits[:, :, r].to(self.dtype), self.W, mode="linear", align_corners=False
            )
            for r in rows
        }
        return [self.wide[r] for r in rows]

    def resize_into(self, out: Tensor, y0: int) -> None:
        """Writes the resized logits of the image rows from y0 on into out, (rows, N, C, W)."""
        start, end = y0, y0 + len(out)
        while start < end:
            # All image rows that mix the same two rows of logits, at once.
            stop = start + 1
            while stop < end and self.above[stop] == self.above[start]:
                stop += 1
            above, below = self._widen(self.above[start], self.below[start])
            torch.lerp(above, below, self.weight[start:stop], out=out[start - y0 : stop - y0])
            start = stop


def _check(logits: Sequence[Tensor], size: tuple[int, int]) -> tuple[list[Tensor], int, int]:
    """The arguments in one form, or ValueError saying what is wrong with them."""
    scales = [logits] if isinstance(logits, Tensor) else list(logits)
    if not scales:
        raise ValueError("logits is empty: give one (N, C, h, w) tensor per scale")
    for i, x in enumerate(scales):
        if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape:
            raise ValueError(
                f"logits[{i}] is {x.dtype} of shape {tuple(x.shape)}; "
                "give a floating-point (N, C, h, w) tensor that is not empty"
            )
        if x.shape[:2] != scales[0].shape[:2] or x.device != scales[0].device:
            raise ValueError(
                f"logits[{i}] has (N, C) = {tuple(x.shape[:2])} on {x.device}, but logits[0] has "
                f"{tuple(scales[0].shape[:2])} on {scales[0].device}; they must be the same"
            )
    try:
        H, W = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"size is {size!r}; give (height, width), two integers") from None
    if H < 1 or W < 1:
        raise ValueError(f"size is {size!r}; give a height and width of at least 1 pixel")
    return [x.detach() for x in scales], H, W


def _bands(logits: list[Tensor], H: int, W: int, softmax: bool) -> Iterator[tuple[int, Tensor]]:
    """(first row, mean over scales (rows, N, C, W)) from top to bottom.

    Every band is written into the same memory: use it before asking for the next one.
    """
    N, C, _, _ = logits[0].shape
    device = logits[0].device
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
    budget = _BAND_CPU if device.type == "cpu" else _BAND_DEVICE
    rows = max(1, min(H, budget // (N * C * W)))
    scales = [_Scale(x, H, W, dtype) for x in logits]
    # One mean and one scratch, reused: fresh memory would cost more than the arithmetic.
    memory = torch.empty(3, rows, N, C, W, dtype=dtype, device=device)
    for y0 in range(0, H, rows):
        mean, resized, prob = memory[:, : min(rows, H - y0)]
        for i, scale in enumerate(scales):
            scale.resize_into(resized, y0)
            if softmax:
                torch.softmax(resized, dim=2, out=mean if i == 0 else prob)
            if i > 0:
                mean += prob
        if len(scales) > 1:
            mean /= len(scales)
        yield y0, mean if softmax else resized


@torch.no_grad()
def class_map(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Most probable class of every pixel: argmax of the mean of the scales' softmax.

    Args:
        logits: one (N, C, h, w) tensor per scale or flip, of any floating type, each with its own
            h and w. Computed in float32, in float64 when one is.
        size: (H, W) of the class map, in pixels.

    Returns:
        (N, H, W) int64 on the logits' device.

    Raises:
        ValueError: no logits, differing N, C or device, or a size that is not two positive
            integers.

    Example:
        >>> class_map([torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]]])], (1, 4))
        tensor([[[1, 1, 0, 0]]])
    """
    scales, H, W = _check(logits, size)
    labels = torch.empty(scales[0].shape[0], H, W, dtype=torch.int64, device=scales[0].device)
    # The softmax keeps the order of the classes: one scale does without it.
    for y0, band in _bands(scales, H, W, softmax=len(scales) > 1):
        # Not argmax: max(dim) is vectorised over the last axis on CPUs, argmax is not.
        labels[:, y0 : y0 + len(band)] = band.max(dim=2).indices.transpose(0, 1)
    return labels


@torch.no_grad()
def probability_bands(
    logits: Sequence[Tensor], size: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Class probabilities of an image, a band of rows at a time, so that memory stays bounded.

    Args:
        logits: as for `class_map`.
        size: (H, W) of the image, in pixels.

    Yields:
        (y0, probabilities): the band's first image row, and the mean over scales of the softmax,
        (N, C, rows, W) float32 (float64 when a scale is), summing to 1 over C.

    Raises:
        ValueError: as for `class_map`, when the first band is asked for.
    """
    for y0, band in _bands(*_check(logits, size), softmax=True):
        yield y0, band.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def probabilities(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Class probabilities of a whole image; where C x H x W is large, use `probability_bands`.

    Args:
        logits: as for `class_map`.
        size: (H, W), in pixels.

    Returns:
        (N, C, H, W) float32 (float64 when a scale is), summing to 1 over C.

    Raises:
        ValueError: as for `class_map`.
    """
    scales, H, W = _check(logits, size)
    N, C, _, _ = scales[0].shape
    result: Tensor | None = None
    for y0, band in _bands(scales, H, W, softmax=True):
        if result is None:
            result = band.new_empty(N, C, H, W)
        result[:, :, y0 : y0 + len(band)] = band.permute(1, 2, 0, 3)
    assert result is not None
    return result
