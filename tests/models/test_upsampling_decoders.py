"""Decoders that go up to the image step by step, as the figures of their papers draw them."""

import pytest
import torch
import torch.nn.functional as F
from pairs import Pair, declared_maps
from torch import nn

from mit_semseg.losses import build_loss
from mit_semseg.models import DECODERS, ENCODERS, Encoder, ModelBuilder, SegmentationModule
from mit_semseg.models.decoders.base import init_weights
from mit_semseg.models.decoders.deeplabv3plus import low_level
from mit_semseg.models.decoders.fcn import FCN, bilinear_upsampling
from mit_semseg.models.decoders.icnet import CascadeFusion
from mit_semseg.models.decoders.upsampling import full_convolution, unpool, up_convolution

# --------------------------------------------------------------------------------------------- FCN


@pytest.mark.parametrize("factor", [2, 4, 8])
@torch.no_grad()
def test_fcns_upsampling_starts_as_bilinear(factor):
    x = torch.randn(2, 3, 5, 7)
    given = bilinear_upsampling(3, factor)(x)
    wanted = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    assert given.shape == wanted.shape
    half = factor // 2  # nearer to the edge it sees zeros, where interpolation repeats the edge
    inner = slice(half, -half)
    torch.testing.assert_close(given[:, :, inner, inner], wanted[:, :, inner, inner])


@torch.no_grad()
def test_fcn8s_by_figure_3(monkeypatch):
    """2x (2x pool5 + pool4) + pool3."""
    monkeypatch.setattr(FCN, "width", 64)
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


def test_fcn_does_not_upsample_maps_of_equal_stride(monkeypatch):
    monkeypatch.setattr(FCN, "width", 64)
    decoder = ModelBuilder.build_decoder(
        "fcn8s", num_class=4, channels=(6, 8, 10), strides=(8, 8, 8)
    )
    maps = [torch.randn(1, c, 5, 7) for c in (6, 8, 10)]
    assert decoder.eval().logits(maps)[0].shape == (1, 4, 5, 7)
    assert not list(decoder.ups.parameters())
    for up in ModelBuilder.build_decoder("fcn8s", channels=(8, 8, 8), num_class=3).ups:
        assert torch.equal(up.weight, bilinear_upsampling(3, 2).weight)


# -------------------------------------------------------------------------------- U-Net, LinkNet


@torch.no_grad()
def test_unet_by_figure_1():
    torch.manual_seed(0)
    enc = ENCODERS.get("unet")().eval()
    dec = ModelBuilder.build_decoder("unet", num_class=3, channels=enc.channels).eval()
    x = torch.randn(1, 3, 32, 48)

    def convs(block, x):
        found = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(found) == len(norms) == 2
        for conv, norm in zip(found, norms):
            x = F.relu(norm(F.conv2d(x, conv.weight, padding=1)))
        return x

    down = [convs(enc.levels[0], x)]
    for level in enc.levels[1:]:
        down.append(convs(level, F.max_pool2d(down[-1], 2)))
    y = down.pop()
    for up, block in zip(dec.ups, dec.blocks):
        y = F.conv_transpose2d(y, up.weight, up.bias, stride=2)
        y = convs(block, torch.cat([down.pop(), y], dim=1))
    y = F.conv2d(y, dec.conv_last.weight, dec.conv_last.bias)
    torch.testing.assert_close(dec.logits(enc(x, return_feature_maps=True))[0], y)


