"""ICNet: its encoder and decoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from encoder_tester import EncoderTester
from pair_tester import PairTester
from tolerances import rounding

from mit_semseg.losses import build_loss
from mit_semseg.models import DECODERS, ENCODERS, Encoder, SegmentationModule
from mit_semseg.models.decoders.icnet import CascadeFusion
from mit_semseg.models.pyramid import Tile


class TestICNetEncoder(EncoderTester):
    arch = "icnet_resnet50"


class TestICNet(DecoderTester):
    arch = "icnet"
    min_feature_maps = 3
    auxiliary = True


class TestPair(PairTester):
    encoder, decoder = "icnet_resnet50", "icnet"
    stride, quanta = 4, 8
    rounding = (0.4, 0.08)  # half of its fifty layers see a single pixel


def test_the_backbone_takes_the_weights_of_resnet50dilated() -> None:
    with torch.device("meta"):
        cascade, resnet = ENCODERS.get("icnet_resnet50")(), ENCODERS.get("resnet50dilated")()
    names = cascade.state_dict()
    assert {k[9:]: v.shape for k, v in names.items() if k.startswith("backbone.")} == {
        k: v.shape for k, v in resnet.state_dict().items()
    }
    assert all(k.startswith(("backbone.", "full.")) for k in names)


@torch.no_grad()
def test_the_branches_see_the_image_at_three_sizes() -> None:
    """At half size up to the first block of the second stage, halved again for all the others."""
    torch.manual_seed(0)
    encoder = ENCODERS.get("icnet_resnet50")().eval()
    image = torch.randn(1, 3, 64, 96)
    full, half, quarter = encoder(image, return_feature_maps=True)
    net = encoder.backbone
    stages = net.layer2
    net.layer2 = stages[:1]
    small = F.avg_pool2d(image, 2)  # what bilinear halving is
    wanted = net(small, return_feature_maps=True)[1]
    torch.testing.assert_close(half, wanted, rtol=0, atol=rounding(wanted, 50))
    rest = torch.nn.Sequential(*stages[1:], net.layer3, net.layer4)
    wanted = rest(F.avg_pool2d(wanted, 2))
    torch.testing.assert_close(quarter, wanted, rtol=0, atol=rounding(wanted, 50))
    torch.testing.assert_close(full, encoder.full(image))


def test_loss_weights_are_the_published_ones() -> None:
    assert [head.weight for head in DECODERS.get("icnet").auxiliary] == [0.4, 0.16]


@pytest.mark.parametrize(("given", "used"), [((), (0.4, 0.16)), ((0.1, 3.0), (0.1, 3.0))])
def test_the_losses_of_the_branches_are_added_up(
    given: tuple[float, ...], used: tuple[float, float]
) -> None:
    """Against torch's own cross entropy, of scores resized to the label."""

    class Given(Encoder):
        channels, strides = (8, 12, 16), (8, 16, 32)

        def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
            return maps

    torch.manual_seed(0)
    maps = [torch.randn(2, c, 64 // s, 96 // s) for c, s in zip((8, 12, 16), (8, 16, 32))]
    label = torch.randint(-1, 5, (2, 64, 96))
    decoder = DECODERS.get("icnet")((8, 12, 16), 5)
    module = SegmentationModule(Given(), decoder, build_loss("nll", 5), aux_weights=given)
    loss, _ = module.train()({"img_data": torch.zeros(2, 3, 64, 96), "seg_label": label})
    wanted = 0.0
    for weight, scores in zip((1.0, *used), decoder.logits(maps)):
        large = F.interpolate(scores, (64, 96), mode="bilinear", align_corners=False)
        wanted += weight * F.cross_entropy(large, label, ignore_index=-1)
    torch.testing.assert_close(loss, wanted)


def test_scores_and_heads_have_the_published_strides() -> None:
    with torch.device("meta"):
        decoder = DECODERS.get("icnet")((64, 512, 2048), 19).train()
        maps = [torch.zeros(2, c, 128 // s, 256 // s) for c, s in ((64, 8), (512, 16), (2048, 32))]
        heads = decoder.logits(maps)
    assert [tuple(x.shape[2:]) for x in heads] == [(32, 64), (16, 32), (8, 16)]


@torch.no_grad()
def test_a_tile_knows_the_pools_of_the_whole_image() -> None:
    torch.manual_seed(0)
    decoder = DECODERS.get("icnet")((8, 12, 16), 3).eval()
    maps = [torch.randn(1, c, 16 * n, 32 * n) for c, n in ((8, 4), (12, 2), (16, 1))]
    left = [x[..., : x.shape[-1] // 2] for x in maps]
    pools = {scale: F.adaptive_avg_pool2d(maps[-1], scale) for scale in decoder.pool_scales}
    (whole,) = decoder.logits(maps)
    (tile,) = decoder.logits(left, Tile(pools, 0, 0, 16, 32))
    (blind,) = decoder.logits(left)
    # Away from the cut, where convolutions see the other half.
    far = (..., slice(0, 96))
    assert tile.shape[-1] == 128
    torch.testing.assert_close(tile[far], whole[far], rtol=0, atol=rounding(whole, 50))
    assert (blind[far] - whole[far]).abs().max() > 0.01


@torch.no_grad()
def test_a_fusion_is_the_sum_that_fig_3_draws() -> None:
    torch.manual_seed(0)
    fusion = CascadeFusion(6, 4, 8).eval()
    coarse, fine = torch.randn(2, 6, 5, 7), torch.randn(2, 4, 10, 14)
    twice = F.interpolate(coarse, (10, 14), mode="bilinear", align_corners=False)
    conv, norm = fusion.coarse
    norm.running_mean.normal_(), norm.weight.normal_()
    convolved = F.conv2d(twice, conv.weight, padding=2, dilation=2)
    shape = (1, 8, 1, 1)
    left = (convolved - norm.running_mean.view(shape)) / (norm.running_var + 1e-5).sqrt().view(
        shape
    ) * norm.weight.view(shape) + norm.bias.view(shape)
    right = F.conv2d(fine, fusion.fine[0].weight) / (1 + 1e-5) ** 0.5
    large, fused = fusion(coarse, fine)
    torch.testing.assert_close(large, twice)
    torch.testing.assert_close(fused, (left + right).relu())
