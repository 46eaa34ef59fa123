"""FC-DenseNet."""

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from encoder_tester import EncoderTester
from pair_tester import PairTester
from torch import nn

from mit_semseg.models import DECODERS, ENCODERS
from mit_semseg.models.decoders.upsampling import full_convolution
from mit_semseg.models.encoders.fcdensenet import DenseBlock


class TestFCDenseNet56Encoder(EncoderTester):
    arch = "fcdensenet56"


class TestFCDenseNet56Decoder(DecoderTester):
    arch = "fcdensenet56"
    min_feature_maps = 6
    channels = (12, 20, 28, 36, 20, 24)

    def features(self, batch: int = 2) -> list[torch.Tensor]:
        torch.manual_seed(1)
        sides = [(64 >> i, 96 >> i) for i in range(6)]
        return [torch.randn(batch, c, *side) for c, side in zip(self.channels, sides)]

    @pytest.mark.parametrize("channels", [(20,), (6, 8, 12, 20, 8)])
    def test_works_with_any_widths_and_levels(self, channels: tuple[int, ...]) -> None:
        """With any widths of six levels."""
        with pytest.raises(ValueError, match="fcdensenet56 needs at least 6"):
            self.build(channels=channels)
        assert self.build().eval().logits(self.features())[0].shape == (2, 5, 64, 96)


class TestFCDenseNet56(PairTester):
    encoder = decoder = "fcdensenet56"
    folds = False  # BatchNorms come before convolutions


@pytest.mark.slow
class TestFCDenseNet67(TestFCDenseNet56):
    encoder = decoder = "fcdensenet67"


@pytest.mark.slow
class TestFCDenseNet103(TestFCDenseNet56):
    encoder = decoder = "fcdensenet103"


# Table 3's millions; the issue's size.
@pytest.mark.parametrize(
    ("name", "millions", "slack"),
    [("fcdensenet56", 1.5, 0.09), ("fcdensenet67", 3.5, 0.02), ("fcdensenet103", 9.4, 0.01)],
)
def test_size(name: str, millions: float, slack: float) -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get(name)()
        decoder = DECODERS.get(name)(encoder.channels, num_class=11, strides=encoder.strides)
    both = nn.ModuleList([encoder, decoder])
    count = sum(p.numel() for p in both.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=slack)
    if name == "fcdensenet103":
        assert count * 4 / 2**20 == pytest.approx(35.6, rel=0.01)
    # The name counts the convolutions and transposed convolutions, transitions included.
    layers = [m for m in both.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(layers) == int(name.removeprefix("fcdensenet"))


def test_widths_are_those_of_table_2() -> None:
    encoder = ENCODERS.get("fcdensenet103")
    assert encoder.channels == (112, 192, 304, 464, 656, 240)
    with torch.device("meta"):
        decoder = DECODERS.get("fcdensenet103")(encoder.channels)
    read = [block.layers[0][0].num_features for block in decoder.blocks]
    written = [n + 16 * depth for n, depth in zip(read, (12, 10, 7, 5, 4))]
    assert written == [1088, 816, 576, 384, 256]  # the paper prints 578 for 576
    assert decoder.conv_last.in_channels == 256


def test_a_dense_block_reads_everything_before() -> None:
    torch.manual_seed(0)
    block = DenseBlock(5, 3, 2).eval()
    x = torch.randn(1, 5, 4, 6)
    known = x
    for norm, _, conv, _ in block.layers:
        new = F.conv2d(norm(known).relu(), conv.weight, conv.bias, padding=1)
        known = torch.cat([known, new], dim=1)
    torch.testing.assert_close(block(x), known[:, 5:])


def test_batch_norm_adds_lasagnes_1e_4_to_the_variance() -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get("fcdensenet56")()
        decoder = DECODERS.get("fcdensenet56")(encoder.channels, num_class=11)
    norms = [
        m for half in (encoder, decoder) for m in half.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    # A dense block of 4 layers eleven times, and five transitions down.
    assert len(norms) == 11 * 4 + 5 and {m.eps for m in norms} == {1e-4}


@torch.no_grad()
def test_a_transition_up_mirrors_that_of_the_authors() -> None:
    """Theirs is a valid transposed convolution without its last row and column."""
    torch.manual_seed(0)
    up = full_convolution(2, 3, 2, bias=True).double()
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    whole = F.conv_transpose2d(x, up.weight, up.bias, stride=2)
    assert whole.shape == (1, 3, 9, 11)
    torch.testing.assert_close(up(x), whole[..., 1:, 1:])
    flipped = F.conv_transpose2d(x.flip(2, 3), up.weight.flip(2, 3), up.bias, stride=2)
    theirs = flipped[..., :-1, :-1]
    torch.testing.assert_close(up(x), theirs.flip(2, 3))
