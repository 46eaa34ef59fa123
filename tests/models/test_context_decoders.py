"""Decoders that collect context, by the formulas of their papers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pairs import Pair, randomise
from tolerances import rounding
from torch import nn

from mit_semseg.models import DECODERS, ModelBuilder, attention
from mit_semseg.models.decoders.bisenet import AttentionRefinement, FeatureFusion
from mit_semseg.models.decoders.danet import ChannelAttention, PositionAttention
from mit_semseg.models.decoders.deeplabv3 import ASPP
from mit_semseg.models.decoders.encnet import Encoding
from mit_semseg.models.decoders.hamburger import NonnegativeFactorisation
from mit_semseg.models.decoders.ocnet import BaseContext, ObjectContext
from mit_semseg.models.layers import PooledBatchNorm2d
from mit_semseg.models.pyramid import Tile

# --------------------------------------------------------------------------------- DANet and OCNet


@torch.no_grad()
def test_position_attention_by_the_formula(monkeypatch):
    monkeypatch.setattr(attention, "_CHUNK_CPU", 60)  # several bands
    torch.manual_seed(0)
    layer = PositionAttention(16).double()
    layer.gamma.fill_(0.3)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    q, k, v = (conv(x).flatten(2) for conv in (layer.query, layer.key, layer.value))
    wanted = x.flatten(2).clone()
    for b in range(2):
        for j in range(20):  # eq. 1 and 2: s_ji, and E_j
            weights = torch.stack([(q[b, :, j] @ k[b, :, i]).exp() for i in range(20)])
            wanted[b, :, j] += 0.3 * (v[b] @ (weights / weights.sum()))
    torch.testing.assert_close(layer(x).flatten(2), wanted)


@torch.no_grad()
def test_channel_attention_by_the_formula():
    torch.manual_seed(0)
    layer = ChannelAttention().double()
    layer.gamma.fill_(0.3)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    flat = x.flatten(2)
    wanted = flat.clone()
    for b in range(2):
        scores = flat[b] @ flat[b].T
        for j in range(6):
            weights = (scores[j].max() - scores[j]).exp()
            wanted[b, j] += 0.3 * (weights / weights.sum()) @ flat[b]
    torch.testing.assert_close(layer(x).flatten(2), wanted)


def test_attention_starts_as_the_identity():
    x = torch.randn(2, 16, 4, 5)
    for layer in (PositionAttention(16), ChannelAttention()):
        assert torch.equal(layer(x), x)


@pytest.mark.parametrize(("grid", "height", "width"), [(1, 4, 5), (3, 7, 8), (6, 4, 9)])
@torch.no_grad()
def test_object_context_attends_within_a_block(grid, height, width):
    torch.manual_seed(0)
    layer = ObjectContext(8, 6, 4, grid).double().eval()
    x = torch.randn(2, 8, height, width, dtype=torch.float64)
    key, value = layer.key(x), layer.value(x)
    block = [
        [sum(y >= j * n // grid for j in range(1, grid)) for y in range(n)] for n in (height, width)
    ]
    wanted = torch.zeros_like(value)
    pixels = [(y, x) for y in range(height) for x in range(width)]
    for y0, x0 in pixels:
        mine = [
            p for p in pixels if (block[0][p[0]], block[1][p[1]]) == (block[0][y0], block[1][x0])
        ]
        for b in range(2):
            scores = torch.stack([key[b, :, y0, x0] @ key[b, :, i, j] for i, j in mine])
            weights = (scores / 2).softmax(0)  # 2: root of the width
            wanted[b, :, y0, x0] = sum(w * value[b, :, i, j] for w, (i, j) in zip(weights, mine))
    torch.testing.assert_close(layer(x), layer.project(wanted))


def test_size_of_the_base_context_of_ocnet():
    """10.5 M of 2048 channels: Huang et al. 2019, arXiv:1907.12273, table 1 (self-attention)."""
    with torch.device("meta"):
        context = BaseContext(2048, 512)
    assert sum(p.numel() for p in context.parameters()) / 1e6 == pytest.approx(10.5, rel=0.02)


def test_grids_and_dilations_of_ocnet():
    with torch.device("meta"):
        pyramid = DECODERS.get("ocnet_pyramid")((8, 16), 5).context
        atrous = DECODERS.get("ocnet_asp")((8, 16), 5).context
    assert [attention.grid for attention in pyramid.attention] == [1, 2, 3, 6]
    found = [branch[0] for branch in atrous.atrous]
    assert [conv.kernel_size for conv in found] == [(3, 3)] * 3
    assert [conv.dilation for conv in found] == [(12, 12), (24, 24), (36, 36)]
    assert [conv.padding for conv in found] == [(12, 12), (24, 24), (36, 36)]


# ------------------------------------------------------------------------------------------ EncNet


def encnet():
    torch.manual_seed(0)
    decoder = ModelBuilder.build_decoder("encnet", channels=(12, 20), num_class=5)
    return decoder, [torch.randn(2, 12, 6, 9), torch.randn(2, 20, 3, 5)]


def test_encoding_is_the_sum_over_pixels_of_the_paper():
    torch.manual_seed(0)
    layer = Encoding(6, 4).double()
    torch.nn.init.normal_(layer.codewords)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = torch.zeros(2, 4, 6, dtype=torch.float64)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                residuals = [x[b, :, i, j] - codeword for codeword in layer.codewords]
                scores = [s * (r @ r) for s, r in zip(layer.scale, residuals, strict=True)]
                shares = torch.stack(scores).softmax(0)
                for k in range(4):
                    wanted[b, k] = wanted[b, k] + shares[k] * residuals[k]
    given = layer(x)
    torch.testing.assert_close(given, wanted)
    sources = (x, layer.codewords, layer.scale)
    direction = torch.randn_like(wanted)
    ours = torch.autograd.grad(given, sources, direction)
    theirs = torch.autograd.grad(wanted, sources, direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_encnet_learns_which_classes_occur_with_weight_0_2():
    module = Pair("resnet18dilated", "encnet").build().train()
    # Without dropout both forward passes are the same.
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout2d):
            layer.p = 0.0
    label = torch.tensor([0, 1, 3, -1])[torch.arange(64).view(1, 8, 8) % 4]
    image = torch.randn(1, 3, 64, 64)
    other = copy.deepcopy(module)
    loss, _ = module({"img_data": image, "seg_label": label})
    main, presence, pixels = other.decoder.log_probabilities(other.encoder(image, True), (8, 8))
    occurs = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0]])
    wanted = (
        F.nll_loss(main, label, ignore_index=-1)
        + 0.4 * F.nll_loss(pixels, label, ignore_index=-1)
        + 0.2 * F.binary_cross_entropy(presence.sigmoid(), occurs)
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_encnet_computes_in_any_type(dtype):
    decoder, maps = encnet()
    (logits,) = decoder.to(dtype).eval().logits([x.to(dtype) for x in maps])
    assert logits.dtype == dtype and logits.isfinite().all()


@torch.no_grad()
def test_encnets_scene_weighs_channels():
    """x + x * sigmoid(what attention says of the encoding), then ReLU."""
    decoder, maps = encnet()
    decoder.eval().conv_last_presence = None  # only the main head is asked for
    x = decoder.reduce(maps[-1])
    weights = decoder.attention(decoder.context(x)).sigmoid()
    assert (weights[0] - weights[1]).abs().max() > 1e-3, "they follow the image"
    wanted = decoder.conv_last((x + x * weights).relu())
    torch.testing.assert_close(decoder.logits(maps)[0], wanted)
    # By hand: channel 0 with a large number, the others with 0.
    nn.init.zeros_(decoder.attention.weight)
    nn.init.zeros_(decoder.attention.bias)
    decoder.attention.bias[0] = 50.0
    factor = torch.full((decoder.attention.out_channels, 1, 1), 1.5)
    factor[0] = 2.0
    torch.testing.assert_close(decoder.logits(maps)[0], decoder.conv_last((factor * x).relu()))


# ------------------------------------------------------------------ pyramids of pools and dilations


def test_pools_of_a_single_value_are_normalised_with_running_statistics():
    torch.manual_seed(0)
    norm, oracle = PooledBatchNorm2d(4).train(), nn.BatchNorm2d(4).train()
    x = torch.randn(2, 4, 1, 1)
    assert torch.equal(norm(x), oracle(x))
    assert torch.equal(norm.running_var, oracle.running_var)
    before = copy.deepcopy(norm.state_dict())
    oracle.load_state_dict(before)
    torch.testing.assert_close(norm(x[:1]), oracle.eval()(x[:1]))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="more than 1 value"):
        oracle.train()(x[:1])


def test_widths_of_denseaspp():
    """Sec. 3.4, of DenseNet121: 512 channels, each layer 256 inside and 64 out, 832 in the end."""
    with torch.device("meta"):
        decoder = DECODERS.get("denseaspp")((256, 512, 1024, 1024), 19)
    for i, (layer, dilation) in enumerate(zip(decoder.layers, (3, 6, 12, 18, 24), strict=True)):
        narrow, wide = (conv for conv in layer if isinstance(conv, nn.Conv2d))
        assert narrow.weight.shape == (256, 512 + 64 * i, 1, 1)
        assert wide.weight.shape == (64, 256, 3, 3)
        assert wide.dilation == wide.padding == (dilation, dilation)
    assert decoder.conv_last.in_channels == 832


def normalised(x, norm):
    """Evaluation BatchNorm and ReLU, written out for (N, C, ...)."""
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    shape = (1, -1) + (1,) * (x.dim() - 2)
    shift = norm.bias - norm.running_mean * scale
    return (x * scale.view(shape) + shift.view(shape)).clamp(min=0)


def dilated(x, weight, rate):
    """A 3x3 convolution as a sum over its taps, each of which reads a shifted image."""
    H, W = x.shape[-2:]
    padded = F.pad(x, (rate,) * 4)
    total = torch.zeros(x.shape[0], weight.shape[0], H, W, dtype=x.dtype)
    for i in range(3):
        for j in range(3):
            shifted = padded[:, :, i * rate : i * rate + H, j * rate : j * rate + W]
            total += torch.einsum("oc,nchw->nohw", weight[:, :, i, j], shifted)
    return total


@torch.no_grad()
def test_aspp_is_a_sum_over_its_branches():
    torch.manual_seed(0)
    aspp = ASPP(6, (1, 2, 5), width=4).double().eval()
    randomise(aspp, statistics=True)
    x, mean = torch.randn(2, 6, 7, 9).double(), torch.randn(2, 6, 1, 1).double()
    plain, *threes, image = aspp.convs
    branches = [normalised(torch.einsum("oc,nchw->nohw", plain[0].weight[:, :, 0, 0], x), plain[1])]
    for branch, rate in zip(threes, (1, 2, 5), strict=True):
        branches.append(normalised(dilated(x, branch[0].weight, rate), branch[1]))
    of_image = torch.einsum("oc,nc->no", image[1].weight[:, :, 0, 0], mean[:, :, 0, 0])
    branches.append(normalised(of_image, image[2])[:, :, None, None].expand(2, 4, 7, 9))
    parts = aspp.project[0].weight[:, :, 0, 0].split(4, dim=1)
    joined = sum(torch.einsum("oc,nchw->nohw", w, y) for w, y in zip(parts, branches, strict=True))
    wanted = normalised(joined, aspp.project[1])
    torch.testing.assert_close(aspp(x, mean), wanted)


@pytest.mark.parametrize(
    ("arch", "strides"),
    [
        *(("deeplabv3", (4, 16)), ("deeplabv3plus", (4, 16))),
        *(("bisenet", (8, 16, 32)), ("icnet", (8, 16, 32))),
    ],
)
@torch.no_grad()
def test_a_tile_knows_the_pools_of_the_whole_image(arch, strides):
    torch.manual_seed(0)
    channels = (4, 6, 8)[: len(strides)]
    decoder = DECODERS.get(arch)(channels, num_class=3, strides=strides).double().eval()
    randomise(decoder, statistics=True)
    maps = [torch.randn(1, c, 256 // s, 512 // s).double() for c, s in zip(channels, strides)]
    scales = getattr(decoder, "pool_scales", (1,))
    pools = {scale: F.adaptive_avg_pool2d(maps[-1], scale) for scale in scales}
    size = maps[-1].shape[2:]
    (wanted,) = decoder.logits(maps)
    torch.testing.assert_close(decoder.logits(maps, Tile(pools, 0, 0, *size))[0], wanted)
    others = {scale: pool + 1 for scale, pool in pools.items()}
    assert not torch.allclose(decoder.logits(maps, Tile(others, 0, 0, *size))[0], wanted)


@torch.no_grad()
def test_bisenet_weighs_channels_by_their_means():
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


# ------------------------------------------------------------ Hamburger, SegFormer, linear
@torch.no_grad()
def test_factorisation_is_the_multiplicative_update():
    """Pixel by pixel and entry by entry, and what it gives is nearer and nearer the map."""
    torch.manual_seed(0)
    layer = NonnegativeFactorisation(6, rank=3).double().eval()
    x = torch.rand(1, 6, 4, 5, dtype=torch.float64)
    pixels, bases = x[0].flatten(1).numpy(), layer.bases.numpy().copy()
    shares = torch.from_numpy(pixels.T @ bases).softmax(1).numpy()
    for step in range(8):
        wanted, given = pixels.T @ bases, shares @ bases.T @ bases
        shares = shares * wanted / (given + 1e-6)
        if step < 7:
            wanted, given = pixels @ shares, bases @ shares.T @ shares
            bases = bases * wanted / (given + 1e-6)
    kept = layer(x)[0].flatten(1)
    torch.testing.assert_close(kept, torch.from_numpy(bases @ shares.T))
    assert (kept - x[0].flatten(1)).square().mean() < x.var()


B0, B1 = (32, 64, 160, 256), (64, 128, 320, 512)  # channels of MiT


@pytest.mark.parametrize(
    ("arch", "channels", "width"),
    [("segformer", B0, 256), ("segformer", B1, 256), ("segformer_wide", B1, 768)],
    ids=["B0", "B1", "B2 to B5"],
)
@torch.no_grad()
def test_logits_of_segformer_are_those_of_transformers(arch, channels, width):
    models = pytest.importorskip("transformers.models.segformer.modeling_segformer")
    config = models.SegformerConfig(
        hidden_sizes=list(channels), decoder_hidden_size=width, num_labels=5
    )
    torch.manual_seed(0)
    theirs = models.SegformerDecodeHead(config).eval()
    torch.nn.init.normal_(theirs.batch_norm.running_mean)
    torch.nn.init.uniform_(theirs.batch_norm.running_var, 0.5, 2)
    ours = ModelBuilder.build_decoder(arch, channels=channels, num_class=5).eval()
    # Both have the same layers in the same order; a linear layer has no 1x1 window.
    for mine, its in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        mine.copy_(its.view(mine.shape))
    features = [torch.randn(2, c, 16 >> i, 24 >> i) for i, c in enumerate(channels)]
    wanted = theirs(features)
    torch.testing.assert_close(ours.logits(features)[0], wanted, rtol=0, atol=rounding(wanted, 5))


@torch.no_grad()
def test_linear_classifies_a_pixel_by_all_features_there():
    torch.manual_seed(0)
    decoder = ModelBuilder.build_decoder("linear", channels=(3, 4), num_class=5).eval()
    torch.nn.init.normal_(decoder.norm.running_mean)
    torch.nn.init.uniform_(decoder.norm.running_var, 0.5, 2)
    fine, coarse = torch.randn(2, 3, 4, 6), torch.randn(2, 4, 2, 3)
    large = F.interpolate(coarse, (4, 6), mode="bilinear", align_corners=False)
    pixels = torch.cat([fine, large], 1).movedim(1, -1)  # (B, H, W, C)
    normal = (pixels - decoder.norm.running_mean) / (decoder.norm.running_var + 1e-5).sqrt()
    layer = decoder.conv_last
    wanted = (normal + decoder.norm.bias) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(decoder.logits([fine, coarse])[0], wanted.movedim(-1, 1))
