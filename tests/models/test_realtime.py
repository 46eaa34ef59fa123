"""PIDNet, DDRNet, BiSeNetV2, STDC and PP-LiteSeg, beside their authors' code and papers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fill import fill, image
from pairs import Pair, on_meta
from tolerances import rounding

from mit_semseg.losses import boundary
from mit_semseg.models import DECODERS, ModelBuilder
from mit_semseg.models.decoders.bisenetv2 import BilateralGuidedAggregation
from mit_semseg.models.decoders.ppliteseg import UnifiedAttentionFusion
from mit_semseg.models.encoders.ddrnet import DAPPM
from mit_semseg.models.pyramid import Tile
from mit_semseg.weights import load_decoder, load_encoder

FILE = Path(__file__).resolve().parents[1] / "fixtures" / "reference_realtime.npz"


@pytest.mark.parametrize(
    "arch",
    [
        *("ddrnet_23_slim", "pidnet_s", "pidnet_l"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddrnet_23", "pidnet_m")),
    ],
)
@torch.no_grad()
def test_outputs_are_the_authors(arch, tmp_path):
    """One file with the layers of both parts, under the names that the authors' training gives
    them, initialises both. Stored are, of 11 classes, the logits of the main head and of the
    auxiliary ones, in evaluation, at every fifth row and seventh column of the 16 x 24."""
    encoder = ModelBuilder.build_encoder(arch, weights="none")
    channels = encoder.channels
    decoder = ModelBuilder.build_decoder(arch, num_class=11, channels=channels)
    whole = {**fill(encoder).state_dict(), **fill(decoder).state_dict()}
    state = {f"model.{key}": value for key, value in whole.items()}
    torch.save({**state, "loss.criterion.weight": torch.ones(11)}, tmp_path / "whole.pth")
    encoder = ModelBuilder.build_encoder(arch, weights="none").eval()
    decoder = ModelBuilder.build_decoder(arch, num_class=11, channels=channels).eval()
    for report in (
        load_encoder(encoder, arch, tmp_path / "whole.pth"),
        load_decoder(decoder, arch, tmp_path / "whole.pth"),
    ):
        assert report is not None and report.ok
    decoder.training = True  # of this alone: the layers stay in evaluation
    heads = decoder.logits(encoder(image(128, 192, seed=7), return_feature_maps=True))
    with np.load(FILE) as stored:
        wanted = [torch.from_numpy(stored[key]) for key in sorted(stored) if f"{arch}/" in key]
    for given, expected in zip(heads, wanted):
        sampled = given[0, :, ::5, ::7]
        torch.testing.assert_close(sampled, expected, rtol=0, atol=rounding(expected, 50))


# The paper has 34.4 million for PIDNet-M, whose authors' code has the 28.5 that are here.
@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        *(("ddrnet_23_slim", 5.7), ("ddrnet_23", 20.1)),  # table V
        *(("pidnet_s", 7.6), ("pidnet_m", 28.5), ("pidnet_l", 36.9)),  # table 5
    ],
)
def test_size_without_auxiliary_heads(arch, millions):
    with torch.device("meta"):
        head = DECODERS.get(arch)(on_meta(arch).channels, 19).final_layer
    numbers = sum(p.numel() for part in (on_meta(arch), head) for p in part.parameters())
    assert numbers / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(("arch", "auxiliary"), [("ddrnet_23", "extra"), ("pidnet_s", "p")])
def test_classifiers_have_the_authors_names(arch, auxiliary):
    with torch.device("meta"):
        decoder = DECODERS.get(arch)(on_meta(arch).channels, 5)
    wanted = {f"seghead_{auxiliary}.conv2", "final_layer.conv2"}
    assert set(decoder.class_tensors()) == {f"{k}.{x}" for k in wanted for x in ("weight", "bias")}


@torch.no_grad()
def test_dappm_adds_each_scale_to_the_finer_ones():
    torch.manual_seed(0)
    module = DAPPM(4, 3, 5).eval()
    x = torch.randn(1, 4, 11, 13)
    padded = F.pad(x, (8, 8, 8, 8))
    pools = [
        x,
        *(
            padded[..., 8 - s :, 8 - s :].unfold(2, 2 * s + 1, s).unfold(3, 2 * s + 1, s)
            for s in (2, 4, 8)
        ),
    ]
    sizes = [(-(-11 // s), -(-13 // s)) for s in (2, 4, 8)]
    means = [p.mean((4, 5))[..., :h, :w] for p, (h, w) in zip(pools[1:], sizes)]
    branches = [
        module.scale0,
        module.scale1[1:],
        module.scale2[1:],
        module.scale3[1:],
        module.scale4[1:],
    ]
    scales = [
        branch(y)
        for branch, y in zip(branches, [x, *means, x.mean((2, 3), keepdim=True)], strict=True)
    ]
    maps = [scales[0]]
    for i, scale in enumerate(scales[1:], 1):
        large = F.interpolate(scale, (11, 13), mode="bilinear", align_corners=False)
        maps.append(module.get_submodule(f"process{i}")(large + maps[-1]))
    wanted = module.compression(torch.cat(maps, 1)) + module.shortcut(x)
    torch.testing.assert_close(module(x), wanted)


def test_the_loss_of_pidnet_is_the_sum_of_eq_10():
    module = Pair("pidnet_s", "pidnet_s").build().train()
    torch.manual_seed(0)
    label = torch.randint(-1, 5, (2, 4, 6)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        module.decoder.seghead_d.conv2.bias.fill_(1.4)  # sure of many pixels, not of all
        loss, _ = module({"img_data": image, "seg_label": label})
        # Statistics of the batch: what is computed again is the same.
        heads = module.decoder.logits(module.encoder(image, return_feature_maps=True))
    main, detail, edges = (
        F.interpolate(x, (64, 96), mode="bilinear", align_corners=False) for x in heads[:3]
    )
    found = boundary.boundaries(label)
    sure = torch.where(edges[:, 0].sigmoid() > 0.8, label, -1)
    assert 0 < (sure >= 0).sum() < (label >= 0).sum()
    valid = label >= 0
    share = found.sum() / valid.sum()
    each = F.binary_cross_entropy_with_logits(edges[:, 0], found.float(), reduction="none")
    wanted = (
        F.cross_entropy(main, label, ignore_index=-1)
        + 0.4 * F.cross_entropy(detail, label, ignore_index=-1)
        + 20 * (each * torch.where(found, 1 - share, share))[valid].mean()
        + F.cross_entropy(main, sure, ignore_index=-1)
    )
    torch.testing.assert_close(loss, wanted)


def test_bisenetv2_has_the_layers_of_the_usual_implementation():
    """github.com/CoinCheung/BiSeNet, whose parameters are these without auxiliary heads."""
    with torch.device("meta"):
        decoder = DECODERS.get("bisenetv2")(on_meta("bisenetv2").channels, 19)
    parts = (on_meta("bisenetv2"), decoder.aggregate, decoder.conv_last)
    assert sum(p.numel() for part in parts for p in part.parameters()) == 3_358_627


@torch.no_grad()
def test_each_branch_is_weighed_by_the_other():
    torch.manual_seed(0)
    layer = BilateralGuidedAggregation(4, 6).eval()
    detail, semantic = torch.randn(2, 4, 16, 24), torch.randn(2, 6, 4, 6)

    def up(x):
        return F.interpolate(x, (16, 24), mode="bilinear", align_corners=False)

    pooled = F.avg_pool2d(F.pad(layer.detail_down(detail), (1, 1, 1, 1)), 3, 2)
    fine = layer.detail(detail) * up(layer.semantic_up(semantic)).sigmoid()
    coarse = pooled * layer.semantic(semantic).sigmoid()
    torch.testing.assert_close(layer(detail, semantic), layer.fuse(fine + up(coarse)))


@torch.no_grad()
def test_a_fusion_of_ppliteseg_is_the_weighted_mean_of_eq_3():
    torch.manual_seed(0)
    fusion = UnifiedAttentionFusion(5, 4, 3).eval()
    fine, coarse = torch.randn(2, 5, 8, 12), torch.randn(2, 4, 4, 6)
    x = fusion.project(fine)
    y = F.interpolate(coarse, (8, 12), mode="bilinear", align_corners=False)
    stats = torch.stack([x.mean(1), x.max(1)[0], y.mean(1), y.max(1)[0]], 1)
    share = torch.sigmoid(fusion.attention(stats))
    torch.testing.assert_close(fusion(fine, coarse), fusion.fuse(share * x + (1 - share) * y))


@torch.no_grad()
def test_the_pyramid_of_ppliteseg_adds_up_pools_of_the_whole_image():
    torch.manual_seed(0)
    decoder = ModelBuilder.build_decoder("ppliteseg_t", channels=(4, 6, 8), num_class=5).eval()
    maps = [torch.randn(1, c, n, n) for c, n in ((4, 16), (6, 8), (8, 4))]
    seen = []
    decoder.context.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pools = {scale: F.adaptive_avg_pool2d(maps[-1], scale) for scale in (1, 2, 4)}
    branches = [branch(pools[scale]) for branch, scale in zip(decoder.ppm, pools, strict=True)]
    wanted = sum(F.interpolate(x, (4, 4), mode="bilinear", align_corners=False) for x in branches)
    decoder.logits(maps)
    decoder.logits([x[..., : x.shape[-1] // 2] for x in maps], Tile(pools, 0, 0, 4, 4))
    torch.testing.assert_close(seen[0], wanted)
    torch.testing.assert_close(seen[1], wanted[..., :2])


def test_fusions_of_ppliteseg_are_as_wide_as_published():
    for size, widths in (("t", [32, 64, 128]), ("b", [64, 96, 128])):
        with torch.device("meta"):
            decoder = DECODERS.get(f"ppliteseg_{size}")((256, 512, 1024), 19)
        assert [fusion.fuse[0].out_channels for fusion in decoder.fusions] == widths
