"""SegNet: a mirrored VGG16 that unpools with the encoder's pooling indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.models.decoders.base import DECODERS, Decoder, init_weights
from mit_semseg.models.decoders.upsampling import unpool
from mit_semseg.models.layers import conv_bn_relu

# Convolutions after each unpooling, coarsest first: VGG16's, mirrored.
DEPTHS = (3, 3, 3, 2, 2)


@DECODERS.register("segnet")
class SegNet(Decoder):
    """Five times: unpooling with the encoder's indices, then two or three 3x3 convolutions.

    Reads the feature maps of `vgg16_bn_indices`, which include pooling indices. Scores have the
    resolution of the image; an odd side is exceeded by one pixel, which `SegmentationModule` crops.

    Paper: Badrinarayanan et al. 2017, arXiv:1511.00561, sec. 3.

    Raises:
        ValueError: the feature maps are not those of `vgg16_bn_indices`.

    Deviations:
        - Convolutions before a BatchNorm have no bias, which it would cancel; in the authors' code
          they have one.
        - The image is normalised as for every model; the paper applies local contrast normalisation
          (sec. 3.2).
        - In evaluation BatchNorm uses its running statistics; the authors compute theirs in a pass
          over the training images after training.
    """

    min_feature_maps = 6
    supported_encoders = ("vgg16_bn_indices",)

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        *widths, deepest = channels
        if widths[-1] != deepest or len(widths) != len(DEPTHS):
            raise ValueError(
                f"segnet does not work with channels {tuple(channels)}: it needs the pooling "
                "indices of vgg16_bn_indices; set MODEL.arch_encoder vgg16_bn_indices"
            )
        outputs = [*reversed(widths[:-1]), None]
        self.blocks = nn.ModuleList()
        for n_in, n_out, depth in zip(reversed(widths), outputs, DEPTHS, strict=True):
            layers: list[nn.Module] = [conv_bn_relu(n_in, n_in) for _ in range(depth - 1)]
            layers += [] if n_out is None else [conv_bn_relu(n_in, n_out)]
            self.blocks.append(nn.Sequential(*layers))
        self.conv_last = nn.Conv2d(widths[0], num_class, 3, padding=1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        *indices, x = features
        h, w = indices[0].shape[-2:]
        planes = [(2 * h, 2 * w), *(i.shape[-2:] for i in indices[:-1])]
        for block, index, plane in zip(self.blocks, indices[::-1], planes[::-1], strict=True):
            x = block(unpool(x, index, plane))
        return (self.conv_last(x),)
