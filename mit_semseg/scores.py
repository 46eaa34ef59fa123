"""Class maps and probabilities from the logits of several scales, in bounded memory.

The published procedure resizes the logits of every scale to the image, takes the softmax over
the classes, averages over the scales and takes the argmax. With 150 classes this takes gigabytes
for a photograph. Bilinear resizing is separable, and each image row depends on two rows of the
logits; the result is therefore computed in bands of image rows: rows of logits are resized to the
width of the image when they are needed, and two of them are interpolated for each image row. Small
bands also fit the CPU's cache, which makes this several times faster.

This implementation works on any device. On CUDA `class_map` uses the kernels of
`mit_semseg.fused_scores`, after a test on the device that compares the two.
"""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mit_semseg.errors import one_line
from mit_semseg.matrices import to_device

log = logging.getLogger("mit_semseg")

# Elements of a band (all samples and classes): small enough for a CPU's cache, large enough to
# occupy a GPU.
_BAND_CPU = 1 << 20
_BAND_DEVICE = 1 << 23

# Results of testing the fused kernels: (device, dtype) -> why they cannot be used, None if they
# can.
_FUSED_DEVICES = ("cuda",)
_verdicts: dict[tuple[torch.device, torch.dtype], str | None] = {}
_trial = threading.Lock()


def interpolation_weights(
    n_in: int, n_out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices and weights of bilinear resizing of one axis, as torch with `align_corners=False`.

    Output i is `(1 - weight[i]) * x[left[i]] + weight[i] * x[right[i]]`.

    Args:
        n_in: length before.
        n_out: length after.
        dtype: floating-point type of the weights and their computation; torch uses the data's.

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
    """The logits of one scale, resized in bands from top to bottom."""

    def __init__(self, logits: Tensor, H: int, W: int, dtype: torch.dtype) -> None:
        self.logits, self.W, self.dtype = logits, W, dtype
        above, below, weight = interpolation_weights(logits.shape[2], H, dtype)
        self.above, self.below = above.tolist(), below.tolist()
        self.weight = to_device(weight, logits.device).view(H, 1, 1, 1)
        self.wide: dict[int, Tensor] = {}

    def _widen(self, *rows: int) -> list[Tensor]:
        """Rows of the logits resized to the width of the image, (N, C, W) each."""
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
        """Write the resized logits of the image rows from y0 to out, (rows, N, C, W)."""
        start, end = y0, y0 + len(out)
        while start < end:
            # All image rows that depend on the same two rows of logits together.
            stop = start + 1
            while stop < end and self.above[stop] == self.above[start]:
                stop += 1
            above, below = self._widen(self.above[start], self.below[start])
            torch.lerp(above, below, self.weight[start:stop], out=out[start - y0 : stop - y0])
            start = stop


def _check(logits: Sequence[Tensor], size: tuple[int, int]) -> tuple[list[Tensor], int, int]:
    """Check the arguments; returns a list of logits on one device, H and W."""
    scales = [logits] if isinstance(logits, Tensor) else list(logits)
    if not scales:
        raise ValueError("logits is empty: give one (N, C, h, w) tensor per scale")
    for i, x in enumerate(scales):
        if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape:
            raise ValueError(
                f"logits[{i}] is {x.dtype} of shape {tuple(x.shape)}; "
                "give a non-empty floating-point (N, C, h, w) tensor"
            )
        if x.shape[:2] != scales[0].shape[:2]:
            raise ValueError(
                f"logits[{i}] has (N, C) = {tuple(x.shape[:2])}, but logits[0] has "
                f"{tuple(scales[0].shape[:2])}; they must be the same"
            )
    try:
        H, W = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"size is {size!r}; give (height, width), two integers") from None
    if H < 1 or W < 1:
        raise ValueError(f"size is {size!r}; give a height and width of at least 1 pixel")
    together = len({x.device for x in scales}) == 1
    return [x.detach() if together else x.detach().cpu() for x in scales], H, W


