"""Models of segmentation_models.pytorch (`MODEL.arch smp:NAME:ENCODER`, or a folder)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mit_semseg.errors import one_line
from mit_semseg.models.external.base import (
    Architecture,
    ExternalDecoder,
    ExternalEncoder,
    read_json,
    reading,
)
from mit_semseg.registry import closest

LIBRARY, MODULE, EXTRA = "segmentation_models.pytorch", "segmentation_models_pytorch", "smp"
# Its classes, by their names in lower case, and as papers write them.
NAMES = (
    *("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus"),
    *("pan", "upernet", "segformer", "dpt"),
)
log = logging.getLogger("mit_semseg")
_DEFAULT = "resnet34"  # the library's own default
_CLASS = "_model_class"


def check(name: str) -> None:
    """Refuses a name that is neither a folder of a model nor an architecture."""
    folder = _folder(name)
    if folder is None:
        _arch(name)
    elif _CLASS not in read_json(folder / "config.json"):
        raise ValueError(
            f"{folder / 'config.json'} names no {_CLASS}: 'smp:{name}' is no folder that "
            "segmentation_models.pytorch saved (save_pretrained)"
        )


def describe(name: str, weights: bool) -> Architecture:
    """Description of an architecture with an encoder, or of a folder."""
    check(name)
    folder = _folder(name)
    if folder is not None:
        config = read_json(folder / "config.json")
        config["arch"] = str(config.pop(_CLASS)).lower()
    else:
        arch, encoder = _arch(name)
        config = {"arch": arch, "encoder_name": encoder, "encoder_weights": "imagenet"}
    if config.get("classes") == 1:
        raise ValueError(
            f"'smp:{name}' has one class, for a threshold: models here have a score for each "
            "class, so two for a binary task"
        )
    values = _normalization(name, config) if weights else {}
    return Architecture(f"smp:{name}", config, config.get("classes", 0), **values)


def network(architecture: Architecture, num_class: int) -> nn.Module:
    """The library's own network for this number of classes, with random weights."""
    import segmentation_models_pytorch

    options = copy.deepcopy(architecture.config)
    options |= {"encoder_weights": None, "classes": num_class, "activation": None}
    try:
        built: nn.Module = segmentation_models_pytorch.create_model(**options)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{architecture.source}: {one_line(error, 300)}") from error
    return built


def pretrained(architecture: Architecture) -> dict[str, Tensor]:
    """Weights of a folder; of an architecture, ImageNet's of its encoder."""
    import segmentation_models_pytorch as smp

    name = architecture.source.partition(":")[2]
    folder = _folder(name)
    if folder is not None:
        with reading(lambda e: f"'smp:{name}' cannot be read ({one_line(e, 200, named=True)})"):
            model: Any = smp.from_pretrained(str(folder))
        state: dict[str, Tensor] = model.state_dict()
        return state
    config = architecture.config

    def message(error: Exception) -> str:
        return (
            f"ImageNet weights of encoder {config['encoder_name']} of 'smp:{name}' cannot be "
            f"downloaded ({one_line(error, 120)}): check the name and the network, or set "
            "MODEL.weights_encoder none"
        )

    with reading(message):
        encoder: Any = smp.create_model(**config, classes=2).encoder
    return {f"encoder.{k}": v for k, v in encoder.state_dict().items()}


def with_channels(architecture: Architecture, count: int) -> Architecture:
    """The same for images of so many channels."""
    return replace(architecture, config={**architecture.config, "in_channels": count})


def split(
    network: nn.Module, architecture: Architecture, num_class: int
) -> tuple[ExternalEncoder, ExternalDecoder]:
    """Encoder and decoder made of the network's modules."""
    model: Any = network
    of_vit = architecture.config["arch"] == "dpt"
    encoder = SmpEncoder(
        model.encoder,
        architecture,
        "encoder.",
        int(model.encoder.output_stride),
        _size_of_vit(model.encoder) if of_vit else None,
    )
    model.encoder = None
    return encoder, SmpDecoder(model, num_class, partial(_decoder, architecture), of_vit)


def save(network: nn.Module, architecture: Architecture, folder: Path) -> None:
    """`save_pretrained`."""
    model: Any = network
    model.save_pretrained(str(folder))


class SmpEncoder(ExternalEncoder):
    """An encoder of segmentation_models.pytorch."""

    def features(self, images: Tensor) -> Sequence[Tensor]:
        """Feature maps, the image or something empty first; of a ViT, its prefix tokens too."""
        found: Any = self.net(images)
        if not isinstance(found, tuple):
            return list(found)
        maps, tokens = found
        return [*maps, *(token for token in tokens if token is not None)]


class SmpDecoder(ExternalDecoder):
    """A decoder of segmentation_models.pytorch with its head."""

    def __init__(
        self, net: nn.Module, num_class: int, make: Callable[[int], ExternalDecoder], of_vit: bool
    ) -> None:
        super().__init__(net, num_class, make)
        self.of_vit = of_vit

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """As `Decoder.logits`."""
        net = self.net
        _, *maps = features
        if self.of_vit:
            count = len(net.decoder.projection_blocks)
            tokens: list[Any] = maps[count:] or [None] * count
            return (net.segmentation_head(net.decoder(maps[:count], tokens)),)
        return (net.segmentation_head(net.decoder(maps)),)


def _decoder(architecture: Architecture, num_class: int) -> ExternalDecoder:
    return split(network(architecture, num_class), architecture, num_class)[1]


def _size_of_vit(encoder: Any) -> tuple[int, int] | None:
    """Size that images must have, if the ViT does not interpolate its position embeddings."""
    patches = getattr(encoder.model, "patch_embed", None)
    if patches is None or not getattr(patches, "strict_img_size", False):
        return None
    height, width = patches.img_size
    return int(height), int(width)


def _folder(name: str) -> Path | None:
    folder = Path(name).expanduser()
    return folder if (folder / "config.json").is_file() else None


def _arch(name: str) -> tuple[str, str]:
    """Architecture and encoder of `Unet++:resnet34`."""
    given, _, encoder = name.partition(":")
    arch = given.lower().replace("++", "plusplus").replace("v3+", "v3plus")
    if arch not in NAMES:
        raise ValueError(
            f"'smp:{name}': {given} is neither a folder that the library saved nor one of "
            f"{', '.join(NAMES)}{closest(arch, list(NAMES))}"
        )
    return arch, encoder or _DEFAULT


def _normalization(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Normalisation for the encoder's weights, as fields of `Architecture`."""
    weights = config.get("encoder_weights")
    if not weights:
        return {}
    from segmentation_models_pytorch.encoders import get_preprocessing_params

    encoder = config["encoder_name"]
    try:
        with reading(lambda error: one_line(error, 80)):
            values = get_preprocessing_params(encoder, weights)
    except OSError as error:
        log.warning(
            "smp:%s: the normalisation of its encoder cannot be looked up (%s): ImageNet's "
            "mean and standard deviation are used",
            name,
            error,
        )
        return {}
    return {
        "mean": tuple(values["mean"]),
        "std": tuple(values["std"]),
        "color_order": values["input_space"],
        "value_range": float(values["input_range"][1]),
    }
