"""Origins of pretrained weights, and their download: from a name, path or URL to a local file."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mit_semseg.download import DownloadError, fetch
from mit_semseg.registry import DILATED_NAMES, closest
from mit_semseg.weights.archive import not_found

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MIRROR = "MIT_SEMSEG_MIRROR"
HOST = "http://sceneparsing.csail.mit.edu/model/"


@dataclass(frozen=True)
class WeightSource:
    """Origin and input normalisation of pretrained weights.

    Attributes:
        file: file name in the cache.
        urls: URLs, in order of preference.
        sha256: digest or its first digits; None if none is published.
        licence: licence of the weights, as far as their publisher states one.
        paper: paper of the architecture.
        mean: mean of the input normalisation, RGB in [0, 1].
        std: standard deviation of the input normalisation.
        data: training data.
    """

    file: str
    urls: tuple[str, ...]
    sha256: str | None
    licence: str
    paper: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    data: str = "ImageNet-1k classification (ILSVRC 2012)"


def _csail(file: str, paper: str) -> WeightSource:
    url = f"{HOST}pretrained_resnet/{file}"
    return WeightSource(
        file=file,
        urls=(url,),  # not https: the server's certificate is for another host
        sha256=None,
        licence="BSD-3-Clause (the published toolkit's; none is stated for the file itself)",
        paper=paper,
    )


@dataclass(frozen=True)
class TorchvisionSource(WeightSource):
    """Weights of torchvision, with its names (see `torchvision_encoder`, `torchvision_decoder`).

    Attributes:
        encoder: backbone that they can be loaded into.
        decoders: decoders that the head, or some layers of it, can be loaded into.
    """

    encoder: str = ""
    decoders: tuple[str, ...] = ()

    @property
    def segments(self) -> bool:
        """Whether it is a segmentation model, not an ImageNet classifier."""
        return self.data != WeightSource.data


def _torchvision(
    file: str,
    encoder: str,
    paper: str,
    decoders: tuple[str, ...] = (),
    data: str = WeightSource.data,
) -> TorchvisionSource:
    return TorchvisionSource(
        file=file,
        urls=(f"https://download.pytorch.org/models/{file}",),
        sha256=_digest_in_name(file),
        licence="BSD-3-Clause (torchvision's; none is stated for the file itself)",
        paper=paper,
        data=data,
        encoder=encoder,
        decoders=decoders,
    )


def _digest_in_name(name: str) -> str | None:
    """`mobilenet_v2-b0353104.pth` -> `b0353104`, as torch hub names files."""
    match = re.search(r"-([0-9a-f]{8,64})\.(pth|pt|bin)$", name)
    return match[1] if match else None


_RESNET = "He et al. 2016, arXiv:1512.03385"
_RESNEXT = "Xie et al. 2017, arXiv:1611.05431"
_MOBILENETV2 = "Sandler et al. 2018, arXiv:1801.04381"
_MOBILENETV3 = "Howard et al. 2019, arXiv:1905.02244"
_VGG = "Simonyan & Zisserman 2015, arXiv:1409.1556"
_DENSENET = "Huang et al. 2017, arXiv:1608.06993"
_FCN = "Long et al. 2015, arXiv:1411.4038"
_DEEPLAB = "Chen et al. 2017, arXiv:1706.05587"
_COCO = "COCO train2017, images with the 20 classes of Pascal VOC; 21 classes with background"
_on_coco = partial(_torchvision, data=_COCO)
_VGG_HEADS = ("fcn32s", "fcn16s", "fcn8s")
_FCN_HEADS = ("fcn_head", "fcn_head_deepsup")
_DEEPLAB_HEADS = ("deeplabv3", "deeplabv3_deepsup")

TORCHVISION: dict[str, TorchvisionSource] = {
    "vgg16": _torchvision("vgg16-397923af.pth", "vgg16", _VGG, _VGG_HEADS),
    "vgg16_bn": _torchvision("vgg16_bn-6c64b313.pth", "vgg16_bn", _VGG, _VGG_HEADS),
    "resnet18": _torchvision("resnet18-f37072fd.pth", "torchvision_resnet18", _RESNET),
    "resnet34": _torchvision("resnet34-b627a593.pth", "resnet34", _RESNET),
    "resnet50": _torchvision("resnet50-0676ba61.pth", "torchvision_resnet50", _RESNET),
    "resnet101": _torchvision("resnet101-63fe2227.pth", "torchvision_resnet101", _RESNET),
    "resnet152": _torchvision("resnet152-394f9c45.pth", "resnet152", _RESNET),
    "resnext50_32x4d": _torchvision("resnext50_32x4d-7cdf4587.pth", "resnext50", _RESNEXT),
    "densenet121": _torchvision("densenet121-a639ec97.pth", "densenet121", _DENSENET),
    "densenet161": _torchvision("densenet161-8d451a50.pth", "densenet161", _DENSENET),
    "densenet169": _torchvision("densenet169-b2777c0a.pth", "densenet169", _DENSENET),
    "densenet201": _torchvision("densenet201-c1103571.pth", "densenet201", _DENSENET),
    "mobilenet_v2": _torchvision("mobilenet_v2-b0353104.pth", "mobilenetv2", _MOBILENETV2),
    "mobilenet_v3_large": _torchvision(
        "mobilenet_v3_large-8738ca79.pth",
        "mobilenetv3_large",
        _MOBILENETV3,
    ),
    **{
        f"{weights}.IMAGENET1K_V2": _torchvision(file, encoder, paper)
        for weights, file, encoder, paper in (
            ("ResNet50_Weights", "resnet50-11ad3fa6.pth", "torchvision_resnet50", _RESNET),
            ("ResNet101_Weights", "resnet101-cd907fc2.pth", "torchvision_resnet101", _RESNET),
            ("ResNet152_Weights", "resnet152-f82ba261.pth", "resnet152", _RESNET),
            ("ResNeXt50_32X4D_Weights", "resnext50_32x4d-1a0047aa.pth", "resnext50", _RESNEXT),
            ("MobileNet_V2_Weights", "mobilenet_v2-7ebf99e0.pth", "mobilenetv2", _MOBILENETV2),
            (
                "MobileNet_V3_Large_Weights",
                "mobilenet_v3_large-5c1a4163.pth",
                "mobilenetv3_large",
                _MOBILENETV3,
            ),
        )
    },
    "fcn_resnet50": _on_coco(
        "fcn_resnet50_coco-1167a1af.pth", "torchvision_resnet50", _FCN, _FCN_HEADS
    ),
    "fcn_resnet101": _on_coco(
        "fcn_resnet101_coco-7ecb50ca.pth", "torchvision_resnet101", _FCN, _FCN_HEADS
    ),
    "deeplabv3_resnet50": _on_coco(
        "deeplabv3_resnet50_coco-cd0a2569.pth", "torchvision_resnet50", _DEEPLAB, _DEEPLAB_HEADS
    ),
    "deeplabv3_resnet101": _on_coco(
        "deeplabv3_resnet101_coco-586e9e4e.pth", "torchvision_resnet101", _DEEPLAB, _DEEPLAB_HEADS
    ),
    "deeplabv3_mobilenet_v3_large": _on_coco(
        "deeplabv3_mobilenet_v3_large-fc3c493d.pth",
        "mobilenetv3_large",
        _DEEPLAB,
        ("deeplabv3_wide_deepsup",),
    ),
    "lraspp_mobilenet_v3_large": _on_coco(
        "lraspp_mobilenet_v3_large-d234d4ea.pth",
        "mobilenetv3_large",
        _MOBILENETV3,
        ("lraspp",),
    ),
}
"""Torchvision's weights by its names: `MODEL.weights_encoder torchvision:NAME`.

