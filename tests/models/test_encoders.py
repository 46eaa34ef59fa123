"""What every encoder must do, and each family of them by its paper or by torchvision."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pairs import PAIRS, declared_maps, on_meta, randomise, without_gradient
from tolerances import rounding
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import StochasticDepth

from mit_semseg.models import ENCODERS, ModelBuilder
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.encoders.base import widen_input
from mit_semseg.models.encoders.bisenetv2 import GatherExpansion
from mit_semseg.models.encoders.enet import Bottleneck, Downsampling
from mit_semseg.models.encoders.fcdensenet import DenseBlock
from mit_semseg.models.encoders.mobilenetv3 import MobileNetV3Large
from mit_semseg.models.encoders.mscan import MultiScaleConvAttention
from mit_semseg.models.encoders.stdc import ShortTermDenseConcatenate
from mit_semseg.models.encoders.xception import Separable
from mit_semseg.weights import imagenet_weights, load_into

# Deeper or wider forms of other encoders.
LARGE = re.compile(
    r"(torchvision_)?(resnet(34|101|152)|resnet50(?=_))|torchvision_resnet50|resnext101"
    r"|densenet(161|169|201)|fcdensenet(67|103)|(hrnetv2(_w32)?|ddrnet_23|pidnet_[ml]|stdc2|mscan_[sbl])$"
)


def family(arch):
    """The name without its dilation, which does not change the weights."""
    return re.sub(r"_?dilated(8|16)?$", "", arch)


def marked(names):
    return [pytest.param(n, marks=[pytest.mark.slow] if LARGE.match(n) else []) for n in names]


# --------------------------------------------------------------------------------- all of them
@pytest.mark.parametrize("arch", marked(ENCODERS.first_names()))
@torch.no_grad()
def test_emits_what_it_declares(arch):
    for height, width in ((64, 96), (65, 97)):
        images = torch.zeros(2, 3, height, width, device="meta")
        maps = on_meta(arch)(images, return_feature_maps=True)
        declared = declared_maps(arch, 2, height, width)
        assert [x.shape for x in maps] == [x.shape for x in declared]
    (last,) = on_meta(arch)(images)
    assert last.shape == maps[-1].shape


SMALL = sorted({family(n) for n in ENCODERS.first_names() if not LARGE.match(n)})


@pytest.mark.parametrize(
    "arch", sorted(set(SMALL) - {family(pair.encoder) for pair in PAIRS if not pair.slow})
)
def test_every_parameter_learns(arch):
    """Others learn in test_pairs.py."""
    torch.manual_seed(0)
    # In evaluation: statistics of the batch cancel biases that only another BatchNorm follows.
    encoder = ModelBuilder.build_encoder(arch, weights="none").eval()
    maps = encoder(torch.randn(2, 3, 32, 32), return_feature_maps=True)
    sum((x * torch.randn_like(x)).mean() for x in maps).backward()
    assert without_gradient(encoder) == []


@pytest.mark.parametrize("arch", SMALL)
def test_blocks_to_checkpoint_have_most_parameters(arch):
    with torch.device("meta"):
        encoder = ENCODERS.get(arch)()
    found = {p for block in checkpoint_activations(encoder) for p in block.parameters()}
    every = sum(p.numel() for p in encoder.parameters())
    assert sum(p.numel() for p in found) > 0.5 * every


def test_published_state_dicts(published_shapes):
    archs = [x.removeprefix("encoder/") for x in published_shapes if x.startswith("encoder/")]
    assert len(archs) == 9
    for arch in archs:
        own = {key: list(value.shape) for key, value in on_meta(arch).state_dict().items()}
        assert own == published_shapes[f"encoder/{arch}"], arch


DILATED = sorted({family(n) for n in ENCODERS.names() if f"{family(n)}dilated" in ENCODERS})


@pytest.mark.parametrize("name", DILATED)
def test_a_name_gives_the_output_stride(name):
    forms = ("", "_dilated16", "dilated", "_dilated8")
    plain, _, dilated8, older = found = [ENCODERS.get(name + form) for form in forms]
    assert dilated8 is older
    assert [form.strides[-1] for form in found] == [32, 16, 8, 8]
    assert {form.channels for form in found} == {plain.channels}
    assert {imagenet_weights(name + form) for form in forms} == {imagenet_weights(name)}
    if name in SMALL:  # of the others it is the same code
        shapes = [
            {k: v.shape for k, v in on_meta(name + form).state_dict().items()} for form in forms
        ]
        assert shapes[1:] == shapes[:1] * 3


# What each paper counts, or torchvision and timm 1.0 do, without classifiers.
SIZES = {
    "torchvision_resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "torchvision_resnet50": 25_557_032 - 2_049_000,
    "torchvision_resnet101": 44_549_160 - 2_049_000,
    "resnet152": 60_192_808 - 2_049_000,
    "resnext50": 25_028_904 - 2_049_000,
    "densenet121": 7_978_856 - 1025 * 1000,
    "densenet161": 28_681_000 - 2209 * 1000,
    "densenet169": 14_149_480 - 1665 * 1000,
    "densenet201": 20_013_928 - 1921 * 1000,
    "hrnetv2_w18": 9_562_260,
    "hrnetv2_w32": 29_305_536,
    "hrnetv2": 65_325_120,
    "xception65": 37_867_312,
    # 8.44 and 12.47 million with a classifier of two layers of 1024 units and one of 1000.
    "stdc1": 8_443_552 - 2 * 1024 * 1026 - 1024 * 1000,
    "stdc2": 12_474_016 - 2 * 1024 * 1026 - 1024 * 1000,
}


@pytest.mark.parametrize("arch", SIZES)
def test_size(arch):
    assert sum(p.numel() for p in on_meta(arch).parameters()) == SIZES[arch]


@pytest.mark.parametrize(
    ("arch", "layer3", "layer4"),
    [
        ("resnet50", [(2, 1), (1, 1), (1, 1)], [(2, 1), (1, 1), (1, 1)]),
        ("resnet50_dilated16", [(2, 1), (1, 1), (1, 1)], [(1, 1), (1, 2), (1, 2)]),
        ("resnet50_dilated8", [(1, 1), (1, 2), (1, 2)], [(1, 2), (1, 4), (1, 4)]),
        ("densenet121", 1, 1),
        ("densenet121_dilated16", 1, 2),
        ("densenet121_dilated8", 2, 4),
    ],
)
def test_strides_become_dilations(arch, layer3, layer4):
    encoder = on_meta(arch)
    if isinstance(layer3, int):
        for i, dilation in enumerate((1, 1, layer3, layer4), start=1):
            for layer in encoder.features.get_submodule(f"denseblock{i}"):
                assert layer.conv2.dilation == layer.conv2.padding == (dilation, dilation)
                assert layer.conv1.dilation == (1, 1)
        return
    for stage, wanted in ((encoder.layer3, layer3), (encoder.layer4, layer4)):
        convs = [block.conv2 for block in stage[:3]]
        assert [(conv.stride[0], conv.dilation[0]) for conv in convs] == wanted
        assert all(conv.padding == conv.dilation for conv in convs)
        assert stage[0].downsample[0].stride == convs[0].stride


def test_another_output_stride_is_refused():
    with pytest.raises(ValueError, match="output_stride is 8; .* supports 32, 16"):
        MobileNetV3Large(output_stride=8)


# ----------------------------------------------------------------------- VGG and DenseNet
def vgg(arch):
    """Ours, and torchvision's layers with the same weights."""
    torch.manual_seed(0)
    theirs = make_layers(cfgs["D"], batch_norm=arch != "vgg16")
    for layer in theirs:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    randomise(theirs, statistics=True)
    ours = ENCODERS.get(arch)()
    state = {f"features.{key}": value for key, value in theirs.state_dict().items()}
    report = load_into(ours, {**state, "classifier.0.bias": torch.zeros(9)}, what="encoder")
    assert report.ok and report.unexpected == ["classifier.0.bias"]
    return ours, theirs


