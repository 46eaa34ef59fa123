"""The DRN-C-26 encoder."""

import pytest
import torch
from encoder_tester import EncoderTester
from pair_tester import PairTester, count

from mit_semseg.models import ENCODERS


class TestDRNC26(EncoderTester):
    arch = "drn_c_26"


class TestDRNC26WithC1(PairTester):
    encoder, decoder = "drn_c_26", "c1"
    stride = 8


def test_sizes() -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get("drn_c_26")()
    # Table 1 of the paper: 21.1 million with the classifier, 512 * 1000 + 1000.
    with_classifier = sum(p.numel() for p in encoder.parameters()) + 513_000
    assert round(with_classifier / 1e6, 1) == 21.1
    # 26 layers with weights: all of these but the shortcuts, and the classifier.
    convs = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len([conv for conv in convs if conv.kernel_size != (1, 1)]) + 1 == 26
    assert count("drn_c_26", "c1", 19) * 4 / 2**20 == pytest.approx(78.7, rel=0.05)


def test_dilation_rises_and_falls_again() -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get("drn_c_26")()
    dilations = [
        {
            m.dilation[0]
            for m in encoder.get_submodule(f"layer{i}").modules()
            if hasattr(m, "dilation")
        }
        for i in range(1, 9)
    ]
    assert dilations == [{1}, {1}, {1}, {1}, {1, 2}, {1, 4}, {2}, {1}]  # 1: shortcuts


@pytest.mark.parametrize(("level", "residual"), [(6, True), (7, False), (8, False)])
def test_the_last_levels_do_not_pass_their_input_on(level: int, residual: bool) -> None:
    torch.manual_seed(0)
    stage = ENCODERS.get("drn_c_26")().eval().get_submodule(f"layer{level}")
    with torch.no_grad():
        for block in stage:
            block.conv2.weight.zero_()
        given = stage(torch.rand(1, stage[0].conv1.in_channels, 4, 4))
    assert bool(given.any()) == residual
