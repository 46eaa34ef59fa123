"""Convolution of maps of several resolutions, against torch's on the resized ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from mit_semseg.models.pyramid import PyramidConv2d, TileFeatures, Window, pooled, spread, window_of

POOLS = ((1, 1), (2, 2), (3, 3), (6, 6))
LEVELS = ((29, 38), (15, 19), (7, 10))


@pytest.mark.parametrize(
    ("size", "coarser"),
    [((9, 14), POOLS), ((4, 5), POOLS), ((1, 1), POOLS), ((57, 76), POOLS), ((57, 76), LEVELS)],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_coarser_maps_are_joined_as_if_they_were_resized(
    size: tuple[int, int], coarser: Sequence[tuple[int, int]], channels_last: bool
) -> None:
    torch.manual_seed(0)
    conv = PyramidConv2d(8 + len(coarser) * 4, 6, 3, padding=1).double()
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    maps = [torch.randn(2, 4, *s, dtype=torch.float64, requires_grad=True) for s in coarser]
    resized = [F.interpolate(one, size, mode="bilinear", align_corners=False) for one in maps]
    plain = F.conv2d(torch.cat([x, *resized], dim=1), conv.weight, conv.bias, padding=1)
    fast = conv(x, maps)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
    towards = torch.randn_like(plain)
    inputs = [x, *maps, *conv.parameters()]
    for given, wanted in zip(
        torch.autograd.grad(fast, inputs, towards), torch.autograd.grad(plain, inputs, towards)
    ):
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)


def test_joining_rounds_no_more_than_the_plain_convolution_in_bfloat16() -> None:
    torch.manual_seed(0)
    conv = PyramidConv2d(64 + 4 * 16, 8, 3, padding=1)
    x, size = torch.randn(1, 64, 20, 30), (20, 30)
    pools = [torch.randn(1, 16, s, s) for s in (1, 2, 3, 6)]
    resized = [F.interpolate(pool, size, mode="bilinear", align_corners=False) for pool in pools]
    joined = torch.cat([x, *resized], dim=1)
    exact = F.conv2d(joined, conv.weight, conv.bias, padding=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.conv2d(joined, conv.weight, conv.bias, padding=1).float() - exact
        fast = conv(x, pools)
    assert fast.dtype == torch.bfloat16
    assert (fast.float() - exact).square().mean() < 2 * plain.square().mean()


@pytest.mark.parametrize(
    ("whole", "rows", "columns"),
    [((30, 41), (0, 12), (0, 41)), ((30, 41), (9, 21), (30, 41)), ((1, 50), (0, 1), (7, 8))],
)
def test_a_tile_is_joined_as_in_the_whole(
    whole: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    """Away from the tile's own edges, at which x is padded."""
    torch.manual_seed(0)
    conv = PyramidConv2d(8 + 4 * 4, 6, 3, padding=1).double()
    x = torch.randn(2, 8, *whole, dtype=torch.float64)
    maps = [torch.randn(2, 4, *s, dtype=torch.float64) for s in POOLS]
    conv.weight.data[:, :8] = 0  # so that they show what the coarser maps add up to the very edge
    here = (..., slice(*rows), slice(*columns))
    window = Window(rows[0], columns[0], *whole)
    torch.testing.assert_close(conv(x[here], maps, window), conv(x, maps)[here])
    for one in maps:
        resized = F.interpolate(one, whole, mode="bilinear", align_corners=False)
        torch.testing.assert_close(spread(one, x[here].shape[2:], window), resized[here])


def test_a_tile_has_the_pools_of_the_whole() -> None:
    x = torch.randn(1, 3, 8, 9)
    plain = [torch.zeros(1), x]
    assert window_of(plain) is None
    for scale, pool in zip((1, 6), pooled(plain, (1, 6))):
        assert torch.equal(pool, F.adaptive_avg_pool2d(x, scale))
    given = {1: torch.ones(1, 3, 1, 1)}
    tile = TileFeatures(plain, given, Window(2, 3, 20, 30))
    assert pooled(tile, (1,))[0] is given[1] and window_of(tile) == Window(2, 3, 20, 30)
