"""Logits of all scales and flips -> class map, without classes x height x width at full size.

The published procedure resizes the logits of every scale to the image, takes the softmax over
the classes, averages over the scales and takes the argmax. At 150 classes that is gigabytes for
one photograph. Bilinear resizing is separable, and an image row mixes just two rows of the
logits, so the same result can be had one band of image rows at a time: widen the logits' rows to
the image's width as they are reached, mix two of them for each image row, and let the band go.
Small bands also stay in the processor's cache, which makes this several times faster.

That is the plain form, which runs everywhere. On CUDA `class_map` uses the kernels of
`mit_semseg.fused_scores` once they have proven themselves on the device against the plain form.
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

# Elements of one band (all samples and classes): small enough for a processor's cache, large
# enough to keep an accelerator busy.
_BAND_CPU = 1 << 20
_BAND_DEVICE = 1 << 23

# Where the fused kernels are tried, and what came of it: device and dtype -> why they cannot be
# used there, None when they can.
_FUSED_DEVICES = ("cuda",)
_verdicts: dict[tuple[torch.device, torch.dtype], str | None] = {}
_trial = threading.Lock()


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
        self.weight = to_device(weight, logits.device).view(H, 1, 1, 1)
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
    """(first row, mean over scales (rows, N, C, W), scratch of that shape) from top to bottom.

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
        yield y0, mean if softmax else resized, prob


def _labels(logits: list[Tensor], H: int, W: int, dtype: torch.dtype) -> Tensor:
    """`class_map` in the plain form."""
    N, C, _, _ = logits[0].shape
    labels = torch.empty(N, H, W, dtype=dtype, device=logits[0].device)
    rank: Tensor | None = None
    # The softmax keeps the order of the classes: one scale does without it.
    for y0, band, scratch in _bands(logits, H, W, softmax=len(logits) > 1):
        if rank is None:
            rank = torch.arange(C, 0, -1, dtype=band.dtype, device=band.device).view(C, 1)
        # The first class that has the maximum. max(dim) and argmax say so too, but on CPUs these
        # simple passes over a band in the cache are more than twice as fast.
        torch.eq(band, band.amax(dim=2, keepdim=True), out=scratch)
        first = C - scratch.mul_(rank).amax(dim=2)
        # NaN equals nothing, which leaves C; class 0 then, as from the kernels.
        labels[:, y0 : y0 + len(band)] = first.remainder_(C).transpose(0, 1)
    return labels


def _fused() -> Any:
    """The module of the kernels. Imported when needed: it takes time, and triton is not all over.

    Raises:
        ImportError: there is no triton, or one that is too old or broken.
    """
    try:
        from mit_semseg import fused_scores
    except (AttributeError, OSError, RuntimeError) as error:
        raise ImportError(f"triton does not load: {error}") from error
    return fused_scores


def _why_not_fused(logits: list[Tensor]) -> str | None:
    """Why the fused kernels cannot take these logits; None when they can."""
    device = logits[0].device
    if device.type not in _FUSED_DEVICES:
        return f"the logits are on {device}, not on CUDA"
    if any(x.dtype == torch.float64 for x in logits):
        return "it computes in float32, and there are float64 logits"
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
    """Run the kernels on something small: what is wrong with them, None when they are right."""
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
            raise  # says nothing about the kernels
        except fused.FAILURES as error:
            return one_line(error, 300, named=True)
        if labels.min() < 0 or labels.max() >= shapes[0][1]:
            return f"it gives labels from {int(labels.min())} to {int(labels.max())}"
        expected = probabilities(scales, (H, W)).cpu()
        # A pixel may only differ where two classes are tied.
        gap = expected.amax(dim=1) - expected.gather(1, labels[:, None])[:, 0]
        if not gap.max() <= 1e-5:
            return f"its labels are less probable than the plain form's, by up to {gap.max():.1e}"
    return None


@torch.no_grad()
def class_map(
    logits: Sequence[Tensor],
    size: tuple[int, int],
    fused: bool | None = None,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Most probable class of every pixel: argmax of the mean of the scales' softmax.

    Args:
        logits: one (N, C, h, w) tensor per scale or flip, of any floating type, each with its own
            h and w. Computed in float32, in float64 when one is.
        size: (H, W) of the class map, in pixels.
        fused: None: with the Triton kernels on CUDA where they work, else in bands; False: in
            bands; True: with the kernels, or not at all. Labels differ at most where classes tie.
        dtype: of the class map; a smaller one (see `label_dtype`) takes an eighth of the memory.

    Returns:
        (N, H, W) on the logits' device; of classes that are equal, the first. On the CPU if the
        logits are on several devices.

    Raises:
        ValueError: no logits, differing N or C, a size that is not two positive integers, or
            `fused` is True and the kernels cannot be used.

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
            fix = "leave fused at None for the plain form"
            raise ValueError(f"fused=True, but {reason}; {fix}")
    return _labels(scales, H, W, dtype)


def label_dtype(num_class: int) -> torch.dtype:
    """The smallest type of class ids 0..num_class-1: uint8 or int16."""
    return torch.uint8 if num_class <= 256 else torch.int16


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
    for y0, band, _ in _bands(*_check(logits, size), softmax=True):
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
    for y0, band, _ in _bands(scales, H, W, softmax=True):
        if result is None:
            result = band.new_empty(N, C, H, W)
        result[:, :, y0 : y0 + len(band)] = band.permute(1, 2, 0, 3)
    assert result is not None
    return result
