"""Builds models from names and from the configuration."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mit_semseg.config import ModelOptions, Options
from mit_semseg.config.options import SETTINGS
from mit_semseg.dataset.base import FORMATS
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.rasters import check_statistics
from mit_semseg.dataset.split import check_depth
from mit_semseg.dataset.transforms import Normalize
from mit_semseg.losses import build_loss
from mit_semseg.models import external
from mit_semseg.models.decoders import DECODERS, Decoder
from mit_semseg.models.encoders import ENCODERS, Encoder
from mit_semseg.models.encoders.base import Variant, widen_input
from mit_semseg.models.encoders.timm_backbone import PREFIX, timm_variant
from mit_semseg.models.module import SegmentationModule, check_head_weights
from mit_semseg.weights import ClassRows, load_decoder, load_encoder
from mit_semseg.weights.channels import describe_filters

log = logging.getLogger("mit_semseg")


def _encoder(
    arch: str, output_stride: int = 0, out_indices: Sequence[int] = (), vit_pyramid: bool = False
) -> type[Encoder] | Variant:
    if arch.startswith(PREFIX):
        name = arch.removeprefix(PREFIX)
        return timm_variant(name, output_stride, tuple(out_indices), vit_pyramid)
    found = ENCODERS.get(arch.lower())
    if output_stride not in (0, found.strides[-1]) or out_indices or vit_pyramid:
        raise ValueError(
            f"MODEL.output_stride, out_indices and vit_pyramid are for timm encoders, and "
            f"MODEL.arch_encoder is {arch}: leave them out; a stride is part of its name"
        )
    return found


def _encoder_options(model: ModelOptions) -> dict[str, Any]:
    """What `_encoder` takes beside the name."""
    return {key: getattr(model, key) for key in ("output_stride", "out_indices", "vit_pyramid")}


def _decoder(arch: str) -> type[Decoder]:
    return DECODERS.get(arch.lower())


def check_pair(
    arch_encoder: str, arch_decoder: str, fc_dim: int | None = None, **encoder_options: Any
) -> None:
    """Checks that an encoder and a decoder can work together, without building them.

    Args:
        arch_encoder: name in `ENCODERS`, or "timm:NAME".
        arch_decoder: name in `DECODERS`.
        fc_dim: MODEL.fc_dim, channels of the encoder's last feature map; None: not checked.
        encoder_options: of a timm encoder, output_stride, out_indices and vit_pyramid (see
            `ModelBuilder.build_encoder`).

    Raises:
        ValueError: a name is unknown, the pair does not work, or fc_dim is wrong.
    """
    encoder = _encoder(arch_encoder, **encoder_options)
    _check_partners(arch_encoder, encoder, arch_decoder)
    _check_maps(arch_decoder, arch_encoder, len(encoder.channels))
    if fc_dim is not None and fc_dim != encoder.channels[-1]:
        emitted = encoder.channels[-1]
        raise ValueError(
            f"{arch_encoder} emits {emitted} channels; MODEL.fc_dim is {fc_dim}: "
            f"set MODEL.fc_dim {emitted}"
        )


def check_aux_weights(arch_decoder: str, weights: Sequence[float]) -> None:
    """Checks that TRAIN.aux_weights is empty or has one weight for each auxiliary head.

    Raises:
        ValueError: the name is unknown, or the number of weights is wrong.
    """
    check_head_weights(weights, _decoder(arch_decoder).auxiliary, f"decoder {arch_decoder}")


def check_options(options: Options) -> None:
    """Checks options that depend on the encoder, the decoder or the data format.

    Contradictions between the options themselves are found when they are read.

    Raises:
        ValueError: a name is unknown, or the parts do not work together.
    """
    model = options.MODEL
    check_depth(options.DATASET)
    check_statistics(options.DATASET)
    if model.arch:
        external.check(options)
        return
    encoder_options = _encoder_options(model)
    of_timm = model.arch_encoder.startswith(PREFIX)
    fc_dim = None if of_timm and model.fc_dim == ModelOptions.fc_dim else model.fc_dim
    check_pair(model.arch_encoder, model.arch_decoder, fc_dim, **encoder_options)
    check_aux_weights(model.arch_decoder, options.TRAIN.aux_weights)
    stride = math.lcm(*_encoder(model.arch_encoder, **encoder_options).strides)
    for section in (options.VAL, options.TEST):
        if any(side % stride for side in section.window):
            rounded = [-(-side // stride) * stride for side in section.window]
            raise ValueError(
                f"{section.SECTION}.window is {list(section.window)}, but {model.arch_encoder} "
                f"needs multiples of its stride {stride}: set {section.SECTION}.window {rounded}"
            )


def _check_partners(arch_encoder: str, encoder: type[Encoder] | Variant, arch_decoder: str) -> None:
    """Checks `supported_encoders` of the decoder and `supported_decoders` of the encoder."""
    encoders = _decoder(arch_decoder).supported_encoders
    decoders = encoder.supported_decoders
    if encoders and arch_encoder.lower() not in encoders:
        raise ValueError(
            f"decoder {arch_decoder} does not work with encoder {arch_encoder}: set "
            f"MODEL.arch_encoder to {' or '.join(encoders)}, or take another decoder"
        )
    if decoders and arch_decoder.lower() not in decoders:
        raise ValueError(
            f"encoder {arch_encoder} does not work with decoder {arch_decoder}: set "
            f"MODEL.arch_decoder to {' or '.join(decoders)}, or take another encoder"
        )


def _check_maps(arch_decoder: str, source: str, count: int) -> None:
    minimum = _decoder(arch_decoder).min_feature_maps
    if count < minimum:
        others = {name: _decoder(name) for name in DECODERS.names()}
        compatible = [
            name
            for name, kind in others.items()
            if kind.min_feature_maps <= count and not kind.supported_encoders
        ]
        raise ValueError(
            f"decoder {arch_decoder} needs at least {minimum} feature maps and {source} emits "
            f"{count}: set MODEL.arch_decoder to one of {', '.join(compatible)}"
        )


# One encoder for each fc_dim of the published toolkit, whose decoders were built from fc_dim alone.
_PUBLISHED = ("resnet18", "resnet50", "mobilenetv2dilated", "hrnetv2")


def _channels(arch_decoder: str, fc_dim: int) -> tuple[int, ...]:
    """Channels of the feature maps if only those of the last one are known.

    They are taken from an encoder whose last map has fc_dim channels: one that the decoder
    supports, or a published one. Otherwise each map gets half as many channels as the next.
    """
    for name in _decoder(arch_decoder).supported_encoders or _PUBLISHED:
        channels = _encoder(name).channels
        if channels[-1] == fc_dim:
            return channels
    return (fc_dim // 8, fc_dim // 4, fc_dim // 2, fc_dim)


def _class_rows(weights: str, classes: Sequence[str]) -> ClassRows | None:
    """The class correspondence with a checkpoint, if its folder has a class table."""
    table = Path(weights).parent / "classes.csv"
    if not classes or not Path(weights).is_file() or not table.is_file():
        return None
    return ClassRows.by_name(classes, ClassTable.load(table).names)


class ModelBuilder:
    """Builds encoders, decoders and segmentation modules from names."""

    @staticmethod
    def weights_init(m: nn.Module) -> None:
        """Initialises one layer as in the published decoders, for `module.apply`.

        Decoders from `build_decoder` are already initialised (`decoders.base.init_weights`).

        Args:
            m: any module. If its class name contains "Conv", it gets Kaiming normal weights; if
                "BatchNorm", weight 1 and bias 1e-4; others are unchanged.
        """
        name, weight, bias = type(m).__name__, getattr(m, "weight", None), getattr(m, "bias", None)
        if "Conv" in name and weight is not None:
            nn.init.kaiming_normal_(weight)
        elif "BatchNorm" in name and weight is not None and bias is not None:
            nn.init.ones_(weight)
            nn.init.constant_(bias, 1e-4)

    @staticmethod
    def build_encoder(
        arch: str = "resnet50dilated",
        fc_dim: int = 512,
        weights: str = "",
        in_channels: int = 3,
        output_stride: int = 0,
        out_indices: Sequence[int] = (),
        vit_pyramid: bool = False,
        bands: Sequence[str] = (),
        **options: Any,
    ) -> Encoder:
        """Builds an encoder and loads its weights.

        Args:
            arch: name in `ENCODERS`, or "timm:NAME" for a model of timm.
            fc_dim: ignored; in the published signature.
            weights: "": ImageNet weights by name; "none": random; otherwise a path, a URL,
                "torchvision:NAME" or "tfslim:PATH" (see `weights.load_encoder`).
            in_channels: channels of the images: red, green, blue, then others such as depth, or
                `bands`.
            output_stride: of a timm encoder, 8, 16 or 32 if it supports that; 0: its own.
            out_indices: of a timm encoder, the indices of the feature maps to use; the parts that
                follow the last one are not built; empty: see `MODEL.out_indices`.
            vit_pyramid: of a plain vision transformer of timm, a simple feature pyramid of one
                block instead (see `encoders.vit_pyramid`).
            bands: `DATASET.bands`, which choose the first filters (see `weights.channels`).
            options: mean and std of the input, for `weights.load_encoder`.

        Raises:
            ValueError: the name is unknown, or the weights do not match the encoder.
            FileNotFoundError: the weights do not exist.
        """
        encoder = _encoder(arch, output_stride, out_indices, vit_pyramid)()
        widen_input(encoder, in_channels, bands)
        load_encoder(encoder, arch.lower(), weights, bands=bands, **options)
        return encoder

    @staticmethod
    def build_decoder(
        arch: str = "ppm_deepsup",
        fc_dim: int = 512,
        num_class: int = 150,
        weights: str = "",
        use_softmax: bool = False,
        channels: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        classes: Sequence[str] = (),
    ) -> Decoder:
        """Builds a decoder and loads its weights.

        Args:
            arch: name in `DECODERS`.
            fc_dim: channels of the encoder's last feature map; ignored if `channels` is given.
            num_class: number of classes.
            weights: "" or "none": random; otherwise a path or URL.
            use_softmax: return probabilities (inference) instead of log-probabilities (training).
            channels: `Encoder.channels`; None: those of a published encoder, or of one that the
                decoder supports, whose last map has `fc_dim` channels.
            strides: `Encoder.strides`, if known.
            classes: names of the classes. If `classes.csv` beside the weights has other names, or
                another order, rows of the classifier are loaded by name.

        Raises:
            ValueError: the name is unknown, or the feature maps or the weights do not match the
                decoder.
            FileNotFoundError: the weights do not exist.
        """
        channels = _channels(arch, fc_dim) if channels is None else tuple(channels)
        _check_maps(arch, f"the encoder (channels {channels})", len(channels))
        decoder = _decoder(arch)(
            channels, num_class=num_class, strides=strides, use_softmax=use_softmax
        )
        load_decoder(decoder, arch.lower(), weights, _class_rows(weights, classes))
        return decoder

    @staticmethod
    def from_config(
        cfg: Any,
        inference: bool = False,
        class_weights: Tensor | None = None,
        classes: Sequence[str] = (),
    ) -> SegmentationModule:
        """Builds the encoder, decoder and loss of a configuration.

        Args:
            cfg: the whole configuration, `Options` or a yacs tree.
            inference: the decoder returns probabilities instead of log-probabilities.
            class_weights: (num_class,) float weights for the loss, or None.
            classes: names of the classes (see `build_decoder`).

        Raises:
            ValueError: a name is unknown, or the parts do not work together.
            FileNotFoundError: the weights do not exist.
        """
        options = Options.read(cfg)
        check_options(options)
        data, train = options.DATASET, options.TRAIN
        encoder, decoder = _parts(options, classes)
        decoder.use_softmax = inference
        if not decoder.trains_scores and not inference:
            _warn_of_losses(options)
        return SegmentationModule(
            encoder,
            decoder,
            build_loss(train.loss, data.num_class, class_weights, train.label_smoothing),
            deep_sup_scale=train.deep_sup_scale
            if any(head.weight is None for head in decoder.auxiliary)
            else None,
            aux_weights=train.aux_weights,
            # Bands are normalised when they are read.
            normalize=None if data.bands else encoder.normalization() or Normalize.of(data),
            mirror_pairs=FORMATS.get(data.format)().mirror_pairs,
        )


def _warn_of_losses(options: Options) -> None:
    """Says which settings have no effect on a decoder that brings its own losses."""
    for name in ("TRAIN.loss", "TRAIN.label_smoothing", "TRAIN.class_weights"):
        if options[name] != SETTINGS[name].default:
            log.warning(
                "%s has no effect: %s is trained with its own loss", name, options.MODEL.name
            )


def _parts(options: Options, classes: Sequence[str]) -> tuple[Encoder, Decoder]:
    """Encoder and decoder with the weights that the options ask for."""
    model, data = options.MODEL, options.DATASET
    if data.bands and model.weights_encoder != "none":
        log.info("%s", describe_filters(data.bands))
    if model.arch:
        return external.build(options, classes=classes)
    encoder = ModelBuilder.build_encoder(
        model.arch_encoder,
        fc_dim=model.fc_dim,
        weights=model.weights_encoder,
        in_channels=model.in_channels,
        bands=data.bands,
        **_encoder_options(model),
        mean=[m / data.value_range for m in data.mean],
        std=[s / data.value_range for s in data.std],
    )
    decoder = ModelBuilder.build_decoder(
        model.arch_decoder,
        fc_dim=model.fc_dim,
        num_class=data.num_class,
        weights=model.weights_decoder,
        channels=encoder.channels,
        strides=encoder.strides,
        classes=classes,
    )
    return encoder, decoder
