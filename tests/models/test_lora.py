"""Low-rank adapters, beside peft's own on the same networks."""

import copy
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from other_libraries import NAMES, SIDE, saved_hf
from tolerances import rounding
from torch import nn

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.engine.training.finetune import trainable
from mit_semseg.models import Encoder, ModelBuilder, SegmentationModule
from mit_semseg.models.activation_checkpointing import checkpoint_activations
from mit_semseg.models.inference import inference_copy
from mit_semseg.models.lora import add_adapters, merged_state, with_adapters

peft = pytest.importorskip("peft", reason="peft is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")
RANK, ALPHA, CLASSES = 4, 8.0, len(NAMES)
VIT = "timm:test_vit"  # 6 blocks of 64 channels


def build(arch=VIT, weights="none", **model):
    names = {"arch_encoder": arch, "arch_decoder": "linear"}
    if arch.startswith(("hf:", "eomt:")):
        names = {"arch": arch}
    options = Options(
        MODEL=ModelOptions(**names, weights_encoder=weights, weights_decoder=weights, **model),
        DATASET=DataOptions(num_class=CLASSES),
        DIR="none",
    )
    torch.manual_seed(0)
    return ModelBuilder.from_config(options).eval()


def train_adapters(module):
    """Give adapters values with which they change the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)


def images():
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


# Without upernet, whose backbone has no attention.
KINDS = (
    "segformer",
    "dpt",
    "beit",
    "maskformer",
    "mask2former",
    "oneformer",
    "eomt",
    "eomt_dinov3",
)


@pytest.mark.parametrize("arch", [VIT, "eomt:vit_tiny_patch16_224", *KINDS])
@torch.no_grad()
def test_merged_weights_score_as_the_adapters_do(arch, tmp_path):
    if arch in KINDS:
        pytest.importorskip("transformers")
        saved_hf(arch, tmp_path)
        module = build(f"hf:{tmp_path}", weights="")
    else:
        module = build(arch)
    module.double()  # where networks that classify masks do not enlarge rounding beyond measure
    x = images().double()
    plain, before = copy.deepcopy(module), module.logits(x)
    add_adapters(module, RANK, ALPHA)
    assert torch.equal(module.logits(x), before), "B is 0"
    train_adapters(module)
    adapted, merged = module.logits(x), inference_copy(module, "cpu").logits(x)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=rounding(adapted, 10_000))
    assert (adapted - before).abs().max() > 1e-3 * adapted.abs().max()
    for part, own in ((plain.encoder, module.encoder), (plain.decoder, module.decoder)):
        part.load_state_dict(merged_state(own))
    assert torch.equal(inference_copy(plain, "cpu").logits(x), merged)


@torch.no_grad()
def test_adapters_are_pefts():
    module = build()
    names = r".*attn\.(qkv|proj)"
    net = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    inner = "net.model."
    own = {k.removeprefix(inner): v for k, v in module.encoder.state_dict().items()}
    net.load_state_dict(own, strict=False)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
    theirs = peft.get_peft_model(net, config).eval()
    add_adapters(module, RANK, ALPHA)
    train_adapters(module)
    state = {k.removeprefix(inner): v for k, v in module.encoder.state_dict().items()}
    found = theirs.base_model.model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and all(k.startswith("norm.") for k in found.missing_keys)
    expected = net.forward_intermediates(images(), norm=False, intermediates_only=True)
    maps = module.features(images())
    assert torch.equal(maps[-1], expected[-1])

    merged, unloaded = merged_state(module.encoder), theirs.merge_and_unload().state_dict()
    assert merged.keys() == {inner + k for k in unloaded if not k.startswith("norm.")}
    assert all(
        torch.equal(value, unloaded[key.removeprefix(inner)]) for key, value in merged.items()
    )


def test_recomputed_blocks_have_the_same_state():
    module = build()
    add_adapters(module, RANK, ALPHA)
    train_adapters(module)
    expected = merged_state(module.encoder)
    checkpoint_activations(module.encoder)
    found = merged_state(module.encoder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_only_adapters_and_the_decoder_are_trained():
    module = build()
    decoder = sum(p.numel() for p in module.decoder.parameters())
    every = sum(p.numel() for p in module.parameters())
    add_adapters(module, RANK, ALPHA)
    own = 6 * RANK * (64 + 3 * 64 + 64 + 64)  # of 6 blocks: A and B of qkv, A and B of proj
    share = (own + decoder) / (own + every)
    line = f"trainable parameters: {own + decoder:,} of {own + every:,} ({share:.2%})"
    assert trainable(module) == line
    names = {name for name, p in module.encoder.named_parameters() if p.requires_grad}
    assert len(names) == 24 and all(re.search(r"attn\.(qkv|proj)\.lora_[AB]", x) for x in names)


def test_targets_are_those_of_peft():
    module = build()
    add_adapters(module, RANK, ALPHA, ("fc1", "blocks.2.attn.qkv"))
    found = [n for n, layer in module.named_modules() if hasattr(layer, "lora_A")]
    expected = [f"encoder.net.model.blocks.{i}.mlp.fc1" for i in range(6)]
    assert sorted(found) == sorted([*expected, "encoder.net.model.blocks.2.attn.qkv"])


def test_what_is_new_in_an_encoder_is_trained():
    module = build(vit_pyramid=True)
    add_adapters(module, RANK, ALPHA)
    pyramid = module.encoder.pyramid
    assert isinstance(pyramid, nn.Module) and all(p.requires_grad for p in pyramid.parameters())


def test_the_blocks_of_queries_are_adapted_and_heads_trained():
    module = build("eomt:vit_tiny_patch16_224").train()
    add_adapters(module, RANK, ALPHA)
    label = torch.arange(4).repeat_interleave(SIDE // 4)[:, None].expand(2, SIDE, SIDE)
    loss, _ = module({"img_data": images(), "seg_label": label})
    loss.backward()
    for name, p in module.named_parameters():
        of_transformer = re.match(r"encoder\.|decoder\.net\.(blocks|norm)\b", name)
        assert p.requires_grad == (not of_transformer or ".lora_" in name), name
        assert (p.grad is not None) == p.requires_grad, name


def test_a_state_without_adapters_is_read_beside_them():
    module, other = build(), build()
    for value in other.encoder.state_dict().values():
        value.add_(1)
    add_adapters(module, RANK, ALPHA)
    state = with_adapters(module.encoder, other.encoder.state_dict())
    module.encoder.load_state_dict(state)
    merged, expected = merged_state(module.encoder), other.encoder.state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], value) for key, value in expected.items())


class Reads(Encoder):
    """Attention that reads the weight of a layer without calling it."""

    channels, strides = (8,), (4,)

    def __init__(self):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 8, 4, 4), nn.ModuleDict({"qkv": nn.Linear(8, 8)})

    def feature_maps(self, x):
        weight = self.attn["qkv"].weight
        return [F.conv2d(self.stem(x), weight[:, :, None, None])]


def test_what_cannot_be_adapted_is_refused(monkeypatch):
    module = build()
    with pytest.raises(ValueError, match=r"names 'qvk', .* no such linear layer; did you mean 'qk"):
        add_adapters(module, RANK, ALPHA, ("qvk",))
    decoder = ModelBuilder.build_decoder("linear", channels=(8,), num_class=2)
    with pytest.raises(ValueError, match="reads the weights of qkv without calling"):
        add_adapters(SegmentationModule(Reads(), decoder, None), RANK, ALPHA)
    with pytest.raises(ValueError, match="ResNet has no linear layers of attention: take a vision"):
        add_adapters(build("resnet18", fc_dim=512), RANK, ALPHA)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank 4 needs peft: pip install 'mit_semseg\[lora"):
        add_adapters(module, RANK, ALPHA)
