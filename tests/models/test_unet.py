"""U-Net: its own encoder, and its decoder on others."""

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from encoder_tester import EncoderTester, declared_maps
from pair_tester import PairTester, count
from torch import Tensor, nn

from mit_semseg.models import ENCODERS, ModelBuilder
from mit_semseg.models.decoders.base import init_weights
from mit_semseg.models.decoders.upsampling import full_convolution, up_convolution


class TestUNetEncoder(EncoderTester):
    arch = "unet"


class TestUNetBilinearEncoder(EncoderTester):
    arch = "unet_bilinear"


class TestUNetDecoder(DecoderTester):
    arch = "unet"
    min_feature_maps = 2


class TestUNetBilinearDecoder(DecoderTester):
    arch = "unet_bilinear"
    min_feature_maps = 2


class TestUNet(PairTester):
    encoder, decoder = "unet", "unet"


class TestUNetBilinear(PairTester):
    encoder, decoder = "unet_bilinear", "unet_bilinear"


class TestUNetOnDilatedResNet(PairTester):
    encoder, decoder = "resnet18dilated", "unet"
    stride = 4


def test_size() -> None:
    # 2 x 9 (n_in n + n n) a level and its mirror, and 2 x 2 up-convolutions: 31.0 million.
    assert count("unet", "unet", 21) * 4 / 2**20 == pytest.approx(118.4, rel=0.01)
    for classes in (11, 21):
        parameters = count("unet_bilinear", "unet_bilinear", classes)
        assert parameters * 4 / 2**20 == pytest.approx(51, rel=0.01)


@torch.no_grad()
def test_the_whole_is_what_the_paper_draws() -> None:
    """A naive walk through figure 1, with the weights of ours."""
    torch.manual_seed(0)
    enc = ENCODERS.get("unet")().eval()
    dec = ModelBuilder.build_decoder("unet", num_class=3, channels=enc.channels).eval()
    x = torch.randn(1, 3, 32, 48)

    def convs(block: nn.Module, x: Tensor) -> Tensor:
        found = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(found) == len(norms) == 2
        for conv, norm in zip(found, norms):
            x = F.relu(norm(F.conv2d(x, conv.weight, padding=1)))
        return x

    down = [convs(enc.levels[0], x)]
    for level in enc.levels[1:]:
        down.append(convs(level, F.max_pool2d(down[-1], 2)))
    y = down.pop()
    for up, block in zip(dec.ups, dec.blocks):
        y = F.conv_transpose2d(y, up.weight, up.bias, stride=2)
        y = convs(block, torch.cat([down.pop(), y], dim=1))
    y = F.conv2d(y, dec.conv_last.weight, dec.conv_last.bias)
    torch.testing.assert_close(dec.logits(enc(x, return_feature_maps=True))[0], y)


@pytest.mark.parametrize("arch", ["unet", "unet_bilinear"])
@pytest.mark.parametrize(
    "encoder", ["resnet101dilated", "resnet50_dilated16", "mobilenetv2dilated"]
)
def test_works_on_dilated_encoders(arch: str, encoder: str) -> None:
    declared = ENCODERS.get(encoder)
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder(
            arch, num_class=7, channels=declared.channels, strides=declared.strides
        )
    (scores,) = decoder.logits(declared_maps(encoder, 1, 96, 64))
    assert scores.shape == (1, 7, 24, 16)
    # Where strides are equal nothing goes up, so no transposed convolution is trained in vain.
    halvings = sum(b == 2 * a for a, b in zip(declared.strides, declared.strides[1:]))
    transposed = [m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert len(transposed) == (halvings if arch == "unet" else 0)


def test_strides_that_are_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strides \(4, 6\) cannot be gone up step by step"):
        ModelBuilder.build_decoder("unet", channels=(8, 8), strides=(4, 6))


@pytest.mark.parametrize("factor", [2, 4])
@torch.no_grad()
def test_transposed_convolutions_begin_with_hes_gain(factor: int) -> None:
    """As convolutions do: half of what a ReLU lets through comes out as large as it went in."""
    torch.manual_seed(0)
    for build in (up_convolution, full_convolution):
        layer = nn.Sequential(build(96, 48, factor))
        init_weights(layer)
        if layer[0].bias is not None:
            torch.nn.init.zeros_(layer[0].bias)
        y = layer(torch.randn(2, 96, 24, 24))[:, :, 8:-8, 8:-8]
        assert y.square().mean().item() == pytest.approx(2, rel=0.1)