@pytest.mark.parametrize("arch", ["unet", "unet_bilinear"])
def test_unet_goes_up_where_strides_double(arch):
    """Where strides are equal no transposed convolution is trained for nothing."""
    for encoder in ("resnet101dilated", "resnet50_dilated16", "mobilenetv2dilated"):
        declared = ENCODERS.get(encoder)
        with torch.device("meta"):
            decoder = DECODERS.get(arch)(declared.channels, 7, strides=declared.strides)
        (scores,) = decoder.logits(declared_maps(encoder, 1, 96, 64))
        assert scores.shape == (1, 7, 24, 16)
        doubled = sum(b == 2 * a for a, b in zip(declared.strides, declared.strides[1:]))
        transposed = [m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
        assert len(transposed) == (doubled if arch == "unet" else 0)
    with pytest.raises(ValueError, match=r"strides are \(4, 6\), but this decoder needs"):
        ModelBuilder.build_decoder(arch, channels=(8, 8), strides=(4, 6))


@pytest.mark.parametrize("factor", [2, 4])
@torch.no_grad()
def test_transposed_convolutions_start_with_hes_gain(factor):
    """As convolutions do: half of what a ReLU lets through comes out as large as it went in."""
    torch.manual_seed(0)
    for build in (up_convolution, full_convolution):
        layer = nn.Sequential(build(96, 48, factor))
        init_weights(layer)
        if layer[0].bias is not None:
            torch.nn.init.zeros_(layer[0].bias)
        y = layer(torch.randn(2, 96, 24, 24))[:, :, 8:-8, 8:-8]
        assert y.square().mean().item() == pytest.approx(2, rel=0.1)


@torch.no_grad()
def test_linknet_by_figure_1():
    torch.manual_seed(0)
    channels = (4, 8, 12, 16)
    maps = [torch.randn(2, c, 24 // 2**i, 32 // 2**i) for i, c in enumerate(channels)]
    decoder = ModelBuilder.build_decoder(
        "linknet", num_class=5, channels=channels, strides=(4, 8, 16, 32)
    ).eval()
    fourth, third, second, first = decoder.blocks
    x = maps[2] + fourth(maps[3])
    x = maps[1] + third(x)
    x = maps[0] + second(x)
    wanted = decoder.conv_last(decoder.conv(decoder.up(first(x))))
    assert torch.equal(decoder.logits(maps)[0], wanted)
    assert wanted.shape == (2, 5, 96, 128)


@pytest.mark.parametrize("encoder", ["resnet34", "resnet18dilated", "resnet50_dilated16", "unet"])
def test_scores_of_linknet_have_the_size_of_the_image(encoder):
    declared = ENCODERS.get(encoder)
    with torch.device("meta"):
        decoder = DECODERS.get("linknet")(declared.channels, 7, strides=declared.strides)
    (scores,) = decoder.logits(declared_maps(encoder, 1, 96, 64))
    assert scores.shape == (1, 7, 96, 64)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_full_convolutions_multiply_sides(factor):
    x = torch.randn(1, 4, 5, 7)
    y = full_convolution(4, 6, factor)(x)
    assert y.shape == (1, 6, 5 * factor, 7 * factor)
    # No pixel is left out, as gaps between small kernels would.
    ones = full_convolution(1, 1, factor)
    torch.nn.init.ones_(ones.weight)
    assert (ones(torch.ones(1, 1, 5, 7)) >= 1).all()


def test_batch_norms_add_to_the_variance_what_the_authors_code_adds():
    """In LinkNet 1e-3, but 1e-5 after the first of the last two full convolutions."""
    with torch.device("meta"):
        linknet = ModelBuilder.build_decoder("linknet", channels=(4, 8, 12, 16), num_class=5)
        modules = {name: Pair(name, name).build() for name in ("enet", "fcdensenet56")}
    norms = {k: m for k, m in linknet.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 4 * 3 + 2
    assert {k: m.eps for k, m in norms.items()} == dict.fromkeys(norms, 1e-3) | {"up.1": 1e-5}
    # Of FC-DenseNet a dense block of 4 layers eleven times, and five transitions down.
    for name, count, eps in (("enet", 71 + 17, 1e-3), ("fcdensenet56", 11 * 4 + 5, 1e-4)):
        found = [m.eps for m in modules[name].modules() if isinstance(m, nn.BatchNorm2d)]
        assert found == [eps] * count


# -------------------------------------------------------------------- SegNet, ENet, FC-DenseNet


def test_unpooling_by_hand():
    plane = torch.tensor([[1.0, 5, 2, 0], [3, 4, 9, 8], [7, 0, 1, 1], [6, 2, 1, 3]])[None, None]
    pooled, indices = F.max_pool2d(plane, 2, return_indices=True)
    assert pooled.tolist() == [[[[5, 9], [7, 3]]]]
    assert indices.tolist() == [[[[1, 6], [8, 15]]]]
    back = unpool(torch.tensor([[[[10.0, 20], [30, 40]]]]), indices, (4, 4))
    assert back.tolist() == [[[[0, 10, 0, 0], [0, 0, 20, 0], [30, 0, 0, 0], [0, 0, 0, 40]]]]


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (7, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unpooling_is_torchs(size, layout):
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


def test_segnet_needs_only_fc_dim():
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder("segnet", fc_dim=512)
    assert decoder.channels == (64, 128, 256, 512, 512, 512)


def test_segnet_mirrors_vgg16():
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


@pytest.mark.parametrize("pair", [("enet", "enet"), ("vgg16_bn_indices", "segnet")])
@torch.no_grad()
def test_scores_beyond_an_odd_image_are_cropped(pair):
    module = Pair(*pair).build().eval()
    image = torch.randn(1, 3, 33, 37)
    (emitted,) = module.decoder.logits(module.features(image))
    assert emitted.shape[2] > 33 and emitted.shape[3] > 37
    wanted = emitted[..., :33, :37]
    assert torch.equal(module.logits(image), wanted)
    assert torch.equal(module({"img_data": image}, segSize=(33, 37)), wanted.softmax(1))
    label = torch.randint(0, 5, (1, 33, 37))
    loss, _ = module({"img_data": image, "seg_label": label})
    torch.testing.assert_close(loss, F.cross_entropy(wanted, label))


def test_widths_of_fcdensenet103():
    encoder = ENCODERS.get("fcdensenet103")
    assert encoder.channels == (112, 192, 304, 464, 656, 240)
    with torch.device("meta"):
        decoder = DECODERS.get("fcdensenet103")(encoder.channels)
    read = [block.layers[0][0].num_features for block in decoder.blocks]
    written = [n + 16 * depth for n, depth in zip(read, (12, 10, 7, 5, 4))]
    assert written == [1088, 816, 576, 384, 256]  # the paper prints 578 for 576
    assert decoder.conv_last.in_channels == 256


@torch.no_grad()
def test_a_transition_up_is_a_flipped_one_of_the_authors():
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


# ------------------------------------------------------------------------ DUNet, DeepLabv3+, ICNet


@torch.no_grad()
def test_a_pixel_of_dunet_becomes_a_block():
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
    for temperature in (0.0, -1.0):  # no division by zero
        decoder.temperature.fill_(temperature)
        assert decoder.logits(features)[0].isfinite().all()


def test_scores_of_dunet_have_the_size_of_the_image():
    for strides, factor in (((4, 8, 16, 32), 32), ((4, 8, 8, 8), 8), (None, 8)):
        with torch.device("meta"):
            decoder = DECODERS.get("dunet")((8, 8, 8, 8), 5, strides=strides)
            (logits,) = decoder.logits([torch.zeros(1, 8, 4, 6)] * 4)
        assert logits.shape == (1, 5, 4 * factor, 6 * factor)


@pytest.mark.parametrize(
    ("strides", "index"),
    [(None, 0), ((4, 8, 8, 8), 0), ((2, 4, 8, 16, 32), 1), ((8, 16), 0), ((1, 2, 4), 1)],
)
def test_deeplabv3plus_reads_the_map_of_stride_4(strides, index):
    assert low_level(strides) == index
    xception = ENCODERS.get("xception65")
    assert xception.channels[low_level(xception.strides)] == 256  # before the stride
    if strides:
        channels = tuple(range(5, 5 + len(strides)))
        with torch.device("meta"):
            decoder = DECODERS.get("deeplabv3plus")(channels, num_class=3, strides=strides)
            maps = [torch.zeros(1, c, 96 // s, 64 // s) for c, s in zip(channels, strides)]
            (logits,) = decoder.eval().logits(maps)
        assert decoder.low[0].in_channels == channels[index]
        assert logits.shape == (1, 3, 96 // strides[index], 64 // strides[index])


@torch.no_grad()
def test_icnets_fusion_by_figure_3():
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


@pytest.mark.parametrize(("given", "used"), [((), (0.4, 0.16)), ((0.1, 3.0), (0.1, 3.0))])
def test_icnets_losses_are_added_up(given, used):
    """Against torch's own cross entropy, of scores resized to the label."""

    class Given(Encoder):
        channels, strides = (8, 12, 16), (8, 16, 32)

        def feature_maps(self, images):
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


def test_icnets_heads_have_the_published_strides():
    with torch.device("meta"):
        decoder = DECODERS.get("icnet")((64, 512, 2048), 19).train()
        maps = [torch.zeros(2, c, 128 // s, 256 // s) for c, s in ((64, 8), (512, 16), (2048, 32))]
        heads = decoder.logits(maps)
    assert [tuple(x.shape[2:]) for x in heads] == [(32, 64), (16, 32), (8, 16)]
