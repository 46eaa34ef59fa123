"""PPM decoders."""

import copy

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from torch import nn

from mit_semseg.models.decoders.ppm import PooledBatchNorm2d, PyramidConv2d


class TestPPM(DecoderTester):
    arch = "ppm"
    published = (512,)


class TestPPMDeepSup(DecoderTester):
    arch = "ppm_deepsup"
    published = (320, 512, 2048)
    needs = 2
    auxiliary = True


def test_a_single_value_is_normalised_with_running_statistics() -> None:
    torch.manual_seed(0)
    norm = PooledBatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(1, 4, 1, 1)
    wanted = (x - norm.running_mean.view(1, 4, 1, 1)) / (norm.running_var + 1e-5).sqrt().view(
        1, 4, 1, 1
    )
    assert torch.allclose(norm.train()(x), wanted, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm2d(4).train()(x)


def test_several_values_are_normalised_as_torch_does() -> None:
    torch.manual_seed(0)
    norm, oracle = PooledBatchNorm2d(4).train(), nn.BatchNorm2d(4).train()
    x = torch.randn(2, 4, 1, 1)
    assert torch.equal(norm(x), oracle(x))
    assert torch.equal(norm.running_var, oracle.running_var)


@pytest.mark.parametrize("size", [(9, 14), (4, 5), (1, 1), (57, 76)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pools_are_joined_as_if_they_were_resized(
    size: tuple[int, int], channels_last: bool
) -> None:
    torch.manual_seed(0)
    conv = PyramidConv2d(8 + 4 * 4, 6, 3, padding=1).double()
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, *size, dtype=torch.float64, requires_grad=True)
    pools = [torch.randn(2, 4, s, s, dtype=torch.float64, requires_grad=True) for s in (1, 2, 3, 6)]
    resized = [F.interpolate(pool, size, mode="bilinear", align_corners=False) for pool in pools]
    plain = F.conv2d(torch.cat([x, *resized], dim=1), conv.weight, conv.bias, padding=1)
    fast = conv(x, pools)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
    towards = torch.randn_like(plain)
    inputs = [x, *pools, *conv.parameters()]
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
