"""Settings of the network (`MODEL`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mit_semseg.config.schema import Section, key


@dataclass(frozen=True)
class ModelOptions(Section):
    """Encoder and decoder, or a whole model of another library, and initial weights."""

    SECTION: ClassVar[str] = "MODEL"

    arch: str = key(
        "",
        "a whole [model of another library](models.md#models-of-other-libraries): `hf:NAME` or "
        "`hf:FOLDER` (transformers), `smp:NAME:ENCODER` or `smp:FOLDER` "
        "(segmentation_models.pytorch); empty: `arch_encoder` and `arch_decoder`",
    )
    arch_encoder: str = key("resnet50dilated", "name of the [encoder](models.md#encoders)")
    arch_decoder: str = key("ppm_deepsup", "name of the [decoder](models.md#decoders)")
    weights_encoder: str = key(
        "",
        "empty: ImageNet weights by name; `none`: random; else a path, a url, `torchvision:NAME` "
        "or `tfslim:FILE` (see [weights](models.md#weights)). With `arch`, empty: those of the "
        "source",
    )
    weights_decoder: str = key(
        "",
        "empty or `none`: random; else a path, a url, or `torchvision:NAME` (see "
        "[weights](models.md#weights)). With `arch`, empty: those of the source",
    )
    in_channels: int = key(
        3,
        "channels of the images: 3, or 4 with `DATASET.depth`. Filters of the fourth channel are "
        "initialised with the mean of the three colours'",
        fits=lambda count: count in (3, 4),
        advice="it is 3, or 4 with DATASET.depth",
    )
    fc_dim: int = key(2048, "channels of the encoder's last feature map", least=1)

    @property
    def name(self) -> str:
        """Of the network, in messages and figures."""
        return self.arch or f"{self.arch_encoder} + {self.arch_decoder}"
