"""Every recipe loads, agrees with the published facts, and builds a model that fits together."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from mit_semseg import weights
from mit_semseg.config import DataOptions, load_config
from mit_semseg.config.node import Config
from mit_semseg.dataset.base import FORMATS, DataFormat
from mit_semseg.download import DownloadError
from mit_semseg.losses import build_loss
from mit_semseg.models import ModelBuilder
from mit_semseg.models.builder import check_pair
from mit_semseg.models.decoders import DECODERS
from mit_semseg.models.encoders import ENCODERS
from mit_semseg.models.encoders.base import Encoder
from mit_semseg.models.papers import PAPER_MODELS, PaperModel
from mit_semseg.weights import PUBLISHED, imagenet_weights, published_checkpoint

CONFIG = Path(__file__).resolve().parent.parent / "config"
ALL = sorted(CONFIG.glob("*.yaml"))
# Later models train on ADE20K as their papers say, and not by the published toolkit's schedule.
OWN_SCHEDULE = ("encnet",)
ADE20K = [
    path for path in ALL if path.name.startswith("ade20k-") and not path.stem.endswith(OWN_SCHEDULE)
]

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
# Decoders without a recipe of their own: on CamVid, on another data set, or on neither.
NOT_ON_CAMVID = {
    "ppm": "is ppm_deepsup without its auxiliary head",
    "fcn_head": "is fcn_head_deepsup without its auxiliary head",
    "pidnet_l": "is pidnet_s, larger",
}
ONLY_ON_CAMVID = {
    "fcdensenet56": "its paper's other data set, Gatech, is no format here",
    "fcdensenet67": "likewise",
    "fcdensenet103": "likewise",
    "fcn_head": "is fcn_head_deepsup without its auxiliary head",
    "pidnet_l": "is pidnet_s, larger",
    "unet_bilinear": "is unet with other upsampling",
    "upernet_lite": "is upernet with a narrower pyramid",
}
DILATED = ("mobilenetv2dilated", "resnet18dilated", "resnet50dilated", "resnet101dilated")
EXPECTED = {
    *(f"{e}-{d}" for e in DILATED for d in ("c1", "c1_deepsup", "ppm", "ppm_deepsup")),
    *(f"{e}-upernet" for e in ENCODER_FACTS if e not in (*DILATED[1:], "hrnetv2")),
    "hrnetv2-c1",
}


# Encoders with a published backbone inside, and its name there.
INNER = {"bisenet_resnet18": "context", "icnet_resnet50": "backbone"}
# Files whose names say something else than what is in them, as published or for the quick start.
NAMED_OTHERWISE = ("ade20k-hrnetv2", "demo")
NAMED = [path for path in ALL if path.stem not in NAMED_OTHERWISE]


def name(path: Path) -> str:
    return path.stem


@lru_cache
def recipe(path: Path) -> Config:
    """A recipe, read once; nobody changes it."""
    return load_config(path)


def data_set(cfg: Config) -> str:
    """The data set of a recipe; ADE20K's published ones read lists."""
    return "ade20k" if cfg.DATASET.format == "odgt" else cfg.DATASET.format


@lru_cache
def encoded(arch: str, in_channels: int, side: int) -> tuple[Encoder, tuple[torch.Tensor, ...]]:
    """An encoder and what it makes of a square image, shapes only: many recipes have the same."""
    with torch.device("meta"):
        encoder = ModelBuilder.build_encoder(arch, weights="none", in_channels=in_channels).eval()
        features = encoder(torch.empty(1, in_channels, side, side), return_feature_maps=True)
    return encoder, tuple(features)


def decoders_of(paths: list[Path]) -> set[str]:
    """First names of the decoders in some recipes."""
    first = {DECODERS.get(key): key for key in DECODERS.first_names()}
    return {first[DECODERS.get(recipe(path).MODEL.arch_decoder)] for path in paths}


def test_every_combination_has_its_recipe() -> None:
    folders = {Path(recipe(path).DIR).name for path in ADE20K}
    assert folders == {f"ade20k-{pair}" for pair in EXPECTED}
    # The published file of HRNetV2 leaves out the decoder.
    stems = {path.stem for path in ADE20K} - {"ade20k-hrnetv2"} | {"ade20k-hrnetv2-c1"}
    assert stems == folders


