"""Every recipe loads, agrees with the published facts, and builds a model that fits together."""

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from mit_semseg import weights
from mit_semseg.config import DataOptions, load_config
from mit_semseg.dataset.base import FORMATS
from mit_semseg.download import DownloadError
from mit_semseg.losses import build_loss
from mit_semseg.models import ModelBuilder
from mit_semseg.models.builder import check_pair
from mit_semseg.models.decoders import DECODERS
from mit_semseg.models.encoders import ENCODERS
from mit_semseg.models.papers import PAPER_MODELS
from mit_semseg.weights import PUBLISHED, imagenet_weights, published_checkpoint

CONFIG = Path(__file__).resolve().parent.parent / "config"
EOMT = sorted(CONFIG.glob("*-eomt-*.yaml"))  # whole models, without encoder and decoder by name
ALL = sorted(set(CONFIG.glob("*.yaml")) - set(EOMT))
# Later models train on ADE20K as their papers say, and not by the published toolkit's schedule.
OWN_SCHEDULE = ("encnet", "hamburger")
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
# Decoders that differ in size from one with recipes, or in its auxiliary head: no recipe at all.
VARIANTS = {
    *("fcn_head", "pidnet_l", "ppliteseg_b", "segformer_wide", "hamburger_b", "hamburger_l")
}
# No recipe on CamVid, or on CamVid only.
NOT_ON_CAMVID = {"ppm"} | VARIANTS  # there is ppm_deepsup
ONLY_ON_CAMVID = VARIANTS | {
    *("fcdensenet56", "fcdensenet67", "fcdensenet103"),  # Gatech, of its paper, is no format here
    *("unet_bilinear", "upernet_lite"),  # variants of unet and upernet
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
NAMED_OTHERWISE = ("ade20k-hrnetv2", "demo", "multispectral-resnet50-upernet")
NAMED = [path for path in ALL if path.stem not in NAMED_OTHERWISE]


def name(path):
    return path.stem


@lru_cache
def recipe(path):
    """A recipe, read once; nobody changes it."""
    return load_config(path)


def data_set(cfg):
    """The data set of a recipe; ADE20K's published ones read lists."""
    return "ade20k" if cfg.DATASET.format == "odgt" else cfg.DATASET.format


@lru_cache
def encoded(arch, in_channels, of_timm, side):
    """An encoder and the maps of a square image, shapes only: mostly what it declares."""
    kind = ENCODERS.get(arch) if arch in ENCODERS else None
    with torch.device("meta"):
        if kind and in_channels == 3 and not (any(of_timm) or kind.supported_decoders):
            sides = (side // stride for stride in kind.strides)
            return kind, tuple(torch.empty(1, c, n, n) for c, n in zip(kind.channels, sides))
        encoder = ModelBuilder.build_encoder(
            arch,
            weights="none",
            in_channels=in_channels,
            output_stride=of_timm[0],
            out_indices=of_timm[1],
        ).eval()
        features = encoder(torch.empty(1, in_channels, side, side), return_feature_maps=True)
    return encoder, tuple(features)


def decoders_of(paths):
    """First names of the decoders in some recipes."""
    first = {DECODERS.get(key): key for key in DECODERS.first_names()}
    return {first[DECODERS.get(recipe(path).MODEL.arch_decoder)] for path in paths}


def test_every_combination_has_its_recipe():
    folders = {Path(recipe(path).DIR).name for path in ADE20K}
    assert folders == {f"ade20k-{pair}" for pair in EXPECTED}
    # The published file of HRNetV2 leaves out the decoder.
    stems = {path.stem for path in ADE20K} - {"ade20k-hrnetv2"} | {"ade20k-hrnetv2-c1"}
    assert stems == folders


@pytest.mark.parametrize("path", EOMT, ids=name)
def test_recipes_of_eomt(path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    cfg = load_config(path)
    vit = cfg.MODEL.arch.partition(":")[2]
    assert timm.is_model(vit) and f"ckpt/{path.stem}" == cfg.DIR
    with torch.device("meta"):
        patch = timm.create_model(vit).patch_embed.patch_size[0]
    for side in (cfg.DATASET.padding_constant, *cfg.DATASET.crop_size, *cfg.VAL.window):
        assert side % patch == 0


def test_every_decoder_has_its_recipes():
    camvid = [path for path in NAMED if path.stem.startswith("camvid-")]
    decoders = set(DECODERS.first_names())
    assert decoders - decoders_of(camvid) == NOT_ON_CAMVID
    assert decoders - decoders_of([p for p in NAMED if p not in camvid]) == ONLY_ON_CAMVID


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
    "LR-ASPP": {"cityscapes"},
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
    "BiSeNetV2": {"cityscapes"},
    **{f"STDC{size}-Seg": {"cityscapes"} for size in (1, 2)},
    **{f"PP-LiteSeg-{size}": {"cityscapes"} for size in "TB"},
    **{f"SegNeXt-{size}": {"ade20k"} for size in "TSBL"},
}


def body(name):
    """An encoder without where its weights are from, its dilation and its width; ResNet50 and
    ResNet101 are one. Or a decoder without its size."""
    plain = re.sub(r"^torchvision_|_?dilated(16)?$|_w\d+$|_(slim|[stbml])$|(?<=stdc)\d$", "", name)
    return "resnet" if plain in ("resnet50", "resnet101") else plain


def recipes_of(data):
    """Body and decoder of the recipes on some data sets."""
    found = [recipe(path) for path in ALL]
    return {
        (body(cfg.MODEL.arch_encoder), body(cfg.MODEL.arch_decoder))
        for cfg in found
        if data_set(cfg) in data
    }


@pytest.mark.parametrize("model", PAPER_MODELS, ids=lambda model: "-".join(model))
def test_every_model_has_a_recipe_on_the_data_of_its_paper(model):
    assert (body(model.encoder), body(model.decoder)) in recipes_of(DATA_OF[model.name])


@pytest.mark.parametrize("name", sorted({model.name for model in PAPER_MODELS}))
def test_every_model_has_a_recipe_on_camvid(name):
    """Of a family of sizes one."""
    models = [model for model in PAPER_MODELS if model.name == name]
    pairs = {(body(model.encoder), body(model.decoder)) for model in models}
    assert pairs & recipes_of({"camvid"})


def test_every_data_set_has_its_recipe():
    public = {key for key in FORMATS.names() if FORMATS.get(key)().source is not None}
    assert public <= {data_set(recipe(path)) for path in ALL}


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_recipe_builds_and_fits(path):
    cfg = recipe(path)
    encoder_name, decoder_name = cfg.MODEL.arch_encoder, cfg.MODEL.arch_decoder
    of_timm = (cfg.MODEL.output_stride, tuple(cfg.MODEL.out_indices))
    options = dict(zip(("output_stride", "out_indices"), of_timm, strict=True))
    check_pair(encoder_name, decoder_name, cfg.MODEL.fc_dim, **options)
    side = 4 * cfg.DATASET.padding_constant
    encoder, features = encoded(encoder_name, cfg.MODEL.in_channels, of_timm, side)
    assert cfg.DATASET.padding_constant % max(encoder.strides) == 0
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
def test_a_recipe_is_sound(path):
    cfg = recipe(path)
    data, model = cfg.DATASET, cfg.MODEL
    assert data.padding_constant % data.segm_downsampling_rate == 0
    # Sides of crops that are padded would be a little waste in every step.
    assert not any(side % data.padding_constant for side in data.crop_size)
    assert max(*data.imgSizes, *cfg.VAL.imgSizes) <= data.imgMaxSize
    assert cfg.VAL.imgSizes == cfg.TEST.imgSizes
    assert cfg.TRAIN.start_epoch == 0
    build_loss(cfg.TRAIN.loss, data.num_class)  # refuses unknown names
    assert path.read_text().startswith("# ")
    if path not in NAMED:
        return
    pair = "-".join(dict.fromkeys((model.arch_encoder, model.arch_decoder))).replace(":", "-")
    more = f"{'-depth' if data.depth else ''}{'-lora' if cfg.TRAIN.lora_rank else ''}"
    assert path.stem == f"{data_set(cfg)}-{pair}{more}"
    assert f"ckpt/{path.stem}" == cfg.DIR
    kind = FORMATS.get(data_set(cfg))()
    assert len(kind.classes(DataOptions.read(data))) == data.num_class
    if data.format != "odgt":
        assert data.root_dataset == f"./data/{kind.source.folder}"
    assert not data.depth or kind.depth_scale is not None


@pytest.mark.parametrize("path", NAMED, ids=name)
def test_a_recipe_asks_for_weights_that_there_are(path, monkeypatch):
    def refuse(*args, **options):
        raise DownloadError("no network")

    monkeypatch.setattr(weights.sources, "fetch", refuse)
    model = recipe(path).MODEL
    if model.arch_encoder.startswith("timm:"):
        timm = pytest.importorskip("timm")
        assert timm.models.get_pretrained_cfg(model.arch_encoder.removeprefix("timm:")).has_weights
        return
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
def test_ade20k_recipes_agree_with_the_published_facts(path):
    cfg = recipe(path)
    model, data, train = cfg.MODEL, cfg.DATASET, cfg.TRAIN
    fc_dim, padding, batch = ENCODER_FACTS[model.arch_encoder]
    fine = model.arch_decoder == "upernet" or model.arch_encoder == "hrnetv2"
    assert (model.fc_dim, model.weights_encoder) == (fc_dim, "")
    assert list(data.imgSizes) == [300, 375, 450, 525, 600]
    assert (data.imgMaxSize, data.num_class, data.padding_constant) == (1000, 150, padding)
    assert data.segm_downsampling_rate == (4 if fine else 8) and data.random_flip is True
    assert (train.batch_size_per_gpu, train.epoch_iters, train.optim) == (batch, 5000, "SGD")
    assert (train.lr_encoder, train.lr_decoder, train.lr_pow) == (0.02, 0.02, 0.9)
    assert (train.beta1, train.weight_decay, train.deep_sup_scale) == (0.9, 1e-4, 0.4)
    assert train.seed == 304
    assert cfg.VAL.checkpoint == cfg.TEST.checkpoint == f"epoch_{train.num_epoch}.pth"


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_a_published_checkpoint_has_a_recipe_that_asks_for_it(model):
    recipes = [recipe(path) for path in ADE20K]
    (cfg,) = [c for c in recipes if Path(c.DIR).name == model]
    for urls, part in zip(published_checkpoint(model), ("encoder", "decoder"), strict=True):
        assert urls[-1].endswith(f"/{model}/{part}_{cfg.VAL.checkpoint}")


@pytest.mark.parametrize("encoder", sorted(ENCODER_FACTS))
def test_every_encoder_has_published_imagenet_weights(encoder):
    assert imagenet_weights(encoder).urls[-1].startswith("http://sceneparsing.csail.mit.edu/")