The name of a model selects its IMAGENET1K_V1 weights; the full name in torchvision selects
IMAGENET1K_V2 weights, which are from a longer training.

Weights of a segmentation model are for both encoder and decoder; the encoder has output stride 8
(`torchvision_resnet50dilated`) or, for MobileNetV3, 16 (`mobilenetv3_large_dilated16`). The 21
classes are those of Pascal VOC in the order of the data format voc2012: background, aeroplane,
bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person,
pottedplant, sheep, sofa, train, tvmonitor.
"""

WEIGHTS: dict[str, WeightSource] = {
    "resnet18": _csail("resnet18-imagenet.pth", "He et al. 2016, arXiv:1512.03385"),
    "resnet50": _csail("resnet50-imagenet.pth", "He et al. 2016, arXiv:1512.03385"),
    "resnet101": _csail("resnet101-imagenet.pth", "He et al. 2016, arXiv:1512.03385"),
    "resnext101": _csail("resnext101-imagenet.pth", "Xie et al. 2017, arXiv:1611.05431"),
    "mobilenetv2": _csail("mobilenet_v2.pth.tar", "Sandler et al. 2018, arXiv:1801.04381"),
    "hrnetv2": _csail("hrnetv2_w48-imagenet.pth", "Wang et al. 2020, arXiv:1908.07919"),
    "drn_c_26": WeightSource(
        file="drn_c_26-ddedf421.pth",
        urls=("http://dl.yf.io/drn/drn_c_26-ddedf421.pth",),
        sha256="ddedf421",
        licence="BSD-3-Clause (the published code's; none is stated for the file itself)",
        paper="Yu et al. 2017, arXiv:1705.09914",
    ),
}
"""ImageNet weights by backbone: those of the published toolkit, otherwise torchvision's."""
for _source in TORCHVISION.values():
    if not _source.segments:
        WEIGHTS.setdefault(_source.encoder, _source)