@pytest.mark.parametrize("path", NAMED, ids=name)
def test_file_and_folder_bear_the_name_of_what_is_in_them(path: Path) -> None:
    cfg = recipe(path)
    encoder, decoder = cfg.MODEL.arch_encoder, cfg.MODEL.arch_decoder
    pair = encoder if encoder == decoder else f"{encoder}-{decoder}"
    assert path.stem == f"{data_set(cfg)}-{pair}{'-depth' if cfg.DATASET.depth else ''}"
    assert f"ckpt/{path.stem}" == cfg.DIR


def test_every_decoder_has_its_recipes() -> None:
    camvid = [path for path in NAMED if path.stem.startswith("camvid-")]
    decoders = set(DECODERS.first_names())
    assert decoders - decoders_of(camvid) == set(NOT_ON_CAMVID)
    assert decoders - decoders_of([p for p in NAMED if p not in camvid]) == set(ONLY_ON_CAMVID)


# The data of each paper that are a format here.
DATA_OF = {
    **{f"FCN-{stride}s": {"vocaug"} for stride in (32, 16, 8)},
    "U-Net": {"sbu"},  # microscopy in the paper: this has two classes as well
    "U-Net, bilinear, half as wide": {"camvid"},  # of no paper
    "U-Net on a ResNet": {"vocaug"},
    "SegNet": {"sunrgbd"},
    "LinkNet": {"cityscapes"},
    **{f"FC-DenseNet{layers}": {"camvid"} for layers in (56, 67, 103)},
    "ENet": {"cityscapes"},
    "DRN-C-26": {"cityscapes"},
    "DeepLabv3": {"vocaug"},
    "DeepLabv3+": {"vocaug"},
    "PSPNet": {"ade20k"},
    "ICNet": {"cityscapes"},
    "DenseASPP": {"cityscapes"},
    "EncNet": {"ade20k"},
    "BiSeNet": {"cityscapes"},
    "DANet": {"cityscapes"},
    "OCNet, base": {"cityscapes"},
    "OCNet, pyramid": {"cityscapes"},
    "OCNet, ASP": {"cityscapes"},
    "DUNet": {"vocaug"},
    "UPerNet": {"ade20k"},
    "HRNetV2": {"cityscapes"},
    **{f"DDRNet-23{size}": {"cityscapes"} for size in ("", "-slim")},
    **{f"PIDNet-{size}": {"cityscapes"} for size in "SML"},
}


def body(name: str) -> str:
    """An encoder without where its weights are from, its dilation and its width; ResNet50 and
    ResNet101 are one. Or a decoder without its size."""
    plain = re.sub(r"^torchvision_|_?dilated(16)?$|_w\d+$|_(slim|[stbml])$", "", name)
    return "resnet" if plain in ("resnet50", "resnet101") else plain


def recipes_of(data: set[str]) -> set[tuple[str, str]]:
    """Body and decoder of the recipes on some data sets."""
    found = [recipe(path) for path in ALL]
    return {
        (body(cfg.MODEL.arch_encoder), body(cfg.MODEL.arch_decoder))
        for cfg in found
        if data_set(cfg) in data
    }


@pytest.mark.parametrize("model", PAPER_MODELS, ids=lambda model: "-".join(model))
def test_every_model_has_a_recipe_on_the_data_of_its_paper(model: PaperModel) -> None:
    assert (body(model.encoder), body(model.decoder)) in recipes_of(DATA_OF[model.name])


@pytest.mark.parametrize("name", sorted({model.name for model in PAPER_MODELS}))
def test_every_model_has_a_recipe_on_camvid(name: str) -> None:
    """Of a family of sizes one."""
    models = [model for model in PAPER_MODELS if model.name == name]
    pairs = {(body(model.encoder), body(model.decoder)) for model in models}
    assert pairs & recipes_of({"camvid"})


