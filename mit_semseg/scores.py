"""Logits of all scales and flips -> class map, without classes x height x width at full size.

The published procedure resizes the logits of every scale to the image, takes the softmax over
the classes, averages over the scales and takes the argmax. At 150 classes that is gigabytes for
one photograph. Bilinear resizing is separable, so the same result can be had one band of image
rows at a time: a band needs only the few low-resolution rows around it, widened once to the
image's width, and then one small row product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of one band (all samples, all classes): small enough to stay in a CPU's cache, large
# enough to keep an accelerator busy.
_BAND_CPU = 1 << 20
_BAND_DEVICE = 1 << 23


def _weights(n_in: int, n_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Left neighbour, right neighbour and weight of the right one, for every output position."""
    # The arithmetic runs in `dtype`, as torch's own does, so that the weights are the same.
    step = torch.tensor(n_in, dtype=dtype) / n_out
    at = (step * (torch.arange(n_out, dtype=dtype) + 0.5) - 0.5).clamp_(min=0)
    left = at.long().clamp_(max=n_in - 1)
    return left, (left + 1).clamp_(max=n_in - 1), (at - left).clamp_(0, 1)


def interpolation_matrix(n_in: int, n_out: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bilinear resizing of one axis as a matrix, with torch's `align_corners=False` weights.

    Args:
        n_in: length of the axis before.
        n_out: length of the axis after.
        dtype: floating type of the weights and of their arithmetic.

    Returns:
        (n_out, n_in); every row has at most two non-zeros and sums to 1.

    Raises:
        ValueError: a length is not positive.
    """
    if n_in < 1 or n_out < 1:
        raise ValueError(f"lengths must be at least 1, got n_in={n_in}, n_out={n_out}")
    left, right, weight = _weights(n_in, n_out, dtype)
    matrix = torch.zeros(n_out, n_in, dtype=dtype)
    matrix.scatter_add_(1, left[:, None], (1 - weight)[:, None])
    return matrix.scatter_add_(1, right[:, None], weight[:, None])


class _Rows:
    """One scale's logits, resized band by band from top to bottom."""

    def __init__(self, logits: Tensor, size: tuple[int, int], dtype: torch.dtype) -> None:
        self.logits, self.dtype = logits, dtype
        _, _, h, w = logits.shape
        self.top, self.bottom, self.weight = _weights(h, size[0], dtype)
        self.columns = interpolation_matrix(w, size[1], dtype).t().contiguous().to(logits.device)
        self.first, self.last = 0, 0  # low-resolution rows held in `wide`
        self.wide = self._widen(0, 0)

    def _widen(self, first: int, last: int) -> Tensor:
        rows = self.logits[:, :, first:last].to(self.dtype).permute(2, 0, 1, 3)  # (k, N, C, w)
        return rows @ self.columns  # (k, N, C, W)

    def band(self, y0: int, y1: int) -> Tensor:
        """Image rows y0..y1 of the resized logits, (rows, N, C, W)."""
        first, last = int(self.top[y0]), int(self.bottom[y1 - 1]) + 1
        if first > self.last:
            self.first = self.last = first
            self.wide = self.wide[:0]
        # Neighbouring bands share low-resolution rows: keep those, widen only the new ones.
        self.wide = torch.cat([self.wide[first - self.first :], self._widen(self.last, last)])
        self.first, self.last = first, max(last, self.last)
        k, N, C, W = self.wide.shape
        mix = torch.zeros(y1 - y0, k, dtype=self.dtype)
        weight = self.weight[y0:y1, None]
        mix.scatter_add_(1, self.top[y0:y1, None] - first, 1 - weight)
        mix.scatter_add_(1, self.bottom[y0:y1, None] - first, weight)
        return (mix.to(self.wide.device) @ self.wide.view(k, -1)).view(-1, N, C, W)


def _check(logits: Sequence[Tensor], size: tuple[int, int]) -> tuple[list[Tensor], int, int]:
    logits = [logits] if isinstance(logits, Tensor) else list(logits)
    if not logits:
        raise ValueError("logits is empty: give one (N, C, h, w) tensor per scale")
    for i, one in enumerate(logits):
        if one.ndim != 4 or not one.is_floating_point() or 0 in one.shape:
            raise ValueError(
                f"logits[{i}] is {one.dtype} of shape {tuple(one.shape)}; "
                "give a floating-point (N, C, h, w) tensor that is not empty"
            )
        if one.shape[:2] != logits[0].shape[:2]:
            raise ValueError(
                f"logits[{i}] has (N, C) = {tuple(one.shape[:2])} but logits[0] has "
                f"{tuple(logits[0].shape[:2])}; all scales must show the same images and classes"
            )
        if one.device != logits[0].device:
            raise ValueError(f"logits[{i}] is on {one.device}, logits[0] on {logits[0].device}")
    try:
        H, W = (int(side) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"size is {size!r}; give (height, width) in pixels") from None
    if H < 1 or W < 1:
        raise ValueError(f"size is {size!r}; give (height, width) of at least 1 pixel")
    return logits, H, W


def _bands(logits: list[Tensor], H: int, W: int, softmax: bool) -> Iterator[tuple[int, Tensor]]:
    """(first row, (rows, N, C, W) mean over scales) from top to bottom."""
    N, C = logits[0].shape[:2]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
    device = logits[0].device
    budget = _BAND_CPU if device.type == "cpu" else _BAND_DEVICE
    rows = max(1, min(H, budget // (N * C * W)))
    scales = [_Rows(x.detach(), (H, W), dtype) for x in logits]
    for y0 in range(0, H, rows):
        y1 = min(y0 + rows, H)
        # Under autocast the products would run in half precision.
        with torch.autocast(device.type, enabled=False):
            total = None
            for scale in scales:
                x = scale.band(y0, y1)
                if softmax:
                    x = torch.softmax(x, dim=2)
                total = x if total is None else total.add_(x)
            assert total is not None
            if len(scales) > 1:
                total /= len(scales)
        yield y0, total


@torch.no_grad()
def class_map(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Most probable class of every pixel: argmax of the mean of the scales' softmax.

    Args:
        logits: one (N, C, h, w) tensor per scale or flip, any floating type, h and w its own;
            computed in float32 (float64 when given).
        size: (H, W) of the class map, in pixels.

    Returns:
        (N, H, W) int64 on the logits' device.

    Raises:
        ValueError: no logits, different N or C, or a size that is not two positive integers.

    Example:
        >>> class_map([torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]]])], (1, 4))
        tensor([[[1, 1, 0, 0]]])
    """
    logits, H, W = _check(logits, size)
    labels = torch.empty(logits[0].shape[0], H, W, dtype=torch.int64, device=logits[0].device)
    # One scale needs no softmax: it keeps the order of the classes.
    for y0, band in _bands(logits, H, W, softmax=len(logits) > 1):
        labels[:, y0 : y0 + len(band)] = band.argmax(dim=2).transpose(0, 1)
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
        (y0, probabilities): the first image row of the band, and (N, C, rows, W) float32 (float64
        when given) summing to 1 over C.

    Raises:
        ValueError: as for `class_map`.
    """
    logits, H, W = _check(logits, size)
    for y0, band in _bands(logits, H, W, softmax=True):
        yield y0, band.permute(1, 2, 0, 3)


@torch.no_grad()
def probabilities(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean over scales of the softmax of the resized logits, (N, C, H, W); sums to 1 over C.

    This holds all classes at full size; `probability_bands` does not.

    Args:
        logits: as for `class_map`.
        size: (H, W), in pixels.

    Returns:
        (N, C, H, W) float32 (float64 when given).

    Raises:
        ValueError: as for `class_map`.
    """
    bands = [band for _, band in probability_bands(logits, size)]
    return torch.cat(bands, dim=2)
