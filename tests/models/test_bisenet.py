"""BiSeNet: its encoder and decoder."""

from __future__ import annotations

import torch
from decoder_tester import DecoderTester
from encoder_tester import EncoderTester
from pair_tester import PairTester

from mit_semseg.models import DECODERS, ENCODERS
from mit_semseg.models.decoders.bisenet import AttentionRefinement, FeatureFusion
from mit_semseg.models.pyramid import Tile


class TestBiSeNetEncoder(EncoderTester):
    arch = "bisenet_resnet18"


class TestBiSeNet(DecoderTester):
    arch = "bisenet"
    min_feature_maps = 3
    auxiliary = True


class TestPair(PairTester):
    encoder, decoder = "bisenet_resnet18", "bisenet"
    stride = 8


@torch.no_grad()
def test_the_context_path_is_resnet18() -> None:
    torch.manual_seed(0)
    encoder = ENCODERS.get("bisenet_resnet18")().eval()
    resnet = ENCODERS.get("resnet18")().eval()
    resnet.load_state_dict(encoder.context.state_dict())
    image = torch.randn(1, 3, 64, 96)
    spatial, *context = encoder(image, return_feature_maps=True)
    assert spatial.shape == (1, 128, 8, 12)
    for given, wanted in zip(context, resnet(image, return_feature_maps=True)[2:], strict=True):
        assert torch.equal(given, wanted)


@torch.no_grad()
def test_channels_are_weighed_by_their_means() -> None:
    torch.manual_seed(0)
    refine, fuse = AttentionRefinement(6, 4).eval(), FeatureFusion(8, 4).eval()
    x, y = torch.randn(2, 6, 3, 5), torch.randn(2, 2, 3, 5)
    z = refine.conv(x)
    mean = torch.einsum("bchw->bc", z) / 15
    norm = refine.weigh[2]
    scaled = mean @ refine.weigh[1].weight[:, :, 0, 0].T / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(refine(x), z * scaled.sigmoid()[:, :, None, None])
    z = fuse.join(torch.cat([x, y], 1))
    first, second = (fuse.weigh[i] for i in (1, 3))
    hidden = (z.mean((2, 3)) @ first.weight[:, :, 0, 0].T + first.bias).relu()
    weight = (hidden @ second.weight[:, :, 0, 0].T + second.bias).sigmoid()
    torch.testing.assert_close(fuse(x, y), z + z * weight[:, :, None, None])


def test_loss_weights_are_the_published_ones() -> None:
    assert [head.weight for head in DECODERS.get("bisenet").auxiliary] == [1, 1]


@torch.no_grad()
def test_a_tile_knows_the_mean_of_the_whole_image() -> None:
    decoder = DECODERS.get("bisenet")((4, 6, 8), 3).eval()
    maps = [torch.randn(1, c, n, n) for c, n in ((4, 16), (6, 8), (8, 4))]
    seen = []
    decoder.tail.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mean = torch.randn(1, 8, 1, 1)
    decoder.logits(maps, Tile({1: mean}, 0, 0, 8, 8))
    decoder.logits(maps)
    assert torch.equal(seen[0], mean)
    torch.testing.assert_close(seen[1], maps[-1].mean((2, 3), keepdim=True))