def test_every_data_set_has_its_recipe() -> None:
    public = {key for key in FORMATS.names() if FORMATS.get(key)().source is not None}
    assert public - {data_set(recipe(path)) for path in ALL} == {"voc2012"}  # vocaug has it


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_recipe_builds_and_fits(path: Path) -> None:
    cfg = recipe(path)
    encoder_name, decoder_name = cfg.MODEL.arch_encoder, cfg.MODEL.arch_decoder
    check_pair(encoder_name, decoder_name, cfg.MODEL.fc_dim)
    side = 4 * cfg.DATASET.padding_constant
    encoder, features = encoded(encoder_name, cfg.MODEL.in_channels, side)
    with torch.device("meta"):
        decoder = ModelBuilder.build_decoder(
            decoder_name,
            cfg.MODEL.fc_dim,
            cfg.DATASET.num_class,
            weights="none",
            channels=encoder.channels,
            strides=encoder.strides,
        ).eval()
        logits = decoder.logits(list(features))[0]
    assert features[-1].shape[1] == encoder.channels[-1] == cfg.MODEL.fc_dim
    assert logits.shape[:2] == (1, cfg.DATASET.num_class)
    # The loss resizes logits to labels; labels finer than the logits are a choice, odd sizes
    # are none: sides must divide by both.
    assert side % cfg.DATASET.segm_downsampling_rate == 0
    assert cfg.DATASET.padding_constant % min(encoder.strides) == 0


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_recipe_is_sound(path: Path) -> None:
    cfg = recipe(path)
    assert cfg.MODEL.arch_encoder in ENCODERS
    assert cfg.MODEL.arch_decoder in DECODERS
    assert cfg.DATASET.padding_constant % cfg.DATASET.segm_downsampling_rate == 0
    assert cfg.TRAIN.start_epoch == 0
    assert max(cfg.DATASET.imgSizes) <= cfg.DATASET.imgMaxSize

    assert cfg.DATASET.padding_constant % max(ENCODERS.get(cfg.MODEL.arch_encoder).strides) == 0
    # Sides of crops that are padded would be a little waste in every step.
    assert not any(side % cfg.DATASET.padding_constant for side in cfg.DATASET.crop_size)
    assert max(cfg.VAL.imgSizes or [0]) <= cfg.DATASET.imgMaxSize
    assert cfg.VAL.imgSizes == cfg.TEST.imgSizes
    build_loss(cfg.TRAIN.loss, cfg.DATASET.num_class)  # refuses unknown names
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", NAMED, ids=name)
def test_a_recipe_knows_its_data_set(path: Path) -> None:
    cfg = recipe(path)
    data: DataFormat = FORMATS.get(data_set(cfg))()
    options = DataOptions.read(cfg.DATASET)
    assert len(data.classes(options)) == cfg.DATASET.num_class
    if cfg.DATASET.format != "odgt":
        assert data.source is not None
        assert cfg.DATASET.root_dataset == f"./data/{data.source.folder}"
    if cfg.DATASET.depth:
        assert data.depth_scale is not None


@pytest.mark.parametrize("path", NAMED, ids=name)
def test_a_recipe_asks_for_weights_that_there_are(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> Path:
        raise DownloadError("no network")

    monkeypatch.setattr(weights.sources, "fetch", refuse)
    model = recipe(path).MODEL
    module = torch.nn.Module()  # nothing is loaded into it: the download comes first
    if model.arch_encoder in INNER:
        module.add_module(INNER[model.arch_encoder], torch.nn.Module())
    if model.weights_encoder != "none":
        with pytest.raises(DownloadError):  # an unknown name is a ValueError
            weights.load_encoder(module, model.arch_encoder, model.weights_encoder)
    if model.weights_decoder:
        with pytest.raises(DownloadError):
            weights.load_decoder(module, model.arch_decoder, model.weights_decoder)


@pytest.mark.parametrize("path", ADE20K, ids=name)
def test_ade20k_recipes_agree_with_the_published_facts(path: Path) -> None:
    cfg = recipe(path)
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
    recipes = [recipe(path) for path in ADE20K]
    (cfg,) = [c for c in recipes if Path(c.DIR).name == model]
    for urls, part in zip(published_checkpoint(model), ("encoder", "decoder"), strict=True):
        assert urls[-1].endswith(f"/{model}/{part}_{cfg.VAL.checkpoint}")


@pytest.mark.parametrize("encoder", sorted(ENCODER_FACTS))
def test_every_encoder_has_published_imagenet_weights(encoder: str) -> None:
    assert imagenet_weights(encoder).urls[-1].startswith("http://sceneparsing.csail.mit.edu/")