@pytest.mark.parametrize("arch", ["vgg16", "vgg16_bn", "vgg16_bn_indices"])
@torch.no_grad()
def test_vgg_is_torchvisions(arch):
    ours, theirs = vgg(arch)
    x = torch.randn(2, 3, 32, 64)
    for mode in (True, False):
        maps = ours.train(mode)(x, return_feature_maps=True)
        pooled, y = [], x
        for layer in theirs.train(mode):
            before, y = y, layer(y)
            if isinstance(layer, nn.MaxPool2d):
                pooled.append((y, before))
        torch.testing.assert_close(maps[-1], pooled[-1][0])
        for given, (wanted, before) in zip(maps, pooled):
            if arch == "vgg16_bn_indices":
                assert given.dtype == torch.int64
                given = before.flatten(2).gather(2, given.flatten(2)).view_as(given)
            torch.testing.assert_close(given, wanted)


@torch.no_grad()
def test_pooling_indices_of_an_odd_image_point_at_the_maxima():
    ours, theirs = vgg("vgg16_bn_indices")
    x = torch.randn(1, 3, 45, 71)
    *indices, last = ours.eval()(x, return_feature_maps=True)
    y, found = F.pad(x, (0, 1, 0, 1)), iter(indices)
    for layer in theirs.eval():
        if isinstance(layer, nn.MaxPool2d):
            plane, index = y, next(found)
            y = F.max_pool2d(plane, 2, ceil_mode=True)
            torch.testing.assert_close(plane.flatten(2).gather(2, index.flatten(2)), y.flatten(2))
        else:
            y = layer(y)
    torch.testing.assert_close(last, y)
    # Each plane but the first has the shape of the indices before.
    assert [tuple(i.shape[2:]) for i in indices] == [(23, 36), (12, 18), (6, 9), (3, 5), (2, 3)]


