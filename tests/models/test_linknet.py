"""LinkNet."""

import pytest
import torch
from decoder_tester import DecoderTester
from pair_tester import PairTester, count

from mit_semseg.models import ENCODERS, ModelBuilder
from mit_semseg.models.decoders.upsampling import full_convolution


class TestLinkNetDecoder(DecoderTester):
    arch = "linknet"
    needs = 2


class TestLinkNet(PairTester):
    encoder, decoder = "resnet18", "linknet"


def test_size() -> None:
    for classes in (11, 21):
        assert count("resnet18", "linknet", classes) * 4 / 2**20 == pytest.approx(44, rel=0.02)
    # Table 3, on the stem of one convolution.
    assert count("torchvision_resnet18", "linknet", 21) / 1e6 == pytest.approx(11.5, rel=0.005)


@pytest.mark.parametrize(
    "encoder",
    ["resnet34", "resnet18dilated", "resnet50_dilated16", "unet"],
)
def test_reaches_the_image(encoder: str) -> None:
    declared = ENCODERS.get(encoder)
    maps = [
        torch.zeros(1, c, 96 // s, 64 // s, device="meta")
        for c, s in zip(declared.channels, declared.strides)
    ]
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder(
            "linknet", num_class=7, channels=declared.channels, strides=declared.strides
        )
    assert decoder.logits(maps)[0].shape == (1, 7, 96, 64)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_full_convolutions_multiply_sides(factor: int) -> None:
    x = torch.randn(1, 4, 5, 7)
    y = full_convolution(4, 6, factor)(x)
    assert y.shape == (1, 6, 5 * factor, 7 * factor)
    # No pixel is left out, as gaps between small kernels would.
    ones = full_convolution(1, 1, factor)
    torch.nn.init.ones_(ones.weight)
    assert (ones(torch.ones(1, 1, 5, 7)) >= 1).all()