def _bands(
    logits: list[Tensor], H: int, W: int, softmax: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (first row, mean over scales (rows, N, C, W), scratch tensor of that shape).

    All bands share the same memory: the next one overwrites it.
    """
    N, C, _, _ = logits[0].shape
    device = logits[0].device
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
    budget = _BAND_CPU if device.type == "cpu" else _BAND_DEVICE
    rows = max(1, min(H, budget // (N * C * W)))
    scales = [_Scale(x, H, W, dtype) for x in logits]
    # Reused for all bands: allocation would take longer than the computation.
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
        yield y0, mean if softmax else resized, prob


def _labels(logits: list[Tensor], H: int, W: int, dtype: torch.dtype) -> Tensor:
    """`class_map` in bands."""
    N, C, _, _ = logits[0].shape
    labels = torch.empty(N, H, W, dtype=dtype, device=logits[0].device)
    rank: Tensor | None = None
    # The softmax does not change the argmax of a single scale.
    for y0, band, scratch in _bands(logits, H, W, softmax=len(logits) > 1):
        if rank is None:
            rank = torch.arange(C, 0, -1, dtype=band.dtype, device=band.device).view(C, 1)
        # Index of the first maximum. On CPUs these passes over a band in the cache are more than
        # twice as fast as max(dim) and argmax.
        torch.eq(band, band.amax(dim=2, keepdim=True), out=scratch)
        first = C - scratch.mul_(rank).amax(dim=2)
        # NaN is not equal to anything, which gives C: class 0 then, as from the kernels.
        labels[:, y0 : y0 + len(band)] = first.remainder_(C).transpose(0, 1)
    return labels


def _fused() -> Any:
    """The module of the kernels, imported on first use.

    Raises:
        ImportError: triton is missing, too old or broken.
    """
    try:
        from mit_semseg import fused_scores
    except (AttributeError, OSError, RuntimeError) as error:
        raise ImportError(f"triton does not load: {error}") from error
    return fused_scores


def _why_not_fused(logits: list[Tensor]) -> str | None:
    """Why the fused kernels cannot be used for these logits; None if they can."""
    device = logits[0].device
    if device.type not in _FUSED_DEVICES:
        return f"the logits are on {device}, not on CUDA"
    if any(x.dtype == torch.float64 for x in logits):
        return "it computes in float32, but there are float64 logits"
    same = len({x.dtype for x in logits}) == 1
    key = (device, logits[0].dtype if same else torch.float32)
    with _trial:
        if key not in _verdicts:
            reason = _try_fused(*key)
            if reason is not None and reason not in _verdicts.values():
                log.warning(
                    "class maps on %s are computed without the fused kernel: %s", device, reason
                )
            _verdicts[key] = reason
        return _verdicts[key]


def _try_fused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Test the kernels with a small input; returns an error, or None if they are correct."""
    try:
        fused = _fused()
    except ImportError as error:
        return one_line(error, 300, named=True)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 11, 5, 7), (2, 11, 9, 4)]
    logits = [(4 * torch.randn(x, generator=generator)).to(device, dtype) for x in shapes]
    H, W = 13, 17
    for scales in (logits, logits[:1]):
        try:
            labels = fused.class_map(scales, (H, W)).cpu()
        except torch.cuda.OutOfMemoryError:
            raise  # not an error of the kernels
        except fused.FAILURES as error:
            return one_line(error, 300, named=True)
        if labels.min() < 0 or labels.max() >= shapes[0][1]:
            return f"it returns labels from {int(labels.min())} to {int(labels.max())}"
        expected = probabilities(scales, (H, W)).cpu()
        # Labels may differ only between classes with equal probabilities.
        gap = expected.amax(dim=1) - expected.gather(1, labels[:, None])[:, 0]
        if not gap.max() <= 1e-5:
            return f"its labels have probabilities below the maximum by up to {gap.max():.1e}"
    return None


