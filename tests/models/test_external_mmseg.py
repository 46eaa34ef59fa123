"""Checkpoints of mmsegmentation: equality with its heads, written as functions of tensors."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.resnet import Bottleneck, ResNet

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.engine.pretrained import load_pretrained
from mit_semseg.models import ModelBuilder
from mit_semseg.models.external import save_pretrained
from mit_semseg.models.external.mmseg import MMSegNetwork

NAMES = ("road", "sky", "tree")
HEADS = ("fcn", "psp", "aspp", "sep_aspp", "uper")
OPTIONS = {
    "fcn": {"convs": 2, "concat": True},
    "sep_aspp": {"low": 4, "separable_bottleneck": False},
}


def checkpoint(head, file, deep=False):
    """A small network's random tensors, in a file as the library writes it."""
    torch.manual_seed(0)
    config = {
        "stem": 8 if deep else 64,
        "deep_stem": deep,
        "stem_out": 16 if deep else 64,
        "channels": [32, 64, 64, 128] if deep else [256, 512, 1024, 2048],
        "depths": [1, 1, 1, 1],
        "output_stride": 32 if head == "uper" else 8,
        "head": head,
        "head_options": {"width": 8, **OPTIONS.get(head, {})},
        "auxiliary_options": {"width": 8, "convs": 1, "concat": False},
    }
    network = MMSegNetwork(config, len(NAMES))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    torch.save({"meta": {"CLASSES": list(NAMES)}, "state_dict": state}, file)
    return state