@pytest.mark.parametrize("training", [False, True])
def test_densenet_is_torchvisions(training):
    torch.manual_seed(0)
    theirs = torchvision.models.densenet121(weights=None)
    randomise(theirs)
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.5, 2)
    ours = ENCODERS.get("densenet121")()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier")}
    ours.load_state_dict(weights)
    emitted = []
    for i in (1, 2, 3):
        relu = theirs.features.get_submodule(f"transition{i}.relu")
        relu.register_forward_hook(lambda module, args, output: emitted.append(output))
    image = torch.randn(2, 3, 64, 64)
    emitted.append(theirs.train(training).features(image).relu())
    maps = ours.train(training)(image, return_feature_maps=True)
    for given, wanted in zip(maps, emitted, strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=rounding(wanted, 121))
    maps[-1].square().mean().backward()
    emitted[-1].square().mean().backward()
    torch.testing.assert_close(ours.features.conv0.weight.grad, theirs.features.conv0.weight.grad)


# ------------------------------------------------------------------------------------------ DRN
def test_drn_c_26_is_that_of_table_1():
    encoder = on_meta("drn_c_26")
    # 21.1 million with the classifier, 512 * 1000 + 1000.
    assert round((sum(p.numel() for p in encoder.parameters()) + 513_000) / 1e6, 1) == 21.1
    # 26 layers with weights: all of these but the shortcuts, and the classifier.
    convs = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert len([conv for conv in convs if conv.kernel_size != (1, 1)]) + 1 == 26
    levels = [encoder.get_submodule(f"layer{i}").modules() for i in range(1, 9)]
    dilations = [{m.dilation[0] for m in level if hasattr(m, "dilation")} for level in levels]
    assert dilations == [{1}, {1}, {1}, {1}, {1, 2}, {1, 4}, {2}, {1}]  # 1: shortcuts


@torch.no_grad()
def test_the_last_levels_of_drn_have_no_shortcuts():
    torch.manual_seed(0)
    encoder = ENCODERS.get("drn_c_26")().eval()
    for level, shortcut in ((6, True), (7, False), (8, False)):
        stage = encoder.get_submodule(f"layer{level}")
        for block in stage:
            block.conv2.weight.zero_()
        given = stage(torch.rand(1, stage[0].conv1.in_channels, 4, 4))
        assert bool(given.any()) == shortcut


