"""Pretrained weights: from a name, path or URL to a verified file, loaded with a report."""

from mit_semseg.weights.archive import (
    SUFFIXES,
    check_archive,
    load_checked,
    need_safetensors,
    read_state_dict,
    safetensors_bytes,
)
from mit_semseg.weights.loading import ClassRows, LoadReport, load_decoder, load_encoder, load_into
from mit_semseg.weights.published import (
    MODELS,
    PUBLISHED,
    SAMPLE_IMAGE,
    PublishedModel,
    fetch_published,
    published_checkpoint,
)
from mit_semseg.weights.sources import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MIRROR,
    TORCHVISION,
    WEIGHTS,
    TorchvisionSource,
    WeightSource,
    cache_dir,
    imagenet_weights,
    resolve,
)
from mit_semseg.weights.tfslim import convert_tfslim_mobilenet
from mit_semseg.weights.torchvision import (
    rename_torchvision_mobilenet,
    torchvision_decoder,
    torchvision_encoder,
)

__all__ = [
    "ClassRows",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MIRROR",
    "MODELS",
    "PUBLISHED",
    "SAMPLE_IMAGE",
    "SUFFIXES",
    "TORCHVISION",
    "WEIGHTS",
    "LoadReport",
    "PublishedModel",
    "TorchvisionSource",
    "WeightSource",
    "cache_dir",
    "check_archive",
    "convert_tfslim_mobilenet",
    "fetch_published",
    "imagenet_weights",
    "load_checked",
    "load_decoder",
    "load_encoder",
    "load_into",
    "need_safetensors",
    "published_checkpoint",
    "read_state_dict",
    "rename_torchvision_mobilenet",
    "resolve",
    "safetensors_bytes",
    "torchvision_decoder",
    "torchvision_encoder",
]