# Encoders with a published backbone as a submodule: its architecture, and its attribute name.
SUBMODULES = {
    "bisenet_resnet18": ("resnet18", "context"),
    "icnet_resnet50": ("resnet50", "backbone"),
}


# Encoder -> backbone with the same weights.
_BACKBONES = {
    f"{name}{suffix}": name
    for name in WEIGHTS
    for suffixes in DILATED_NAMES.values()
    for suffix in suffixes
}
_BACKBONES["vgg16_bn_indices"] = "vgg16_bn"


def backbone_of(arch: str) -> str:
    """`resnet50dilated`, ... -> `resnet50`; the name itself if no weights are published."""
    return _BACKBONES.get(arch.lower(), arch.lower())


def imagenet_weights(arch: str) -> WeightSource:
    """Origin of the ImageNet weights of an encoder.

    Raises:
        ValueError: there are none for this encoder.
    """
    name = backbone_of(arch)
    if name not in WEIGHTS:
        raise ValueError(
            f"there are no ImageNet weights for encoder {arch!r} (only for "
            f"{', '.join(sorted(WEIGHTS))}): set MODEL.weights_encoder to 'none', a path or a URL"
            f"{closest(name, list(WEIGHTS))}"
        )
    return WEIGHTS[name]


def cache_dir() -> Path:
    """Folder of downloaded weights: `checkpoints` under the torch hub folder (TORCH_HOME)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def mirrored(path: str, urls: Sequence[str]) -> list[str]:
    """The URLs, preceded by that of the mirror MIT_SEMSEG_MIRROR (a base URL), if it is set."""
    base = os.environ.get(MIRROR, "").rstrip("/")
    return ([f"{base}/{path}"] if base else []) + list(urls)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://", "file://"))


def resolve(source: str | Path) -> Path:
    """Turns an encoder name, a path or a URL into a local file, downloading it if necessary.

    Args:
        source: a backbone or encoder name (its ImageNet weights), a URL, or a path.

    Returns:
        Path of an existing file.

    Raises:
        FileNotFoundError: the path does not exist; the message lists weight files in its folder.
        DownloadError: the file could not be downloaded.
    """
    text = str(source)
    if _is_url(text):
        name = urllib.parse.urlsplit(text).path.rsplit("/", 1)[-1] or "weights.pth"
        # With a hash of the URL, as many end in the same name (encoder_epoch_20.pth).
        return fetch(
            text,
            cache_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-{name}",
            sha256=_digest_in_name(name),
        )
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if isinstance(source, str) and backbone_of(text) in WEIGHTS:
        return fetch_imagenet(text)
    raise FileNotFoundError(not_found(path))


def _fetch(source: WeightSource) -> Path:
    urls = mirrored(source.file, source.urls)
    return fetch(urls, cache_dir() / source.file, sha256=source.sha256)


def fetch_imagenet(arch: str) -> Path:
    """The file of `imagenet_weights(arch)`, downloaded once."""
    known = imagenet_weights(arch)
    try:
        return _fetch(known)
    except DownloadError as e:
        other = ", 'torchvision:mobilenet_v2'" if backbone_of(arch) == "mobilenetv2" else ""
        raise DownloadError(
            e.reason,
            f"{str(e).removeprefix(e.reason)}; or set MODEL.weights_encoder to 'none' (random)"
            f"{other} or a file you have",
        ) from e


def fetch_torchvision(name: str, *, encoder: str = "", decoder: str = "") -> Path:
    """The file of "torchvision:NAME"; ValueError if it is for another encoder or decoder."""
    if _is_url(name) or Path(name).expanduser().exists():
        return resolve(name)
    if name not in TORCHVISION:
        raise ValueError(
            f"unknown weights 'torchvision:{name}' (known: {', '.join(sorted(TORCHVISION))}; "
            f"for a file use 'torchvision:PATH'){closest(name, list(TORCHVISION))}"
        )
    source = TORCHVISION[name]
    if encoder and backbone_of(encoder) != source.encoder:
        raise ValueError(
            f"'torchvision:{name}' cannot initialise encoder {encoder!r}: "
            f"{_other_stem(name, encoder)}set MODEL.arch_encoder to {source.encoder} or a dilated "
            "variant of it"
        )
    if decoder and decoder not in source.decoders:
        fix = "MODEL.weights_decoder to 'none': these are ImageNet weights"
        if source.segments:
            fix = f"MODEL.arch_decoder to {' or '.join(source.decoders)}"
        raise ValueError(f"'torchvision:{name}' cannot initialise decoder {decoder!r}: set {fix}")
    return _fetch(source)


def _other_stem(name: str, encoder: str) -> str:
    """Explains that torchvision's ResNets and those here differ in the stem."""
    deep = ("resnet18", "resnet50", "resnet101", "resnext101")
    if not name.lower().startswith("res") or backbone_of(encoder) not in deep:
        return ""
    return "torchvision's ResNets have a stem of one 7x7 convolution, this one of three 3x3; "
