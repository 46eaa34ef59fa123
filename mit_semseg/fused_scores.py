"""Triton kernels that compute a class map from the logits of several scales in two launches.

The implementation in `mit_semseg.scores` writes a band of all classes to memory several times. Here
each thread handles a pixel and reads its classes twice: first for the maximum and the sum of
exponentials per scale, then for the sum of probabilities and the best class. Only these two numbers
per pixel and scale, and the labels, are written.

This module needs triton; `mit_semseg.scores.class_map` imports it on demand. The kernels use only
features of triton 3.0 and one-dimensional blocks, since the thread layout of two-dimensional
blocks, and with it the speed, differs between releases. Annotations are not postponed: the
interpreter of triton 3.0 does not accept them as strings.
"""

import subprocess
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from mit_semseg.matrices import to_device

# Errors of triton: its own; a missing driver or C compiler, or an unsupported GPU; a failing
# compiler; a cache that cannot be written; and errors from a changed interface in other releases.
FAILURES: tuple[type[Exception], ...] = (
    TritonError,
    RuntimeError,
    subprocess.CalledProcessError,
    OSError,
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Pixels per program, one per thread.
_PIXELS = 128
_LAUNCH = {"P": _PIXELS, "num_warps": 4, "enable_fp_fusion": True}
# Elements of the maxima, and of the sums, of a band of rows: 16 MiB together.
_STATISTICS = 1 << 21
# Logits up to this size in total are made contiguous, for coalesced reads.
_COPY_BYTES = 1 << 25
# Columns of the table of scales: address, four strides, h, w.
_COLUMNS = tl.constexpr(7)
# Classes per iteration of the label kernel.
_TOGETHER = tl.constexpr(8)


@triton.jit
def _corners(
    table: tl.tensor,
    steps: tl.tensor,
    like: tl.tensor,
    scale: tl.tensor,
    n: tl.tensor,
    y: tl.tensor,
    x: tl.tensor,
) -> tl.tensor:
    """Addresses of a pixel's four neighbours in class 0, weights (down, right), and class stride.

    As `scores.interpolation_weights`. 64-bit arithmetic, since logits may have more than 2^32
    elements.
    """
    row = table + scale * _COLUMNS
    plane = tl.load(row).to(like.dtype) + n * tl.load(row + 1)
    stride_c = tl.load(row + 2)
    stride_y = tl.load(row + 3)
    stride_x = tl.load(row + 4)
    last_y = tl.load(row + 5) - 1
    last_x = tl.load(row + 6) - 1
    at_y = tl.load(steps + scale * 2) * (y.to(tl.float32) + 0.5) - 0.5
    at_x = tl.load(steps + scale * 2 + 1) * (x.to(tl.float32) + 0.5) - 0.5
    at_y = tl.minimum(tl.maximum(at_y, 0.0), last_y.to(tl.float32))
    at_x = tl.minimum(tl.maximum(at_x, 0.0), last_x.to(tl.float32))
    top = at_y.to(tl.int64)
    left = at_x.to(tl.int64)
    upper = plane + top * stride_y
    lower = plane + tl.minimum(top + 1, last_y) * stride_y
    near = left * stride_x
    far = tl.minimum(left + 1, last_x) * stride_x
    down = at_y - top.to(tl.float32)
    across = at_x - left.to(tl.float32)
    return upper + near, upper + far, lower + near, lower + far, down, across, stride_c


@triton.jit
def _logit(
    upper_left: tl.tensor,
    upper_right: tl.tensor,
    lower_left: tl.tensor,
    lower_right: tl.tensor,
    down: tl.tensor,
    across: tl.tensor,
    offset: tl.tensor,
) -> tl.tensor:
    """The resized logit of the class whose plane is `offset` elements after that of class 0."""
    a = tl.load(upper_left + offset).to(tl.float32)
    b = tl.load(upper_right + offset).to(tl.float32)
    c = tl.load(lower_left + offset).to(tl.float32)
    d = tl.load(lower_right + offset).to(tl.float32)
    above = a + across * (b - a)
    below = c + across * (d - c)
    return above + down * (below - above)


# Not specialised for values that differ between images: sizes and addresses.
@triton.jit(do_not_specialize=["like", "peaks", "weights", "C", "W", "y0", "count"])
def _statistics_kernel(
    table: tl.tensor,
    steps: tl.tensor,
    like: tl.tensor,
    peaks: tl.tensor,
    weights: tl.tensor,
    C: tl.tensor,
    W: tl.tensor,
    y0: tl.tensor,
    count: tl.tensor,
    P: tl.constexpr,
) -> None:
    """Maximum over the classes, and 1 / sum of exp(logit - maximum): (S, N, count) each.

    Programs: blocks of the band's pixels x scales x samples.
    """
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    scale = tl.program_id(1)
    n = tl.program_id(2)
    # Threads beyond the last pixel repeat it.
    at = tl.minimum(pixel, count - 1)
    ul, ur, ll, lr, down, across, stride_c = _corners(
        table, steps, like, scale, n, y0 + at // W, at % W
    )
    peak = _logit(ul, ur, ll, lr, down, across, 0 * stride_c)
    total = tl.zeros([P], tl.float32)
    # Four classes per iteration, to overlap their loads.
    for first in range(0, C, 4):
        # Classes beyond the last one repeat it and are masked below.
        x0 = _logit(ul, ur, ll, lr, down, across, first * stride_c)
        x1 = _logit(ul, ur, ll, lr, down, across, tl.minimum(first + 1, C - 1) * stride_c)
        x2 = _logit(ul, ur, ll, lr, down, across, tl.minimum(first + 2, C - 1) * stride_c)
        x3 = _logit(ul, ur, ll, lr, down, across, tl.minimum(first + 3, C - 1) * stride_c)
        higher = tl.maximum(peak, tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)))
        total = total * tl.exp(peak - higher) + tl.exp(x0 - higher)
        total += tl.where(first + 1 < C, tl.exp(x1 - higher), 0.0)
        total += tl.where(first + 2 < C, tl.exp(x2 - higher), 0.0)
        total += tl.where(first + 3 < C, tl.exp(x3 - higher), 0.0)
        peak = higher
    out = (scale * tl.num_programs(2) + n) * count + pixel
    tl.store(peaks + out, peak, mask=pixel < count)
    tl.store(weights + out, 1.0 / total, mask=pixel < count)


