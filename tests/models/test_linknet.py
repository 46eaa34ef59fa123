"""LinkNet."""

import pytest
import torch
from decoder_tester import DecoderTester
from encoder_tester import declared_maps
from pair_tester import PairTester, count
from torch import nn

from mit_semseg.models import ENCODERS, ModelBuilder
from mit_semseg.models.decoders.upsampling import full_convolution


class TestLinkNetDecoder(DecoderTester):
    arch = "linknet"
    min_feature_maps = 2


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
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder(
            "linknet", num_class=7, channels=declared.channels, strides=declared.strides
        )
    (scores,) = decoder.logits(declared_maps(encoder, 1, 96, 64))
    assert scores.shape == (1, 7, 96, 64)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_full_convolutions_multiply_sides(factor: int) -> None:
    x = torch.randn(1, 4, 5, 7)
    y = full_convolution(4, 6, factor)(x)
    assert y.shape == (1, 6, 5 * factor, 7 * factor)
    # No pixel is left out, as gaps between small kernels would.
    ones = full_convolution(1, 1, factor)
    torch.nn.init.ones_(ones.weight)
    assert (ones(torch.ones(1, 1, 5, 7)) >= 1).all()


@torch.no_grad()
def test_what_a_block_gives_is_added_to_the_map_of_its_link() -> None:
    """Fig. 1, one step after the other."""
    torch.manual_seed(0)
    channels = (4, 8, 12, 16)
    maps = [torch.randn(2, c, 24 // 2**i, 32 // 2**i) for i, c in enumerate(channels)]
    decoder = ModelBuilder.build_decoder(
        "linknet", num_class=5, channels=channels, strides=(4, 8, 16, 32)
    ).eval()
    fourth, third, second, first = decoder.blocks
    x = maps[2] + fourth(maps[3])
    x = maps[1] + third(x)
    x = maps[0] + second(x)
    wanted = decoder.conv_last(decoder.conv(decoder.up(first(x))))
    assert torch.equal(decoder.logits(maps)[0], wanted)
    assert wanted.shape == (2, 5, 96, 128)


def test_batch_norm_adds_to_the_variance_what_the_authors_code_adds() -> None:
    """1e-3, but 1e-5 after the first of the last two full convolutions (models/model.lua)."""
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder("linknet", channels=(4, 8, 12, 16), num_class=5)
    norms = {k: m for k, m in decoder.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 4 * 3 + 2
    assert {k: m.eps for k, m in norms.items()} == dict.fromkeys(norms, 1e-3) | {"up.1": 1e-5}
