"""EoMT on transformers of timm, beside transformers' EoMT, and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.models import ModelBuilder, SegmentationModule

timm = pytest.importorskip("timm", reason="timm is not installed")
NAME = "vit_tiny_patch16_224"
CLASSES, SIDE = 5, 64


def build(name: str = NAME, folder: str = "none", **model: Any) -> SegmentationModule:
    options = Options(
        MODEL=ModelOptions(
            arch=f"eomt:{name}", weights_encoder="none", weights_decoder="none", **model
        ),
        DATASET=DataOptions(num_class=CLASSES),
        DIR=folder,
    )
    torch.manual_seed(0)
    return ModelBuilder.from_config(options)


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *(size or (SIDE, SIDE)), generator=torch.Generator().manual_seed(1))


def batch() -> dict[str, Tensor]:
    label = torch.arange(4).repeat_interleave(SIDE // 4)[:, None].expand(SIDE, SIDE) - 1
    return {"img_data": images(), "seg_label": torch.stack([label, label.T])}


@pytest.fixture(scope="module")
def module() -> SegmentationModule:
    return build().eval()


def their_names(state: dict[str, Tensor], depth: int, first: int) -> dict[str, Tensor]:
    """Tensors of both halves under the names of transformers' EoMT."""
    found: dict[str, Tensor] = {}
    blocks = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention.out_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }

    def block(number: int, inner: str, value: Tensor) -> None:
        part, _, leaf = inner.rpartition(".")
        if part == "attn.qkv":
            for which, chunk in zip("qkv", value.chunk(3)):
                found[f"layers.{number}.attention.{which}_proj.{leaf}"] = chunk
        else:
            found[f"layers.{number}.{blocks[part]}.{leaf}"] = value

    fixed = {
        "vit.cls_token": "embeddings.cls_token",
        "vit.pos_embed": "embeddings.position_embeddings.weight",
        "queries.weight": "query.weight",
    }
    heads = {
        "vit.patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "class_head": "class_predictor",
        "mask_head.0": "mask_head.fc1",
        "mask_head.2": "mask_head.fc2",
        "mask_head.4": "mask_head.fc3",
    }
    for key, value in state.items():
        part, _, leaf = key.rpartition(".")
        words = key.split(".")
        if key.startswith("vit.blocks."):
            block(int(words[2]), ".".join(words[3:]), value)
        elif key.startswith("blocks."):
            block(first + int(words[1]), ".".join(words[2:]), value)
        elif key in fixed:
            found[fixed[key]] = value[0, 1:] if key == "vit.pos_embed" else value
        elif part in heads:
            found[f"{heads[part]}.{leaf}"] = value
        elif key.startswith("upscale."):
            name = "layernorm2d" if words[2] == "norm" else words[2]
            found[f"upscale_block.block.{words[1]}.{name}.{leaf}"] = value
    assert depth == first + 3
    return found


@torch.no_grad()
def test_equals_transformers(module: SegmentationModule) -> None:
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
    vit: Any = module.encoder.net
    # Of the size of these images, since transformers' EoMT takes one size only.
    vit.set_input_size((SIDE, SIDE))
    vit.pos_embed[:, 0] = 0  # theirs has no position of the class token
    state = {f"vit.{k}": v for k, v in vit.state_dict().items()}
    state |= {k.removeprefix("net."): v for k, v in module.decoder.state_dict().items()}
    report = theirs.load_state_dict(their_names(state, 12, 9), strict=False)
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
def test_images_of_any_size(name: str) -> None:
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


def test_learns_an_image_with_annealed_masks() -> None:
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


def test_annealing_ends_block_by_block(tmp_path: Path) -> None:
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


def test_weights_of_timm_go_to_both_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model(NAME, num_classes=0)
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: Any) -> Any:
        net = create(name, **options)
        if pretrained:
            net.load_state_dict(source.state_dict())
        return net

    monkeypatch.setattr(timm, "create_model", offline)
    options = Options(
        MODEL=ModelOptions(arch=f"eomt:{NAME}"), DATASET=DataOptions(num_class=CLASSES), DIR="none"
    )
    module = ModelBuilder.from_config(options)
    state = source.state_dict()
    assert torch.equal(
        module.encoder.net.blocks[8].mlp.fc1.weight, state["blocks.8.mlp.fc1.weight"]
    )
    assert torch.equal(
        module.decoder.net.blocks[0].mlp.fc1.weight, state["blocks.9.mlp.fc1.weight"]
    )
    assert torch.equal(module.decoder.net.norm.weight, state["norm.weight"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tinny_patch16_224", "timm .* has no vit_tinny_patch16_224; did you mean"),
        ("resnet18", "is no plain vision transformer"),
        (" ", "names no vision transformer"),
    ],
)
def test_what_is_no_transformer_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name)
