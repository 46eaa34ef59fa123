"""Convolution of maps of several resolutions, against torch's on the resized ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import rounding

from mit_semseg import matrices
from mit_semseg.models import pyramid
from mit_semseg.models.pyramid import PyramidConv2d, Tile, pooled, resize_within

POOLS = ((1, 1), (2, 2), (3, 3), (6, 6))
LEVELS = ((29, 38), (15, 19), (7, 10))


@pytest.mark.parametrize(
    ("size", "coarser"),
    [((9, 14), POOLS), ((4, 5), POOLS), ((1, 1), POOLS), ((57, 76), POOLS), ((57, 76), LEVELS)],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_coarser_maps_are_convolved_as_if_they_were_resized(size, coarser, channels_last):
    torch.manual_seed(0)
    conv = PyramidConv2d(8, len(coarser) * 4, 6).double()
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    maps = [torch.randn(2, 4, *s, dtype=torch.float64, requires_grad=True) for s in coarser]
    resized = [F.interpolate(one, size, mode="bilinear", align_corners=False) for one in maps]
    plain = F.conv2d(torch.cat([x, *resized], dim=1), conv.weight, padding=1)
    with pytest.MonkeyPatch.context() as patch:  # the form of a GPU, and of a trace
        patch.setattr(pyramid, "is_plain", lambda x: False)
        torch.testing.assert_close(conv(x, maps), plain, rtol=1e-10, atol=1e-12)
    fast = conv(x, maps)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
    towards = torch.randn_like(plain)
    inputs = [x, *maps, *conv.parameters()]
    for given, wanted in zip(
        torch.autograd.grad(fast, inputs, towards), torch.autograd.grad(plain, inputs, towards)
    ):
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)


def test_pyramid_convolution_rounds_no_more_than_a_plain_one_in_bfloat16():
    torch.manual_seed(0)
    conv = PyramidConv2d(64, 4 * 16, 8)
    x, size = torch.randn(1, 64, 20, 30), (20, 30)
    pools = [torch.randn(1, 16, s, s) for s in (1, 2, 3, 6)]
    resized = [F.interpolate(pool, size, mode="bilinear", align_corners=False) for pool in pools]
    joined = torch.cat([x, *resized], dim=1)
    exact = F.conv2d(joined, conv.weight, padding=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.conv2d(joined, conv.weight, padding=1).float() - exact
        fast = conv(x, pools)
    assert fast.dtype == torch.bfloat16
    assert (fast.float() - exact).square().mean() < 2 * plain.square().mean()


@pytest.mark.parametrize(
    ("whole", "rows", "columns"),
    [((30, 41), (0, 12), (0, 41)), ((30, 41), (9, 21), (30, 41)), ((1, 50), (0, 1), (7, 8))],
)
def test_a_tile_is_convolved_as_in_the_whole(whole, rows, columns):
    """Away from the tile's own edges, at which x is padded."""
    torch.manual_seed(0)
    conv = PyramidConv2d(8, 4 * 4, 6).double()
    x = torch.randn(2, 8, *whole, dtype=torch.float64)
    maps = [torch.randn(2, 4, *s, dtype=torch.float64) for s in POOLS]
    conv.weight.data[:, :8] = 0  # so that they show what the coarser maps add up to the very edge
    here = (..., slice(*rows), slice(*columns))
    tile = Tile({}, rows[0], columns[0], *whole)
    given = conv(x[here], maps, tile)
    torch.testing.assert_close(given, conv(x, maps)[here])
    for one in maps:
        resized = F.interpolate(one, whole, mode="bilinear", align_corners=False)
        torch.testing.assert_close(resize_within(one, x[here].shape[2:], tile), resized[here])


def test_a_tile_has_the_pools_of_the_whole():
    given = {1: torch.ones(1, 3, 1, 1)}
    tile = Tile(given, 2, 3, 20, 30)
    assert torch.equal(pooled(torch.randn(1, 3, 8, 9), (1,), tile)[0], given[1])


SIZES = ((1, 1), (5, 7), (6, 6), (38, 51), (64, 84))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_pools_are_torchs(size, dtype, channels_last):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size).add_(100).to(dtype)  # sums of many such overflow float16
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    scales = (1, 2, 3, 6)
    wide = x.detach().double().requires_grad_()
    wanted = [F.adaptive_avg_pool2d(wide, scale) for scale in scales]
    given = pooled(x, scales)
    # The narrow types are summed in float32; rounding errors of a sum grow with its terms' root.
    terms = 16 if x.element_size() == 2 else max(16, size[0] * size[1])
    for a, b in zip(given, wanted, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=0, atol=rounding(x, math.isqrt(terms)))
    towards = [torch.randn_like(b) for b in wanted]
    (mine,) = torch.autograd.grad(given, x, [one.to(dtype) for one in towards])
    (its,) = torch.autograd.grad(wanted, wide, towards)
    off = rounding(its.to(dtype), 4)
    torch.testing.assert_close(mine.double(), its, rtol=0, atol=max(off, 1e-12))


def test_matrices_are_cached_but_not_on_meta():
    x = torch.randn(1, 3, 21, 13)
    pooled(x, (1, 2))
    with torch.inference_mode():
        pooled(x[..., 1:], (1, 2))
    sum(y.sum() for y in pooled(x[..., 1:].requires_grad_(), (1, 2))).backward()  # none of these
    before = {id(one) for held in matrices.MATRICES._held.values() for one in held.values()}
    pooled(x, (1, 2))
    after = {id(one) for held in matrices.MATRICES._held.values() for one in held.values()}
    assert before == after
    symbolic = x.to("meta")
    assert [tuple(y.shape) for y in pooled(symbolic, (1, 2))] == [(1, 3, 1, 1), (1, 3, 2, 2)]


def test_the_least_recently_used_matrices_are_dropped():
    cache, device = matrices.MatrixCache(limit=1000), torch.device("cpu")
    made = []

    def make(n):
        return lambda: made.append(n) or torch.full((100,), float(n))  # 400 bytes

    for n in (1, 2, 1, 3, 1, 2):
        assert cache.get(n, device, make(n))[0] == n
    assert made == [1, 2, 3, 2]
    with cache.recorded() as used:
        cache.get(2, device, make(2))
    assert [x[0] for x in used] == [2]
