"""Models of segmentation_models.pytorch, beside what that computes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from other_libraries import saved_smp
from torch import Tensor

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.lib.nn import SynchronizedBatchNorm2d, UserScatteredDataParallel
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.external import save_pretrained
from mit_semseg.models.external.smp import NAMES

smp = pytest.importorskip("segmentation_models_pytorch")
SIDE = 128


def build(arch: str, num_class: int = 5, **model: str) -> SegmentationModule:
    options = Options(
        MODEL=ModelOptions(arch=f"smp:{arch}", **model),
        DATASET=DataOptions(num_class=num_class),
        DIR="/nowhere",
    )
    return ModelBuilder.from_config(options).eval()


def images(count: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_all_architectures_are_named() -> None:
    assert set(NAMES) == set(smp.MODEL_ARCHITECTURES_MAPPING)


@pytest.mark.parametrize("arch", NAMES)
def test_logits_and_state_dict_are_theirs(arch: str, tmp_path: Path) -> None:
    options = {"encoder_name": "tu-test_vit"} if arch == "dpt" else {}
    theirs = saved_smp(arch, tmp_path / "source", **options)
    ours = build(str(tmp_path / "source"))
    x = images(side=ours.encoder.fixed_size[0] if ours.encoder.fixed_size else SIDE)
    with torch.no_grad():
        expected, found = theirs(x), ours.logits(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert any(isinstance(m, SynchronizedBatchNorm2d) for m in ours.modules())

    save_pretrained(ours.encoder, ours.decoder, tmp_path / "saved")
    back = smp.from_pretrained(str(tmp_path / "saved")).state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_an_architecture_by_name() -> None:
    module = build("Unet++:resnet18", weights_encoder="none", weights_decoder="none")
    assert type(module.decoder.net).__name__ == "UnetPlusPlus"
    assert module.logits(images(1)).shape == (1, 5, SIDE, SIDE)
    assert build("unet", weights_encoder="none", weights_decoder="none").encoder.net is not None


def test_other_classes_give_a_new_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_smp("fpn", tmp_path)
    assert build(str(tmp_path), num_class=3).logits(images(1)).shape[1] == 3
    assert "2 skipped, another number of classes" in caplog.text


def test_replicas_learn_the_loss_of_the_union(tmp_path: Path) -> None:
    saved_smp("unet", tmp_path, encoder_depth=3, decoder_channels=(16, 16, 8))
    module = build(str(tmp_path)).train()
    label = torch.randint(-1, 5, (3, 32, 32), generator=torch.Generator().manual_seed(2))
    whole = {"img_data": images(3, 32), "seg_label": label}
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    losses, _ = UserScatteredDataParallel(module, device_ids=["cpu"] * 2)(parts)
    loss, _ = module(whole)
    assert float(losses.mean().detach()) == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("unet2", "is neither a folder .* did you mean 'unet'"),
        ("unet:resnet19", "resnet19"),
    ],
)
def test_mistaken_names(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(arch, weights_encoder="none", weights_decoder="none")


def test_one_class_is_refused(tmp_path: Path) -> None:
    saved_smp("unet", tmp_path, classes=1)
    with pytest.raises(ValueError, match="has one class, told by a threshold"):
        build(str(tmp_path))


def test_images_of_other_sizes_are_refused(tmp_path: Path) -> None:
    module = build("unet", weights_encoder="none", weights_decoder="none")
    with pytest.raises(ValueError, match="set DATASET.padding_constant 32"):
        module.logits(images(1, 40))