@torch.no_grad()
def class_map(
    logits: Sequence[Tensor],
    size: tuple[int, int],
    fused: bool | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Most probable class of every pixel: argmax of the mean over scales of the softmax.

    Args:
        logits: one (N, C, h, w) tensor per scale or flip, of any floating-point type; h and w may
            differ. Computed in float32, or in float64 if one of them is float64.
        size: (H, W) of the class map, in pixels.
        fused: None uses the Triton kernels on CUDA if they work, else bands; False uses bands; True
            the kernels. Labels differ only where classes have equal probabilities.
        dtype: of the class map; a smaller one (see `label_dtype`) takes an eighth of the memory.

    Returns:
        (N, H, W) on the device of the logits, or on the CPU if they are on several devices. The
        first of several classes with equal probabilities.

    Raises:
        ValueError: no logits, different N or C, an invalid size, or `fused` is True and the kernels
            cannot be used.

    Example:
        >>> class_map([torch.tensor([[[[0.0, 2.0]], [[1.0, 1.0]]]])], (1, 4))
        tensor([[[1, 1, 0, 0]]])
    """
    scales, H, W = _check(logits, size)
    if fused is not False:
        reason = _why_not_fused(scales)
        if reason is None:
            return _fused().class_map(scales, (H, W)).to(dtype)
        if fused:
            raise ValueError(f"fused=True, but {reason}; use fused=None")
    return _labels(scales, H, W, dtype)


@torch.no_grad()
def confidence_map(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Probability of the most probable class of every pixel, in bounded memory.

    Args:
        logits: as for `class_map`.
        size: (H, W) of the map, in pixels.

    Returns:
        (N, H, W) float32 (float64 if a scale is): the maximum of the mean over scales of the
        softmax.

    Raises:
        ValueError: as for `class_map`.
    """
    scales, H, W = _check(logits, size)
    bands = [band.amax(dim=2) for _, band, _ in _bands(scales, H, W, softmax=True)]
    return torch.cat(bands).transpose(0, 1)


@torch.no_grad()
def entropy_map(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Entropy of the class probabilities of every pixel, in nats, in bounded memory.

    Args:
        logits: as for `class_map`.
        size: (H, W) of the map, in pixels.

    Returns:
        (N, H, W) float32 (float64 if a scale is): of the mean over scales of the softmax, from 0
        to the logarithm of the number of classes.

    Raises:
        ValueError: as for `class_map`.
    """
    scales, H, W = _check(logits, size)
    bands = [
        torch.special.entr(band).sum(dim=2) for _, band, _ in _bands(scales, H, W, softmax=True)
    ]
    return torch.cat(bands).transpose(0, 1)


def label_dtype(num_class: int) -> torch.dtype:
    """The smallest dtype for class ids 0..num_class-1: uint8 or int16."""
    return torch.uint8 if num_class <= 256 else torch.int16


@torch.no_grad()
def probability_bands(
    logits: Sequence[Tensor], size: tuple[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Class probabilities of an image in bands of rows, with bounded memory.

    Args:
        logits: as for `class_map`.
        size: (H, W) of the image, in pixels.

    Yields:
        (y0, probabilities): the first image row of the band, and the mean over scales of the
        softmax, (N, C, rows, W) float32 (float64 if a scale is).

    Raises:
        ValueError: as for `class_map`, before the first band.
    """
    for y0, band, _ in _bands(*_check(logits, size), softmax=True):
        yield y0, band.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def probabilities(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Class probabilities of a whole image; see `probability_bands` for less memory.

    Args:
        logits: as for `class_map`.
        size: (H, W), in pixels.

    Returns:
        (N, C, H, W) float32 (float64 if a scale is): the mean over scales of the softmax.

    Raises:
        ValueError: as for `class_map`.
    """
    scales, H, W = _check(logits, size)
    N, C, _, _ = scales[0].shape
    result: Tensor | None = None
    for y0, band, _ in _bands(scales, H, W, softmax=True):
        if result is None:
            result = band.new_empty(N, C, H, W)
        result[:, :, y0 : y0 + len(band)] = band.permute(1, 2, 0, 3)
    assert result is not None
    return result
