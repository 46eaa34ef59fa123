"""SegNet."""

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from pair_tester import PairTester, count
from torch import nn

from mit_semseg.models import ModelBuilder
from mit_semseg.models.decoders.upsampling import unpool


def pooling_indices(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Indices as pooling a random plane gives."""
    plane = torch.randn(batch, channels, 2 * height, 2 * width)
    return F.max_pool2d(plane, 2, return_indices=True)[1]


class TestSegNetDecoder(DecoderTester):
    arch = "segnet"
    min_feature_maps = 6
    channels = (4, 8, 12, 16, 16, 16)

    def features(self, batch: int = 2) -> list[torch.Tensor]:
        torch.manual_seed(1)
        indices = [
            pooling_indices(batch, c, 32 >> i, 48 >> i) for i, c in enumerate(self.channels[:-1])
        ]
        return [*indices, torch.randn(batch, self.channels[-1], 2, 3)]

    @pytest.mark.parametrize("channels", [(20,), (8, 12, 24), (4, 8, 12, 16, 16, 12)])
    def test_works_with_any_widths_and_levels(self, channels: tuple[int, ...]) -> None:
        """With any widths of five pools: the others are refused."""
        with pytest.raises(ValueError, match="segnet"):
            self.build(channels=channels)
        assert self.build().eval().logits(self.features())[0].shape == (2, 5, 64, 96)


class TestSegNet(PairTester):
    encoder, decoder = "vgg16_bn_indices", "segnet"
    rounding = (0.6, 0.3)  # of two maxima as good as equal it prefers the other: indices jump


def test_size() -> None:
    for classes in (11, 21):
        assert 112 <= count("vgg16_bn_indices", "segnet", classes) * 4 / 2**20 <= 117


def test_unpooling_by_hand() -> None:
    plane = torch.tensor([[1.0, 5, 2, 0], [3, 4, 9, 8], [7, 0, 1, 1], [6, 2, 1, 3]])[None, None]
    pooled, indices = F.max_pool2d(plane, 2, return_indices=True)
    assert pooled.tolist() == [[[[5, 9], [7, 3]]]]
    assert indices.tolist() == [[[[1, 6], [8, 15]]]]
    back = unpool(torch.tensor([[[[10.0, 20], [30, 40]]]]), indices, (4, 4))
    assert back.tolist() == [[[[0, 10, 0, 0], [0, 0, 20, 0], [30, 0, 0, 0], [0, 0, 0, 40]]]]


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (7, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unpooling_is_torchs(size: tuple[int, int], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    plane = torch.randn(2, 3, *size)
    x, indices = F.max_pool2d(plane, 2, ceil_mode=True, return_indices=True)
    given = x.clone(memory_format=layout).requires_grad_()
    wanted = x.clone().requires_grad_()
    ours = unpool(given, indices, size)
    assert ours.is_contiguous(memory_format=layout)
    theirs = F.max_unpool2d(wanted, indices, 2, 2, output_size=size)
    assert torch.equal(ours, theirs)
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert torch.equal(given.grad, wanted.grad)
    # Maxima come back to where they were, and nothing else does.
    assert torch.equal(ours[ours != 0], plane[ours != 0]) and ours.count_nonzero() == x.numel()


def test_fc_dim_alone_says_enough() -> None:
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder("segnet", fc_dim=512)
    assert decoder.channels == (64, 128, 256, 512, 512, 512)


def test_blocks_mirror_those_of_vgg16() -> None:
    """Fig. 2: as many convolutions as the encoder has before each pool, the last gives scores."""
    widths = (64, 128, 256, 512, 512, 512)
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder("segnet", num_class=7, channels=widths)
    found = [
        [(m.in_channels, m.out_channels) for m in block.modules() if isinstance(m, nn.Conv2d)]
        for block in (*decoder.blocks, decoder.conv_last)
    ]
    assert found == [
        [(512, 512)] * 3,
        [(512, 512)] * 2 + [(512, 256)],
        [(256, 256)] * 2 + [(256, 128)],
        [(128, 128), (128, 64)],
        [(64, 64)],
        [(64, 7)],
    ]