# ---------------------------------------------------------------- the library's heads as functions
def unit(x, state, name, dilation=1):
    weight = state[f"{name}.conv.weight"]
    padding = dilation * (weight.shape[-1] // 2)
    groups = x.shape[1] // weight.shape[1]
    y = F.conv2d(x, weight, padding=padding, dilation=dilation, groups=groups)
    mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
    return F.batch_norm(y, mean, var, state[f"{name}.bn.weight"], state[f"{name}.bn.bias"]).relu()


def separable(x, state, name, dilation=1):
    return unit(unit(x, state, f"{name}.depthwise_conv", dilation), state, f"{name}.pointwise_conv")


def up(x, like):
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def pyramid(x, s):
    pools = [F.adaptive_avg_pool2d(x, scale) for scale in (1, 2, 3, 6)]
    units = [up(unit(p, s, f"psp_modules.{i}.1"), x) for i, p in enumerate(pools)]
    return unit(torch.cat([x, *units], 1), s, "bottleneck")


def context(x, s, convolve):
    whole = up(unit(x.mean((2, 3), keepdim=True), s, "image_pool.1"), x)
    parts = [unit(x, s, "aspp_modules.0")]
    parts += [convolve(x, s, f"aspp_modules.{i}", d) for i, d in enumerate((12, 24, 36), 1)]
    return unit(torch.cat([whole, *parts], 1), s, "bottleneck")


def scores(head, maps, s):
    x = maps[-1]
    if head == "fcn":
        y = unit(unit(x, s, "convs.0"), s, "convs.1")
        y = unit(torch.cat([x, y], 1), s, "conv_cat")
    elif head == "psp":
        y = pyramid(x, s)
    elif head == "aspp":
        y = context(x, s, unit)
    elif head == "sep_aspp":
        fine = unit(maps[0], s, "c1_bottleneck")
        y = torch.cat([up(context(x, s, separable), fine), fine], 1)
        y = separable(separable(y, s, "sep_bottleneck.0"), s, "sep_bottleneck.1")
    else:
        sides = [unit(m, s, f"lateral_convs.{i}") for i, m in enumerate(maps[:3])]
        sides.append(pyramid(x, s))
        for i in (2, 1, 0):
            sides[i] = sides[i] + up(sides[i + 1], sides[i])
        levels = [unit(sides[i], s, f"fpn_convs.{i}") for i in range(3)] + [sides[3]]
        y = unit(torch.cat([up(m, levels[0]) for m in levels], 1), s, "fpn_bottleneck")
    return F.conv2d(y, s["conv_seg.weight"], s["conv_seg.bias"])


def backbone_maps(x, state, dilated):
    """Torchvision's ResNet, whose first dilated block contracts its dilation as there."""
    net = ResNet(Bottleneck, [1] * 4, replace_stride_with_dilation=[False, dilated, dilated])
    own = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    net.load_state_dict(own | {k: v for k, v in net.state_dict().items() if k.startswith("fc.")})
    net.eval()
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    maps = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def part(state, prefix):
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("head", HEADS)
def test_logits_are_the_librarys_formulas(head, tmp_path):
    state = checkpoint(head, tmp_path / "model.pth")
    module, classes, options = load_pretrained(f"mmseg:{tmp_path / 'model.pth'}")
    assert classes.names == NAMES and options.DATASET.num_class == 3
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = backbone_maps(x, state, head != "uper")
        expected = scores(head, maps, part(state, "decode_head."))
        found = module.logits(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


def test_a_deep_stem_and_what_is_saved(tmp_path):
    state = checkpoint("psp", tmp_path / "model.pth", deep=True)
    module, classes, _ = load_pretrained(f"mmseg:{tmp_path / 'model.pth'}")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    stem, y = part(state, "backbone.stem."), x
    for conv, norm, stride in (("0", "1", 2), ("3", "4", 1), ("6", "7", 1)):
        y = F.conv2d(y, stem[f"{conv}.weight"], stride=stride, padding=1)
        values = (stem[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        y = F.batch_norm(y, *values).relu()
    with torch.no_grad():
        assert torch.allclose(module.encoder.net.stem(x), y, atol=1e-5)
    save_pretrained(module.encoder, module.decoder, tmp_path / "out", classes.names)
    back = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["state_dict"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_other_classes_and_the_auxiliary_head(tmp_path, caplog):
    checkpoint("psp", tmp_path / "model.pth", deep=True)
    arch = ModelOptions(arch=f"mmseg:{tmp_path / 'model.pth'}")
    options = Options(MODEL=arch, DATASET=DataOptions(num_class=5), DIR=str(tmp_path))
    module = ModelBuilder.from_config(options).train()
    assert "4 skipped, another number of classes" in caplog.text
    label = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    loss, _ = module({"img_data": x, "seg_label": label})
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_segformer_is_that_of_transformers_with_batchnorm_in_its_head(tmp_path):
    t = pytest.importorskip("transformers")
    config = {
        "channels": [16, 32, 80, 128],
        "patches": [7, 3, 3, 3],
        "depths": [2, 1, 1, 1],
        "reductions": [4, 1, 1, 1],
        "expansions": [4, 4, 4, 4],
        "output_stride": 32,
        "head": "segformer",
        "head_options": {"width": 8},
        "auxiliary_options": None,
    }
    torch.manual_seed(0)
    state = MMSegNetwork(config, 3).state_dict()
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    module = load_pretrained(f"mmseg:{tmp_path / 'model.pth'}").module

    theirs = t.SegformerModel(
        t.SegformerConfig(
            hidden_sizes=[16, 32, 80, 128],
            depths=[2, 1, 1, 1],
            num_attention_heads=[1, 2, 5, 8],
            sr_ratios=[4, 1, 1, 1],
        )
    ).eval()
    own = theirs.state_dict()
    theirs.load_state_dict({name: of_mmseg(name, state, own) for name in own})
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = list(theirs(x, output_hidden_states=True).hidden_states)
        s = part(state, "decode_head.")
        levels = [up(unit(m, s, f"convs.{i}"), maps[0]) for i, m in enumerate(maps)]
        y = unit(torch.cat(levels, 1), s, "fusion_conv")
        expected = F.conv2d(y, s["conv_seg.weight"], s["conv_seg.bias"])
        found = module.logits(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.std()))


def of_mmseg(name, state, own):
    """A tensor of transformers' SegFormer from a file of mmsegmentation."""
    _, stage, *inner, kind = name.split(".")
    layer, joined = f"backbone.layers.{stage}", ".".join(inner)
    if inner[0] == "blocks":
        layer, joined = f"{layer}.1.{inner[1]}", ".".join(inner[2:])
    if joined in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
        third = state[f"{layer}.attn.attn.in_proj_{kind}"].chunk(3)
        return third["qkv".index(joined[10])]
    theirs = {
        "patch_embeddings.proj": "0.projection",
        "patch_embeddings.layer_norm": "0.norm",
        "layer_norm": "2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.attn.out_proj",
        "attention.sequence_reduction.sequence_reduction": "attn.sr",
        "attention.sequence_reduction.layer_norm": "attn.norm",
        "mlp.fc1": "ffn.layers.0",
        "mlp.dwconv.dwconv": "ffn.layers.1",
        "mlp.fc2": "ffn.layers.4",
    }[joined]
    return state[f"{layer}.{theirs}.{kind}"].view_as(own[name])


def test_other_models_are_refused(tmp_path):
    file = tmp_path / "model.pth"
    grouped = "backbone.layer4.0.conv2.weight"  # of ResNeXt
    for changes in (
        {"backbone.layer4.0.conv3.weight": None},
        {"decode_head.nl_block.g.conv.weight": torch.zeros(4, 8, 1, 1)},  # the non-local network
        {grouped: torch.zeros(512, 16, 3, 3)},
    ):
        state = checkpoint("fcn", file) | changes
        torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, file)
        with pytest.raises(ValueError, match="is another model than FCN, PSPNet"):
            load_pretrained(f"mmseg:{file}")
    with pytest.raises(FileNotFoundError, match="mmseg:"):
        load_pretrained(f"mmseg:{tmp_path / 'none.pth'}")