@triton.jit
def _score(
    upper_left: tl.tensor,
    upper_right: tl.tensor,
    lower_left: tl.tensor,
    lower_right: tl.tensor,
    down: tl.tensor,
    across: tl.tensor,
    offset: tl.tensor,
    peak: tl.tensor,
    weight: tl.tensor,
    SOFTMAX: tl.constexpr,
) -> tl.tensor:
    """Probability of a class in one scale; its logit if there is a single scale."""
    score = _logit(upper_left, upper_right, lower_left, lower_right, down, across, offset)
    if SOFTMAX:
        score = tl.exp(score - peak) * weight
    return score


@triton.jit(do_not_specialize=["like", "peaks", "weights", "S", "C", "H", "W", "y0", "count"])
def _labels_kernel(
    table: tl.tensor,
    steps: tl.tensor,
    like: tl.tensor,
    peaks: tl.tensor,
    weights: tl.tensor,
    labels: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    y0: tl.tensor,
    count: tl.tensor,
    SOFTMAX: tl.constexpr,
    P: tl.constexpr,
) -> None:
    """First class with the largest sum of probabilities: labels (N, H, W) int64.

    Programs: blocks of the band's pixels x samples.
    """
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    n = tl.program_id(1)
    at = tl.minimum(pixel, count - 1)
    y = y0 + at // W
    x = at % W
    best = tl.full([P], float("-inf"), tl.float32)
    label = tl.zeros([P], tl.int64)
    # Eight classes per iteration share the addresses of a pixel. Unrolled by hand, since triton
    # 3.0 has no lists of blocks.
    for first in range(0, C, _TOGETHER):
        # Classes beyond the last one repeat it, which does not change the maximum.
        c1 = tl.minimum(first + 1, C - 1)
        c2 = tl.minimum(first + 2, C - 1)
        c3 = tl.minimum(first + 3, C - 1)
        c4 = tl.minimum(first + 4, C - 1)
        c5 = tl.minimum(first + 5, C - 1)
        c6 = tl.minimum(first + 6, C - 1)
        c7 = tl.minimum(first + 7, C - 1)
        s0 = tl.zeros([P], tl.float32)
        s1 = s0
        s2 = s0
        s3 = s0
        s4 = s0
        s5 = s0
        s6 = s0
        s7 = s0
        for scale in range(S):
            ul, ur, ll, lr, u, v, step = _corners(table, steps, like, scale, n, y, x)
            m = s0
            w = s0
            if SOFTMAX:
                where = (scale * tl.num_programs(1) + n) * count + at
                m = tl.load(peaks + where)
                w = tl.load(weights + where)
            s0 += _score(ul, ur, ll, lr, u, v, first * step, m, w, SOFTMAX)
            s1 += _score(ul, ur, ll, lr, u, v, c1 * step, m, w, SOFTMAX)
            s2 += _score(ul, ur, ll, lr, u, v, c2 * step, m, w, SOFTMAX)
            s3 += _score(ul, ur, ll, lr, u, v, c3 * step, m, w, SOFTMAX)
            s4 += _score(ul, ur, ll, lr, u, v, c4 * step, m, w, SOFTMAX)
            s5 += _score(ul, ur, ll, lr, u, v, c5 * step, m, w, SOFTMAX)
            s6 += _score(ul, ur, ll, lr, u, v, c6 * step, m, w, SOFTMAX)
            s7 += _score(ul, ur, ll, lr, u, v, c7 * step, m, w, SOFTMAX)
        # In order, and only if larger: the lowest of equal classes, as torch.max.
        label = tl.where(s0 > best, first, label)
        best = tl.maximum(best, s0)
        label = tl.where(s1 > best, c1, label)
        best = tl.maximum(best, s1)
        label = tl.where(s2 > best, c2, label)
        best = tl.maximum(best, s2)
        label = tl.where(s3 > best, c3, label)
        best = tl.maximum(best, s3)
        label = tl.where(s4 > best, c4, label)
        best = tl.maximum(best, s4)
        label = tl.where(s5 > best, c5, label)
        best = tl.maximum(best, s5)
        label = tl.where(s6 > best, c6, label)
        best = tl.maximum(best, s6)
        label = tl.where(s7 > best, c7, label)
        best = tl.maximum(best, s7)
    out = (n.to(tl.int64) * H + y) * W + x
    tl.store(labels + out, label, mask=pixel < count)


