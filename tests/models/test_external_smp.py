"""Models of segmentation_models.pytorch: equality with what it computes."""

import pytest
import torch
from other_libraries import saved_smp
from torch import nn

from mit_semseg.config import DataOptions, ModelOptions, Options
from mit_semseg.lib.nn import SynchronizedBatchNorm2d, UserScatteredDataParallel
from mit_semseg.models import ModelBuilder
from mit_semseg.models.external import save_pretrained
from mit_semseg.models.external.smp import NAMES
from mit_semseg.models.layers import BatchNormAct2d

smp = pytest.importorskip("segmentation_models_pytorch")
SIDE = 128


def build(arch, num_class=5, weights=""):
    model = ModelOptions(arch=f"smp:{arch}", weights_encoder=weights, weights_decoder=weights)
    options = Options(MODEL=model, DATASET=DataOptions(num_class=num_class), DIR="/nowhere")
    return ModelBuilder.from_config(options).eval()


def images(count=2, side=SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_all_architectures_are_named():
    assert set(NAMES) == set(smp.MODEL_ARCHITECTURES_MAPPING)


# Narrow decoders, where the library's own are slow.
OPTIONS = {
    "dpt": {
        "encoder_name": "tu-test_vit",
        "decoder_intermediate_channels": (16, 16, 16, 16),
        "decoder_fusion_channels": 16,
    },
    "upernet": {"decoder_channels": 32},
    **dict.fromkeys(("manet", "unetplusplus"), {"decoder_channels": (64, 32, 16, 16, 16)}),
}


@pytest.mark.parametrize("arch", NAMES)
def test_logits_and_state_dict_are_theirs(arch, tmp_path):
    theirs = saved_smp(arch, tmp_path / "source", **OPTIONS.get(arch, {}))
    ours = build(str(tmp_path / "source"))
    x = images(side=ours.encoder.fixed_size[0] if ours.encoder.fixed_size else SIDE)
    with torch.no_grad():
        expected, found = theirs(x), ours.logits(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.std()))

    save_pretrained(ours.encoder, ours.decoder, tmp_path / "saved")
    back = smp.from_pretrained(str(tmp_path / "saved")).state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_an_architecture_by_name():
    module = build("Unet++:resnet18", weights="none")
    assert type(module.decoder.net).__name__ == "UnetPlusPlus"
    assert module.logits(images(1)).shape == (1, 5, SIDE, SIDE)
    with pytest.raises(ValueError, match="set DATASET.padding_constant 32"):
        module.logits(images(1, 40))


def test_other_classes_give_a_new_head(tmp_path, caplog):
    saved_smp("fpn", tmp_path)
    assert build(str(tmp_path), num_class=3).logits(images(1)).shape[1] == 3
    assert "2 skipped, another number of classes" in caplog.text


def test_replicas_normalise_as_one(tmp_path):
    """BatchNorms with an activation, as in encoders of timm, are synchronised as well."""
    name = "tu-test_efficientnet"
    saved_smp("unet", tmp_path, encoder_name=name, encoder_depth=3, decoder_channels=(16, 16, 8))
    module = build(str(tmp_path)).train()
    kinds = {type(m) for m in module.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kinds == {SynchronizedBatchNorm2d, BatchNormAct2d}
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
def test_wrong_names_are_refused(arch, message):
    with pytest.raises(ValueError, match=message):
        build(arch, weights="none")


def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    saved_smp("unet", tmp_path, classes=1)
    with pytest.raises(ValueError, match="has one class, for a threshold"):
        build(str(tmp_path))
    saved_smp("unet", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 64)
    with pytest.raises(
        OSError, match=f"'smp:{tmp_path}' cannot be read .SafetensorError"
    ) as caught:
        build(str(tmp_path))
    assert "\n" not in str(caught.value)
