"""The DenseASPP decoder."""

import torch
from decoder_tester import DecoderTester
from pair_tester import PairTester
from torch import nn

from mit_semseg.models import DECODERS


class TestDenseASPP(DecoderTester):
    arch = "denseaspp"


class TestPair(PairTester):
    encoder, decoder = "densenet121dilated", "denseaspp"
    stride = 8


def test_widths_are_those_of_the_paper() -> None:
    """Sec. 3.4, of DenseNet121: 512 channels, each layer 256 inside and 64 out, 832 in the end."""
    with torch.device("meta"):
        decoder = DECODERS.get("denseaspp")((256, 512, 1024, 1024), 19)
    for i, (layer, dilation) in enumerate(zip(decoder.layers, (3, 6, 12, 18, 24), strict=True)):
        narrow, wide = (conv for conv in layer if isinstance(conv, nn.Conv2d))
        assert narrow.weight.shape == (256, 512 + 64 * i, 1, 1)
        assert wide.weight.shape == (64, 256, 3, 3)
        assert wide.dilation == wide.padding == (dilation, dilation)
    assert decoder.conv_last.in_channels == 832
