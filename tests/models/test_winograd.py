"""Wide 3x3 convolutions of a network that predicts on a CPU."""

import pytest
import torch
from torch import nn

from mit_semseg.models.decoders import DECODERS
from mit_semseg.models.inference import inference_copy
from mit_semseg.models.module import SegmentationModule
from mit_semseg.models.pyramid import PyramidConv2d
from mit_semseg.models.winograd import WinogradConv2d, WinogradPyramidConv2d, use_winograd


def inputs(channels, size, dtype):
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def scaled(conv, dtype):
    """Filters that give outputs of variance 1."""
    torch.manual_seed(1)
    nn.init.normal_(conv.weight, std=(9 * conv.in_channels) ** -0.5)
    return conv.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 14), (23, 16)])
@torch.no_grad()
def test_equals_the_direct_convolution(dilation, size):
    conv = nn.Conv2d(8, 5, 3, padding=dilation, dilation=dilation)
    conv, x = scaled(conv, torch.float64), inputs(8, size, torch.float64)
    fast = WinogradConv2d(conv)
    torch.testing.assert_close(fast.convolve(x), conv(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(fast(x), conv(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_blocks_of_tiles_join_without_a_seam(monkeypatch):
    conv = scaled(nn.Conv2d(16, 8, 3, padding=2, dilation=2), torch.float32)
    x = inputs(16, (31, 22), torch.float32)
    monkeypatch.setattr("mit_semseg.models.winograd._BLOCK", 1)
    torch.testing.assert_close(WinogradConv2d(conv)(x), conv(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 0.008)])
@torch.no_grad()
def test_rounding_of_a_wide_layer(dtype, most):
    """Mean error of outputs whose variance is 1: two roundings of bfloat16 in what is summed."""
    conv = scaled(nn.Conv2d(512, 256, 3, padding=1, bias=False), dtype)
    x = inputs(512, (12, 15), dtype)
    exact = nn.functional.conv2d(x.double(), conv.weight.double(), padding=1)
    assert (WinogradConv2d(conv)(x).double() - exact).abs().mean() < most


@torch.no_grad()
def test_finest_map_of_a_pyramid():
    conv = PyramidConv2d(256, 2 * 16, 256)
    conv = scaled(conv, torch.float32)
    x, pools = inputs(256, (12, 17), torch.float32), [torch.randn(2, 16, s, s) for s in (2, 6)]
    net = nn.ModuleList([conv])
    use_winograd(net)
    assert type(net[0]) is WinogradPyramidConv2d
    torch.testing.assert_close(net[0](x, pools), conv(x, pools), rtol=0, atol=1e-5)
    torch.testing.assert_close(net[0](x[:, :, :1, :1], pools), conv(x[:, :, :1, :1], pools))


def test_winograd_is_used_on_a_cpu_where_it_pays():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Conv2d(3, 256, 3, padding=1)
            self.used = nn.Conv2d(256, 256, 3, padding=2, dilation=2)
            self.strided = nn.Conv2d(256, 256, 3, stride=2, padding=1)
            self.grouped = nn.Conv2d(256, 256, 3, padding=1, groups=2)
            self.narrow = nn.Conv2d(256, 255, 3, padding=1)

        def forward(self, x, return_feature_maps=False):
            return [self.narrow(self.grouped(self.strided(self.used(self.wide(x)))))]

    decoder = DECODERS.get("c1")(channels=(255,), num_class=4)
    module = SegmentationModule(Encoder(), decoder, None).eval()
    copy = inference_copy(module, "cpu")
    again = inference_copy(copy, "cpu")
    for one in (copy, again):
        found = [name for name, m in one.named_modules() if isinstance(m, WinogradConv2d)]
        assert found == ["encoder.used"]
    x = torch.randn(1, 3, 40, 40)
    expected = module.logits(x).detach()
    torch.testing.assert_close(copy.logits(x), expected, rtol=0, atol=1e-5)
    # Compiled and traced networks keep torch's own convolution.
    traced = torch.jit.trace(copy.encoder.used, torch.randn(1, 256, 8, 8))
    assert "bmm" not in str(traced.graph)
