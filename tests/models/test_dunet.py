"""The DUNet decoder."""

import torch
from decoder_tester import DecoderTester
from pair_tester import PairTester

from mit_semseg.models import DECODERS


class TestDUNet(DecoderTester):
    arch = "dunet"


class TestPair(PairTester):
    encoder, decoder = "resnet18", "dunet"


@torch.no_grad()
def test_a_pixel_becomes_its_block() -> None:
    torch.manual_seed(0)
    decoder = DECODERS.get("dunet")((8, 12), 3, strides=(2, 4)).eval()
    decoder.temperature.fill_(2.0)
    features = [torch.randn(2, 8, 6, 10), torch.randn(2, 12, 3, 5)]
    code = []
    decoder.fuse.register_forward_hook(lambda module, args, output: code.append(output))
    (logits,) = decoder.logits(features)
    assert logits.shape == (2, 3, 12, 20)
    matrix = decoder.conv_last.weight.view(3, 4, 4, 64)  # class, row and column of the block
    block = matrix @ code[0][1, :, 2, 3] / 2.0
    torch.testing.assert_close(logits[1, :, 8:12, 12:16], block)


def test_a_temperature_of_nothing_is_no_division_by_zero() -> None:
    decoder = DECODERS.get("dunet")((8, 12), 3, strides=(2, 4)).eval()
    features = [torch.randn(2, 8, 6, 10), torch.randn(2, 12, 3, 5)]
    for temperature in (0.0, -1.0):
        torch.nn.init.constant_(decoder.temperature, temperature)
        (logits,) = decoder.logits(features)
        assert logits.isfinite().all()


def test_scores_have_the_size_of_the_image() -> None:
    for strides, factor in (((4, 8, 16, 32), 32), ((4, 8, 8, 8), 8), (None, 8)):
        with torch.device("meta"):
            decoder = DECODERS.get("dunet")((8, 8, 8, 8), 5, strides=strides)
            (logits,) = decoder.logits([torch.zeros(1, 8, 4, 6)] * 4)
        assert logits.shape == (1, 5, 4 * factor, 6 * factor)
