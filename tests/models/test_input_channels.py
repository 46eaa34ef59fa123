"""Encoders and whole models for images of any number of channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from other_libraries import MASKS, NAMES, SEMANTIC, SIDE, saved_hf, saved_smp
from tolerances import rounding
from torch import Tensor, nn

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.models import ENCODERS, ModelBuilder, SegmentationModule
from mit_semseg.models.encoders.base import Encoder, widen_input
from mit_semseg.models.external import mmseg, save_pretrained
from mit_semseg.models.external.base import Architecture
from mit_semseg.weights.channels import describe_filters, mixed, mixture

BANDS = ("nir", "Red", "green", "blue", "swir")


def test_filters_of_named_bands() -> None:
    third = 1 / 3
    red, green, blue, mean = [1, 0, 0], [0, 1, 0], [0, 0, 1], [third] * 3
    assert torch.allclose(mixture(4), torch.tensor([red, green, blue, mean]))
    named = torch.tensor([mean, red, green, blue, mean]) * 3 / 5
    assert torch.allclose(mixture(5, BANDS), named)
    assert torch.equal(mixture(3, ("blue", "green", "red")), torch.eye(3).flip(0))
    assert torch.allclose(mixture(1, ("nir",)), torch.ones(1, 3))
    said = describe_filters(BANDS)
    assert "Red, green, blue: the pretrained ones; nir, swir: their mean; all times 0.6" in said
    assert "repeated, times 0.75" in describe_filters(("1", "2", "3", "8"))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_filters_of_numbered_bands_are_timms(count: int) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate", reason="timm is not installed")
    weight = torch.randn(8, 3, 5, 5)
    expected = manipulate.adapt_input_conv(count, weight.clone())
    found = mixed(weight, count, [str(i + 1) for i in range(count)])
    assert float((found - expected).abs().max()) <= rounding(expected, 4)


# Several convolutions of ICNet read the image.
@pytest.mark.parametrize(
    "arch", ["resnet18dilated", "icnet_resnet50", "mscan_t", "timm:convnext_atto"]
)
def test_a_network_sees_colours_as_before_times_the_scale(arch: str, tmp_path: Path) -> None:
    if arch.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    three = ModelBuilder.build_encoder(arch, weights="none")
    state = three.net.state_dict() if arch.startswith("timm:") else three.state_dict()
    torch.save(state, tmp_path / "x.pth")
    options: dict[str, Any] = {"weights": str(tmp_path / "x.pth"), "in_channels": 4}
    bands = ("green", "nir", "blue", "red")
    four = ModelBuilder.build_encoder(arch, bands=bands, **options)
    x = torch.randn(1, 3, 64, 64)
    zero = torch.zeros(1, 64, 64)
    seen = torch.stack([x[:, 1], zero, x[:, 2], x[:, 0]], dim=1)
    with torch.no_grad():
        expected, found = three.eval()(0.75 * x, True), four.eval()(seen, True)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= rounding(other, 100)


def test_an_encoder_without_such_a_convolution_is_refused() -> None:
    encoder = Encoder()
    encoder.conv = nn.Conv2d(12, 4, 1)
    with pytest.raises(ValueError, match="in_channels is 5, and Encoder has no convolution"):
        widen_input(encoder, 5)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_kind_of_encoder_takes_other_bands(count: int) -> None:
    kinds = {
        getattr(ENCODERS.get(name), "kind", ENCODERS.get(name)): name for name in ENCODERS.names()
    }
    for name in kinds.values():
        with torch.device("meta"):
            encoder = ENCODERS.get(name)()
            widen_input(encoder, count, [str(i) for i in range(count)])
            maps = encoder.eval()(torch.empty(1, count, 64, 64), return_feature_maps=True)
        assert maps[-1].shape[:2] == (1, encoder.channels[-1])


def build(arch: str, num_class: int = len(NAMES), **model: Any) -> SegmentationModule:
    data = DataOptions(num_class=num_class, bands=BANDS, mean=(0.0,) * 5, std=(1.0,) * 5)
    options = Options(
        MODEL=ModelOptions(arch=arch, in_channels=5, **model), DATASET=data, DIR="/nowhere"
    )
    return ModelBuilder.from_config(options).eval()


def check(module: SegmentationModule, theirs: nn.Module, side: int) -> None:
    """First filters are mixed from theirs, all else is theirs, and images of five bands go in."""
    filters = [(p.shape, p) for p in theirs.parameters() if p.dim() == 4 and p.shape[1] == 3]
    (first,) = [p for p in module.encoder.parameters() if p.dim() == 4 and p.shape[1] == 5]
    _, expected = filters[0]
    assert torch.allclose(first, mixed(expected, 5, BANDS))
    x = torch.randn(1, 5, side, side)
    with torch.no_grad():
        assert module.logits(x).isfinite().all()
    with pytest.raises(ValueError, match="the images have 3 channels and the encoder expects 5"):
        module.logits(x[:, :3])


@pytest.mark.parametrize("kind", (*SEMANTIC, *MASKS))
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs = saved_hf(kind, tmp_path / "source")
    module = build(f"hf:{tmp_path / 'source'}")
    check(module, theirs, SIDE)
    save_pretrained(module.encoder, module.decoder, tmp_path / "saved")
    back = build(f"hf:{tmp_path / 'saved'}")
    states = back.state_dict()
    assert all(torch.equal(states[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("arch", ["unet", "fpn", "deeplabv3plus", "segformer"])
def test_models_of_smp(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    theirs = saved_smp(arch, tmp_path / "source")
    check(build(f"smp:{tmp_path / 'source'}", theirs_classes(theirs)), theirs, 128)


def theirs_classes(model: nn.Module) -> int:
    head = [m for m in model.segmentation_head.modules() if isinstance(m, nn.Conv2d)]
    return int(head[0].out_channels)


def test_eomt() -> None:
    pytest.importorskip("timm")
    none = {"weights_encoder": "none", "weights_decoder": "none"}
    module = build("eomt:vit_tiny_patch16_224", **none)
    x: Tensor = torch.randn(1, 5, 64, 64)
    with torch.no_grad():
        assert module.logits(x).shape[:2] == (1, len(NAMES))


def test_models_of_mmsegmentation_are_refused() -> None:
    with pytest.raises(ValueError, match="mmseg:x takes images of three channels only"):
        mmseg.with_channels(Architecture("mmseg:x"), 5)
