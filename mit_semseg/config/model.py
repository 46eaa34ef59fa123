"""Settings of the network (`MODEL`)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

from mit_semseg.config.schema import Section, key


@dataclass(frozen=True)
class ModelOptions(Section):
    """Encoder and decoder, or a whole model of another library, and initial weights."""

    SECTION: ClassVar[str] = "MODEL"

    arch: str = key(
        "",
        "a whole [model of another library](models.md#models-of-other-libraries): `hf:NAME` or "
        "`hf:FOLDER` (transformers), `smp:NAME:ENCODER` or `smp:FOLDER` "
        "(segmentation_models.pytorch), `mmseg:FILE` (mmsegmentation); empty: "
        "`arch_encoder` and `arch_decoder`",
    )
    arch_encoder: str = key(
        "resnet50dilated",
        "name of the [encoder](models.md#encoders), or `timm:NAME` for a model of "
        "[timm](models.md#timm-encoders)",
    )
    arch_decoder: str = key("ppm_deepsup", "name of the [decoder](models.md#decoders)")
    weights_encoder: str = key(
        "",
        "empty: ImageNet weights by name; `none`: random; else a path, a url, `torchvision:NAME` "
        "or `tfslim:FILE` (see [weights](models.md#weights)). With `arch`, empty: those of the "
        "source; of a timm encoder, empty: timm's weights from the Hugging Face Hub",
    )
    weights_decoder: str = key(
        "",
        "empty or `none`: random; else a path, a url, or `torchvision:NAME` (see "
        "[weights](models.md#weights)). With `arch`, empty: those of the source",
    )
    in_channels: int = key(
        3,
        "channels of the images: 3, or 4 with `DATASET.depth`, or the number of `DATASET.bands`. "
        "Pretrained filters of red, green and blue are kept, and others initialised from them (see "
        "[multispectral images](data.md#multispectral-images))",
        least=1,
    )
    fc_dim: int = key(
        2048,
        "channels of the encoder's last feature map; of a timm encoder it may be left out",
        least=1,
    )
    output_stride: int = key(
        0,
        "stride of the deepest feature map of a timm encoder, by dilation: 8, 16 or 32; 0: the "
        "encoder's own. Other encoders have it in their name",
        fits=lambda stride: stride in (0, 8, 16, 32),
        advice="use 8, 16, 32, or 0 for the encoder's own",
    )
    out_indices: tuple[int, ...] = key(
        (),
        "indices of the feature maps of a timm encoder to use, counted from 0: of its stages, or "
        "of the blocks of a plain vision transformer. The layers after the last one are left out, "
        "which makes small encoders. Empty: all maps of stride 4 or more; of a plain vision "
        "transformer four blocks, evenly spaced, ending with the last",
        least=0,
        advice="give indices in rising order, such as (1, 2, 3)",
    )
    vit_pyramid: bool = key(
        False,
        "feature maps of strides below and above its patch size from one block of a plain vision "
        "transformer of timm ([ViTDet](https://arxiv.org/abs/2203.16527))",
    )

    @property
    def name(self) -> str:
        """Name of the network for messages and figures."""
        return self.arch or f"{self.arch_encoder} + {self.arch_decoder}"

    def trained_with(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and std, RGB in [0, 1], of the pretraining of a timm encoder.

        None for other encoders, and if timm is not installed or does not know the name; building
        the encoder then raises an error.
        """
        kind, _, name = self.arch_encoder.partition(":")
        if kind != "timm" or importlib.util.find_spec("timm") is None:
            return None
        models: Any = importlib.import_module("timm.models")
        try:
            trained = models.get_pretrained_cfg(name)
        except RuntimeError:
            return None
        return None if trained is None else (tuple(trained.mean), tuple(trained.std))
