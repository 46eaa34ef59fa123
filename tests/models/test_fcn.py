"""FCN-32s, 16s and 8s."""

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from pair_tester import PairTester, count

from mit_semseg.models import ModelBuilder
from mit_semseg.models.decoders.fcn import FCN, bilinear_upsampling


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """4096 channels are not needed here; to learn by heart takes some more."""
    slow = request.node.get_closest_marker("slow") is not None
    monkeypatch.setattr(FCN, "width", 512 if slow else 64)


class TestFCN32s(DecoderTester):
    arch = "fcn32s"


class TestFCN16s(DecoderTester):
    arch = "fcn16s"
    min_feature_maps = 2


class TestFCN8s(DecoderTester):
    arch = "fcn8s"
    min_feature_maps = 3


class TestFCN8sOnVGG16(PairTester):
    encoder, decoder = "vgg16", "fcn8s"
    folds = False  # there is no BatchNorm
    stride = 8
    rate = 1e-4


@pytest.mark.slow
def test_fcn32s_learns_one_image_by_heart_too() -> None:
    tester = TestFCN8sOnVGG16()
    tester.decoder = "fcn32s"
    tester.right = 0.93  # from 2x3 scores, where four squares meet is not drawn exactly
    tester.test_learns_one_image_by_heart()


def test_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # all channels
    assert count("vgg16", "fcn8s", 21) / 1e6 == pytest.approx(134, rel=0.01)  # table 1


def test_a_new_decoder_interpolates() -> None:
    decoder = ModelBuilder.build_decoder("fcn8s", channels=(8, 8, 8), num_class=3)
    for up in decoder.ups:
        assert torch.equal(up.weight, bilinear_upsampling(3, 2).weight)


@pytest.mark.parametrize("factor", [2, 4, 8])
@torch.no_grad()
def test_upsampling_begins_as_bilinear(factor: int) -> None:
    x = torch.randn(2, 3, 5, 7)
    given = bilinear_upsampling(3, factor)(x)
    wanted = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    assert given.shape == wanted.shape
    half = factor // 2  # nearer to the edge it sees zeros, where interpolation repeats the edge
    inner = slice(half, -half)
    torch.testing.assert_close(given[:, :, inner, inner], wanted[:, :, inner, inner])


@torch.no_grad()
def test_scores_of_finer_maps_are_added() -> None:
    """Along the paper's figure 3: 2x (2x pool5 + pool4) + pool3."""
    torch.manual_seed(0)
    decoder = ModelBuilder.build_decoder(
        "fcn8s", num_class=4, channels=(6, 8, 10), strides=(8, 16, 32)
    ).eval()
    pool3, pool4, pool5 = (
        torch.randn(1, c, 32 // n, 48 // n) for c, n in ((6, 4), (8, 8), (10, 16))
    )
    deep = F.conv2d(pool5, decoder.fc6.weight, decoder.fc6.bias, padding=3).relu()
    deep = decoder.conv_last(decoder.fc7(deep).relu())
    at16 = decoder.ups[0](deep) + decoder.scores[0](pool4)
    at8 = decoder.ups[1](at16) + decoder.scores[1](pool3)
    torch.testing.assert_close(decoder.logits([pool3, pool4, pool5])[0], at8)


def test_maps_of_equal_stride_are_not_upsampled() -> None:
    decoder = ModelBuilder.build_decoder(
        "fcn8s", num_class=4, channels=(6, 8, 10), strides=(8, 8, 8)
    )
    maps = [torch.randn(1, c, 5, 7) for c in (6, 8, 10)]
    assert decoder.eval().logits(maps)[0].shape == (1, 4, 5, 7)
    assert not list(decoder.ups.parameters())
