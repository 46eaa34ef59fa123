"""BiSeNet's encoder: a ResNet18 (context path) and three strided convolutions (spatial path)."""

from __future__ import annotations

from torch import Tensor, nn

from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights
from mit_semseg.models.encoders.resnet import RESNET18, ResNet
from mit_semseg.models.layers import conv_bn_relu


@ENCODERS.register("bisenet_resnet18")
class BiSeNetResNet18(Encoder):
    """Feature maps: the output of the spatial path, and the last two of the context path.

    `context` is a plain `resnet18`, and its ImageNet weights can be loaded.

    Paper: Yu et al. 2018, arXiv:1808.00897, sec. 3.1 and 3.2. The paper gives no widths: these, and
    the 1x1 convolution that ends the spatial path, are those of the authors' code.

    Deviations:
        - The stem of the ResNet18 has three 3x3 convolutions, as its published ImageNet weights do;
          the authors' has one 7x7 convolution.
    """

    channels = (128, 256, 512)
    strides = (8, 16, 32)
    supported_decoders = ("bisenet",)  # others would leave parts of the two paths untrained

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            conv_bn_relu(3, 64, 7, 2),
            conv_bn_relu(64, 64, 3, 2),
            conv_bn_relu(64, 64, 3, 2),
            conv_bn_relu(64, 128, 1, 1),
        )
        self.context = ResNet(**RESNET18)
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        return [self.spatial(images), *self.context.feature_maps(images)[-2:]]