def _prepared(logits: Sequence[Tensor]) -> list[Tensor]:
    """The logits in one dtype, and contiguous unless the copy would be large."""
    dtype = logits[0].dtype
    if dtype not in DTYPES or any(x.dtype != dtype for x in logits):
        logits = [x.float() for x in logits]
    if sum(x.numel() * x.element_size() for x in logits) <= _COPY_BYTES:
        logits = [x.contiguous() for x in logits]
    return list(logits)


def class_map(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Most probable class of every pixel; see `mit_semseg.scores.class_map`, which checks them.

    Args:
        logits: (N, C, h, w) each, on one CUDA device, of any strides. Other types than float32,
            bfloat16 and float16, and mixed types, are converted to float32.
        size: (H, W).

    Returns:
        (N, H, W) int64 on the logits' device.
    """
    scales = _prepared(logits)
    (N, C, _, _), (H, W), S = scales[0].shape, size, len(scales)
    device = scales[0].device
    # Addresses and strides are in a table: one compiled kernel for any number and size of scales.
    table = to_device(
        torch.tensor([[x.data_ptr(), *x.stride(), *x.shape[2:]] for x in scales]), device
    )
    # Division in float32, as in torch.
    sides = torch.tensor([x.shape[2:] for x in scales], dtype=torch.float32)
    steps = to_device(sides / torch.tensor([H, W]), device)
    softmax = S > 1
    rows = max(1, min(H, (_STATISTICS // (S * N) if softmax else 1 << 30) // W))
    peaks, weights = torch.empty(2, S * N * rows * W if softmax else 1, device=device)
    labels = torch.empty(N, H, W, dtype=torch.int64, device=device)
    common = (table, steps, scales[0], peaks, weights)
    with torch.cuda.device_of(labels):
        for y0 in range(0, H, rows):
            count = min(rows, H - y0) * W
            blocks = triton.cdiv(count, _PIXELS)
            if softmax:
                _statistics_kernel[(blocks, S, N)](*common, C, W, y0, count, **_LAUNCH)
            _labels_kernel[(blocks, N)](
                *common, labels, S, C, H, W, y0, count, SOFTMAX=softmax, **_LAUNCH
            )
    return labels
