"""Every recipe loads, agrees with the published facts, and builds a model that fits together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mit_semseg.config import load_config
from mit_semseg.models import ModelBuilder
from mit_semseg.models.builder import check_pair
from mit_semseg.models.decoders import DECODERS
from mit_semseg.models.encoders import ENCODERS
from mit_semseg.weights import PUBLISHED, imagenet_weights, published_checkpoint

CONFIG = Path(__file__).resolve().parent.parent / "config"
ALL = sorted(CONFIG.glob("*.yaml"))
ADE20K = [path for path in ALL if path.name.startswith("ade20k-")]

# Encoder -> channels of its last map, sides a multiple of, images per device.
ENCODER_FACTS = {
    "mobilenetv2dilated": (320, 8, 3),
    "resnet18dilated": (512, 8, 2),
    "resnet50dilated": (2048, 8, 2),
    "resnet101dilated": (2048, 8, 2),
    "resnet18": (512, 32, 2),
    "resnet50": (2048, 32, 2),
    "resnet101": (2048, 32, 2),
    "resnext101": (2048, 32, 2),
    "hrnetv2": (720, 32, 2),
}
DILATED = ("mobilenetv2dilated", "resnet18dilated", "resnet50dilated", "resnet101dilated")
EXPECTED = {
    *(f"{e}-{d}" for e in DILATED for d in ("c1", "c1_deepsup", "ppm", "ppm_deepsup")),
    *(f"{e}-upernet" for e in ENCODER_FACTS if e not in (*DILATED[1:], "hrnetv2")),
    "hrnetv2-c1",
}


def name(path: Path) -> str:
    return path.stem


def test_every_combination_has_its_recipe() -> None:
    folders = {Path(load_config(path).DIR).name for path in ADE20K}
    assert folders == {f"ade20k-{pair}" for pair in EXPECTED}
    # File and folder bear one name, but for HRNetV2, whose published file leaves out the decoder.
    stems = {path.stem for path in ADE20K} - {"ade20k-hrnetv2"} | {"ade20k-hrnetv2-c1"}
    assert stems == folders


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_recipe_builds_and_fits(path: Path) -> None:
    cfg = load_config(path)
    encoder_name, decoder_name = cfg.MODEL.arch_encoder, cfg.MODEL.arch_decoder
    check_pair(encoder_name, decoder_name, cfg.MODEL.fc_dim)
    with torch.device("meta"):
        encoder = ModelBuilder.build_encoder(encoder_name, cfg.MODEL.fc_dim, weights="none")
        decoder = ModelBuilder.build_decoder(
            decoder_name,
            cfg.MODEL.fc_dim,
            cfg.DATASET.num_class,
            weights="none",
            channels=encoder.channels,
            strides=encoder.strides,
        ).eval()
        side = 4 * cfg.DATASET.padding_constant
        features = encoder.eval()(torch.empty(1, 3, side, side), return_feature_maps=True)
        logits = decoder.logits(features)[0]
    assert features[-1].shape[1] == encoder.channels[-1] == cfg.MODEL.fc_dim
    assert logits.shape[:2] == (1, cfg.DATASET.num_class)
    # The loss resizes logits to labels; labels finer than the logits are a choice, odd sizes
    # are none: sides must divide by both.
    assert side % cfg.DATASET.segm_downsampling_rate == 0
    assert cfg.DATASET.padding_constant % min(encoder.strides) == 0


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_recipe_is_sound(path: Path) -> None:
    cfg = load_config(path)
    assert cfg.MODEL.arch_encoder in ENCODERS
    assert cfg.MODEL.arch_decoder in DECODERS
    assert cfg.DATASET.padding_constant % cfg.DATASET.segm_downsampling_rate == 0
    assert cfg.TRAIN.start_epoch == 0
    assert max(cfg.DATASET.imgSizes) <= cfg.DATASET.imgMaxSize


@pytest.mark.parametrize("path", ADE20K, ids=name)
def test_ade20k_recipes_agree_with_the_published_facts(path: Path) -> None:
    cfg = load_config(path)
    fc_dim, padding, batch = ENCODER_FACTS[cfg.MODEL.arch_encoder]
    fine = cfg.MODEL.arch_decoder == "upernet" or cfg.MODEL.arch_encoder == "hrnetv2"
    assert cfg.MODEL.fc_dim == fc_dim
    assert cfg.MODEL.weights_encoder == ""
    assert list(cfg.DATASET.imgSizes) == [300, 375, 450, 525, 600]
    assert cfg.DATASET.imgMaxSize == 1000
    assert cfg.DATASET.num_class == 150
    assert cfg.DATASET.padding_constant == padding
    assert cfg.DATASET.segm_downsampling_rate == (4 if fine else 8)
    assert cfg.DATASET.random_flip is True
    assert cfg.TRAIN.batch_size_per_gpu == batch
    assert cfg.TRAIN.epoch_iters == 5000
    assert cfg.TRAIN.optim == "SGD"
    assert (cfg.TRAIN.lr_encoder, cfg.TRAIN.lr_decoder, cfg.TRAIN.lr_pow) == (0.02, 0.02, 0.9)
    assert (cfg.TRAIN.beta1, cfg.TRAIN.weight_decay) == (0.9, 1e-4)
    assert cfg.TRAIN.deep_sup_scale == 0.4
    assert cfg.TRAIN.seed == 304
    assert cfg.VAL.checkpoint == cfg.TEST.checkpoint == f"epoch_{cfg.TRAIN.num_epoch}.pth"


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_a_published_checkpoint_has_a_recipe_that_asks_for_it(model: str) -> None:
    recipes = [load_config(path) for path in ADE20K]
    (cfg,) = [c for c in recipes if Path(c.DIR).name == model]
    for urls, part in zip(published_checkpoint(model), ("encoder", "decoder"), strict=True):
        assert urls[-1].endswith(f"/{model}/{part}_{cfg.VAL.checkpoint}")


@pytest.mark.parametrize("encoder", sorted(ENCODER_FACTS))
def test_every_encoder_has_published_imagenet_weights(encoder: str) -> None:
    assert imagenet_weights(encoder).urls[-1].startswith("http://sceneparsing.csail.mit.edu/")
