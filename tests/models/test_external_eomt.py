"""EoMT on vision transformers of timm: equality with transformers' EoMT, and training."""

import re

import pytest
import torch

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.models import ModelBuilder

timm = pytest.importorskip("timm", reason="timm is not installed")
NAME = "vit_tiny_patch16_224"
CLASSES, SIDE = 5, 64


def build(name=NAME, weights="none"):
    model = ModelOptions(arch=f"eomt:{name}", weights_encoder=weights, weights_decoder=weights)
    options = Options(MODEL=model, DATASET=DataOptions(num_class=CLASSES), DIR="none")
    torch.manual_seed(0)
    return ModelBuilder.from_config(options)


def images(*size):
    return torch.randn(2, 3, *(size or (SIDE, SIDE)), generator=torch.Generator().manual_seed(1))


def batch():
    label = torch.arange(4).repeat_interleave(SIDE // 4)[:, None].expand(SIDE, SIDE) - 1
    return {"img_data": images(), "seg_label": torch.stack([label, label.T])}


# Names in transformers' EoMT of the layers of both parts.
THEIRS = {
    r"^vit\.blocks\.(\d+)": r"layers.\1",
    r"^blocks\.(\d+)": lambda match: f"layers.{9 + int(match[1])}",
    r"^vit\.patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^vit\.cls_token": "embeddings.cls_token",
    r"^vit\.pos_embed": "embeddings.position_embeddings.weight",
    r"^queries": "query",
    r"^norm": "layernorm",
    r"^class_head": "class_predictor",
    r"^mask_head\.(\d)": lambda match: f"mask_head.fc{int(match[1]) // 2 + 1}",
    r"^upscale\.(\d)": r"upscale_block.block.\1",
    r"(block\.\d)\.norm": r"\1.layernorm2d",
    r"attn\.proj": "attention.out_proj",
}


def renamed(state):
    """The tensors of both parts under the names of transformers' EoMT."""
    found = {}
    for name, value in state.items():
        for pattern, replacement in THEIRS.items():
            name = re.sub(pattern, replacement, name)
        if "attn.qkv" in name:
            for kind, third in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.{kind}_proj")] = third
        elif name != "progress":
            found[name] = value[0, 1:] if "position_embeddings" in name else value
    return found


@torch.no_grad()
def test_equals_transformers():
    module = build().eval()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.EomtConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=SIDE,
        patch_size=16,
        num_blocks=3,
        num_queries=100,
        num_upscale_blocks=2,
        num_register_tokens=0,
        num_labels=CLASSES,
        layerscale_value=1.0,
        use_swiglu_ffn=False,
        attention_dropout=0.0,
        hidden_dropout_prob=0.0,
    )
    theirs = transformers.EomtForUniversalSegmentation(config).eval()
    vit = module.encoder.net
    # Of the size of these images, since transformers' EoMT takes one size only.
    vit.set_input_size((SIDE, SIDE))
    vit.pos_embed[:, 0] = 0  # theirs has no position of the class token
    state = {f"vit.{k}": v for k, v in vit.state_dict().items()}
    state |= {k.removeprefix("net."): v for k, v in module.decoder.state_dict().items()}
    report = theirs.load_state_dict(renamed(state), strict=False)
    left = {k.rpartition(".")[2] for k in report.missing_keys}
    assert report.unexpected_keys == [] and left <= {
        *("register_tokens", "position_ids", "lambda1", "empty_weight", "attn_mask_probs")
    }
    x = images()
    features = module.features(x)
    for share, masked in ((0.0, 1.0), (1.0, 0.0)):
        module.decoder.set_progress(share)
        theirs.attn_mask_probs.fill_(masked)
        expected = theirs(x)
        net = module.decoder.net
        grid = (SIDE // 16, SIDE // 16)
        layers = net(features[1], None, grid, net.probabilities())
        assert len(layers) == (4 if masked else 1)
        classes, scores = layers[-1]
        torch.testing.assert_close(classes, expected.class_queries_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores, expected.masks_queries_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_images_of_any_size(name):
    module = build(name).eval()
    patch = module.encoder.strides[0]
    for size in ((4 * patch, 6 * patch), (7 * patch, 3 * patch)):
        with torch.no_grad():
            scores = module.logits(images(*size))
        upscaled = 2 if patch == 14 else 4
        assert scores.shape == (2, CLASSES, *(upscaled * side // patch for side in size))
        assert scores.isfinite().all() and (scores.exp().sum(1) > 0).all()
    with pytest.raises(ValueError, match=f"multiples of {patch}.*DATASET.padding_constant {patch}"):
        module.logits(images(4 * patch, 4 * patch + 1))


def test_learns_an_image_with_annealed_masks():
    module = build("test_vit").train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for step in range(12):
        module.decoder.set_progress(step / 12)
        loss, _ = module(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in module.decoder.parameters())


def test_annealing_ends_block_by_block():
    module = build()
    net = module.decoder.net
    found = []
    for share in (0.0, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0):
        module.decoder.set_progress(share)
        found.append(net.probabilities())
    for chances in zip(*found):
        assert chances[0] == 1 and chances[-1] == 0 and list(chances) == sorted(chances)[::-1]
    assert found[2] == pytest.approx([0.5**0.9, 1, 1])  # in the middle of its part, 1/5 to 2/5
    module.decoder.set_progress(0.5)
    other = build()
    other.decoder.load_state_dict(module.decoder.state_dict())
    assert other.decoder.net.probabilities() == net.probabilities() == found[3]


def test_weights_of_timm_initialise_both_parts(monkeypatch):
    source = timm.create_model(NAME, num_classes=0)
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        net = create(name, **options)
        if pretrained:
            net.load_state_dict(source.state_dict())
        return net

    monkeypatch.setattr(timm, "create_model", offline)
    module = build(weights="")
    first, last = module.encoder.net.blocks[8], module.decoder.net.blocks[0]
    assert torch.equal(first.mlp.fc1.weight, source.blocks[8].mlp.fc1.weight)
    assert torch.equal(last.mlp.fc1.weight, source.blocks[9].mlp.fc1.weight)
    assert torch.equal(module.decoder.net.norm.weight, source.norm.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tinny_patch16_224", "eomt:vit_tinny.*: timm .* has no such model; did you mean"),
        ("vit_tiny_patch16_224.nowhere", "eomt:vit_tiny.*no weights 'nowhere' of it; it has vit_"),
        ("resnet18", "is no plain vision transformer"),
        (" ", "names no vision transformer"),
    ],
)
def test_other_networks_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build(name)