# ------------------------------------------------------------------------------------- Xception
def test_xceptions_layers_dilation_and_relus():
    encoder = on_meta("xception65")
    convs = {k: m for k, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    layers = [k for k in convs if not k.endswith("depthwise") and "shortcut" not in k]
    assert len(layers) == 65  # a separable convolution is one, as in Xception's 36
    dilated = {k for k, conv in convs.items() if conv.dilation == (2, 2)}
    assert dilated == {f"last.{i}.depthwise" for i in range(3)}
    strided = [k for k, conv in convs.items() if conv.stride == (2, 2) and "shortcut" not in k]
    assert strided == ["conv1", *(f"entry{i}.convs.2.depthwise" for i in (1, 2, 3))]
    # Only the last three have their ReLUs after the convolutions.
    found = [m for m in encoder.modules() if isinstance(m, Separable)]
    behind = [isinstance(m.relu_pointwise, nn.ReLU) for m in found]
    assert behind == [False] * (len(found) - 3) + [True] * 3
    assert behind == [isinstance(m.relu_first, nn.Identity) for m in found]


@torch.no_grad()
def test_a_block_of_xception_does_not_change_its_input():
    torch.manual_seed(0)
    block = ENCODERS.get("xception65")().middle[0].eval()
    x = torch.randn(1, 728, 3, 4)
    before = x.clone()
    y, residual = block(x), block.convs(before.clone())
    assert torch.equal(x, before)
    torch.testing.assert_close(y, before + residual)


@pytest.mark.parametrize("relu_first", [True, False])
@torch.no_grad()
def test_a_separable_convolution_step_by_step(relu_first):
    torch.manual_seed(0)
    layer = Separable(4, 6, dilation=2, relu_first=relu_first).eval()
    x = torch.randn(1, 4, 9, 9)

    def normalised(x):
        return x / (1 + 1e-3) ** 0.5  # statistics and weights as they begin

    inner = x.relu() if relu_first else x
    inner = F.conv2d(inner, layer.depthwise.weight, padding=2, dilation=2, groups=4)
    inner = normalised(inner) if relu_first else normalised(inner).relu()
    wanted = normalised(F.conv2d(inner, layer.pointwise.weight))
    torch.testing.assert_close(layer(x), wanted if relu_first else wanted.relu())


# ----------------------------------------------------------------------------------------- ENet
def test_enets_stages_are_those_of_table_1():
    encoder = on_meta("enet")
    for stage in (encoder.stage2, encoder.stage3):
        convs = [[m for m in block.modules() if isinstance(m, nn.Conv2d)][1:-1] for block in stage]
        kernels = [tuple(conv.kernel_size for conv in found) for found in convs]
        assert kernels == [((3, 3),), ((3, 3),), ((5, 1), (1, 5)), ((3, 3),)] * 2
        assert [found[0].dilation[0] for found in convs] == [1, 2, 1, 4, 1, 8, 1, 16]
    drops = {m.p for m in encoder.stage1.modules() if isinstance(m, nn.Dropout2d)}
    later = {m.p for m in encoder.stage3.modules() if isinstance(m, nn.Dropout2d)}
    assert (drops, later) == ({0.01}, {0.1})


def test_enets_main_branch_is_pooled_and_filled_up():
    block = Downsampling(16, 24, 0.0).eval()
    nn.init.zeros_(block.extension[-2].weight)  # of the BatchNorm: nothing is added
    x = torch.rand(1, 16, 7, 9)
    y, indices = block(x)
    torch.testing.assert_close(y[:, :16], F.max_pool2d(x, 2, ceil_mode=True))
    assert not y[:, 16:].any()
    assert torch.equal(x.flatten(2).gather(2, indices.flatten(2)), y[:, :16].flatten(2))


@pytest.mark.parametrize("options", [{}, {"dilation": 8}, {"asymmetric": True}])
@torch.no_grad()
def test_enets_bottleneck_adds_to_its_input(options):
    torch.manual_seed(0)
    block = Bottleneck(16, 0.1, **options).eval()
    x = torch.randn(2, 16, 9, 11)
    added = block.extension(x)
    assert added.shape == x.shape and added.abs().max() > 0.1
    torch.testing.assert_close(block(x), F.prelu(x + added, torch.full((16,), 0.25)))


def test_enet_convolves_depth_and_does_not_pool_it():
    encoder = ENCODERS.get("enet")()
    widen_input(encoder, 4)
    first, _, last = encoder.eval()(torch.randn(1, 4, 32, 32), return_feature_maps=True)
    assert first.shape == (1, 16, 8, 8) and last.shape == (1, 128, 4, 4)


# ---------------------------------------------------------------------- FC-DenseNet, BiSeNet, ICNet
def test_a_dense_block_reads_everything_before():
    torch.manual_seed(0)
    block = DenseBlock(5, 3, 2).eval()
    known = x = torch.randn(1, 5, 4, 6)
    for norm, _, conv, _ in block.layers:
        new = F.conv2d(norm(known).relu(), conv.weight, conv.bias, padding=1)
        known = torch.cat([known, new], dim=1)
    torch.testing.assert_close(block(x), known[:, 5:])


@torch.no_grad()
def test_bisenets_context_path_is_resnet18():
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
def test_icnets_branches_see_the_image_at_three_sizes():
    """At half size up to the first block of the second stage, halved again for all the others."""
    names = {k: v.shape for k, v in on_meta("icnet_resnet50").state_dict().items()}
    backbone = {k[9:]: shape for k, shape in names.items() if k.startswith("backbone.")}
    assert backbone == {k: v.shape for k, v in on_meta("resnet50dilated").state_dict().items()}
    assert all(k.startswith(("backbone.", "full.")) for k in names)
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
    rest = nn.Sequential(*stages[1:], net.layer3, net.layer4)
    wanted = rest(F.avg_pool2d(wanted, 2))
    torch.testing.assert_close(quarter, wanted, rtol=0, atol=rounding(wanted, 50))
    torch.testing.assert_close(full, encoder.full(image))


# ------------------------------------------------------------------- BiSeNetV2, STDC and MSCAN
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_block_of_bisenetv2_is_added_to_its_input(stride):
    torch.manual_seed(0)
    block = GatherExpansion(6, 6 * stride, stride).eval()
    x = torch.randn(2, 6, 8, 12)
    around = x
    if stride == 2:
        around = F.conv2d(x, block.shortcut[0][0].weight, None, 2, 1, 1, 6) / (1 + 1e-5) ** 0.5
        around = F.conv2d(around, block.shortcut[1][0].weight) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x), (block.main(x) + around).relu())


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_block_of_stdc_joins_what_every_convolution_gives(stride):
    torch.manual_seed(0)
    block = ShortTermDenseConcatenate(6, 16, stride).eval()
    x = torch.randn(2, 6, 9, 11)

    def conv(layers, x):
        weight = layers[0].weight
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2).div((1 + 1e-5) ** 0.5).relu()

    first = conv(block.first, x)
    maps, y = [first], first
    if stride == 2:
        maps = [F.avg_pool2d(F.pad(first, (1, 1, 1, 1)), 3, 2)]
        y = F.conv2d(first, block.down[0].weight, None, 2, 1, 1, 8) / (1 + 1e-5) ** 0.5
    for layers in block.rest:
        y = conv(layers, y)
        maps.append(y)
    assert [x.shape[1] for x in maps] == [8, 4, 2, 2]
    torch.testing.assert_close(block(x), torch.cat(maps, 1))


@torch.no_grad()
def test_attention_of_mscan_sees_strips_of_7_11_and_21_pixels_around_a_square_of_5():
    attention = MultiScaleConvAttention(1)
    for parameter in attention.parameters():
        parameter.fill_(float(parameter.ndim > 1))
    # Weights are the number of ways that lead from the one pixel to each.
    x = torch.zeros(1, 1, 41, 41)
    x[0, 0, 20, 20] = 1
    near = attention.conv0(x)
    seen = near.clone()
    for side in (7, 11, 21):
        window = torch.ones(1, 1, side, side)
        seen += F.conv2d(near, window, padding=side // 2)
    weights = attention.conv3(
        near
        + sum(
            getattr(attention, f"conv{i}_2")(getattr(attention, f"conv{i}_1")(near))
            for i in range(3)
        )
    )
    torch.testing.assert_close(weights, seen)
    torch.testing.assert_close(attention(x)[0, 0, 20, 20], seen[0, 0, 20, 20])


def test_later_blocks_of_mscan_are_dropped_more_often():
    rates = [m.p for m in on_meta("mscan_l").modules() if isinstance(m, StochasticDepth)]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3) and rates == sorted(rates)
