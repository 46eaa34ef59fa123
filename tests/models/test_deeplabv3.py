"""DeepLabv3 decoders; their results are compared with torchvision's in test_torchvision.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from pair_tester import PairTester
from torch import Tensor, nn

from mit_semseg.models import DECODERS
from mit_semseg.models.decoders.deeplabv3 import ASPP
from mit_semseg.models.pyramid import Tile


class TestDeepLabV3(DecoderTester):
    arch = "deeplabv3"


class TestDeepLabV3DeepSup(DecoderTester):
    arch = "deeplabv3_deepsup"
    min_feature_maps = 2
    auxiliary = True


class TestDeepLabV3WideDeepSup(DecoderTester):
    arch = "deeplabv3_wide_deepsup"
    min_feature_maps = 2
    auxiliary = True


class TestDeepLabV3WithResNet18(PairTester):
    encoder, decoder = "resnet18dilated", "deeplabv3_deepsup"
    stride = 8


@pytest.mark.parametrize(
    ("strides", "rates"),
    [
        (None, (6, 12, 18)),
        ((4, 8, 16, 16), (6, 12, 18)),
        ((4, 8, 8, 8), (12, 24, 36)),
        ((4, 8, 16, 32), (3, 6, 9)),
    ],
)
def test_dilations_follow_the_output_stride(
    strides: tuple[int, ...] | None, rates: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        decoder = DECODERS.get("deeplabv3")((4, 4, 4, 8), num_class=3, strides=strides)
        wide = DECODERS.get("deeplabv3_wide_deepsup")((4, 4, 4, 8), num_class=3, strides=strides)
    convs = [branch[0] for branch in decoder.aspp.convs[1:4]]
    assert tuple(conv.dilation[0] for conv in convs) == rates
    assert all(conv.padding == conv.dilation for conv in convs)
    assert [branch[0].dilation[0] for branch in wide.aspp.convs[1:4]] == [12, 24, 36]


def randomised(module: nn.Module) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return module.double().eval()


def normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Evaluation BatchNorm and ReLU, written out for (N, C, ...)."""
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    shape = (1, -1) + (1,) * (x.dim() - 2)
    shift = norm.bias - norm.running_mean * scale
    return (x * scale.view(shape) + shift.view(shape)).clamp(min=0)


def dilated(x: Tensor, weight: Tensor, rate: int) -> Tensor:
    """A 3x3 convolution as a sum over its taps, each of which reads a shifted image."""
    H, W = x.shape[-2:]
    padded = F.pad(x, (rate,) * 4)
    total = torch.zeros(x.shape[0], weight.shape[0], H, W, dtype=x.dtype)
    for i in range(3):
        for j in range(3):
            shifted = padded[:, :, i * rate : i * rate + H, j * rate : j * rate + W]
            total += torch.einsum("oc,nchw->nohw", weight[:, :, i, j], shifted)
    return total


@torch.no_grad()
def test_aspp_is_a_sum_over_its_branches() -> None:
    torch.manual_seed(0)
    aspp = randomised(ASPP(6, (1, 2, 5), width=4))
    x, mean = torch.randn(2, 6, 7, 9).double(), torch.randn(2, 6, 1, 1).double()
    plain, *threes, image = aspp.convs
    branches = [normalised(torch.einsum("oc,nchw->nohw", plain[0].weight[:, :, 0, 0], x), plain[1])]
    for branch, rate in zip(threes, (1, 2, 5), strict=True):
        branches.append(normalised(dilated(x, branch[0].weight, rate), branch[1]))
    of_image = torch.einsum("oc,nc->no", image[1].weight[:, :, 0, 0], mean[:, :, 0, 0])
    branches.append(normalised(of_image, image[2])[:, :, None, None].expand(2, 4, 7, 9))
    parts = aspp.project[0].weight[:, :, 0, 0].split(4, dim=1)
    joined = sum(torch.einsum("oc,nchw->nohw", w, y) for w, y in zip(parts, branches, strict=True))
    wanted = normalised(joined, aspp.project[1])
    torch.testing.assert_close(aspp(x, mean), wanted)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["deeplabv3", "deeplabv3plus"])
def test_a_tile_knows_the_mean_of_the_whole_image(arch: str) -> None:
    torch.manual_seed(0)
    decoder = randomised(DECODERS.get(arch)((3, 6), num_class=3, strides=(4, 16)))
    whole = [torch.randn(1, 3, 16, 80).double(), torch.randn(1, 6, 4, 20).double()]
    pools = {1: whole[-1].mean((2, 3), keepdim=True)}
    (wanted,) = decoder.logits(whole)
    torch.testing.assert_close(decoder.logits(whole, Tile(pools, 0, 0, 4, 20))[0], wanted)
    other = Tile({1: pools[1] + 1}, 0, 0, 4, 20)
    assert not torch.allclose(decoder.logits(whole, other)[0], wanted)
