"""ICNet's encoder: a ResNet50 on the image at half and quarter size, and a light branch."""

from __future__ import annotations

from torch import Tensor, nn

from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights
from mit_semseg.models.encoders.resnet import RESNET50, ResNet
from mit_semseg.models.layers import conv_bn_relu, resize


def halved(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2)), bilinear."""
    H, W = x.shape[2:]
    return resize(x, (-(-H // 2), -(-W // 2)))


@ENCODERS.register("icnet_resnet50")
class ICNetResNet50(Encoder):
    """Three feature maps, of the image at full, half and quarter size.

    The full-size image goes through three convolutions. At half size it goes through ResNet50 up
    to the first block of the second stage; that map is halved once more, which stands for the
    image at quarter size, and goes through the rest. `backbone` is a plain `resnet50dilated`, and
    its ImageNet weights can be loaded.

    Paper: Zhao et al. 2018, arXiv:1704.08545, sec. 3.2 and fig. 2; the branches share the weights
    and computation that they share in the published model (its layer conv3_1_sub4).

    Deviations:
        - The backbone keeps all its filters; the published model is pruned to half of them after
          training (sec. 3.4).
        - The half-size input is resized with `align_corners=False`, with sides rounded up: a mean
          over 2x2 pixels. The published model aligns the corners, and so samples every second pixel
          for its odd sides.
        - Strides and dilations in the ResNet50 are those of `ResNet`; the published model has the
          stride of a block in its first 1x1 convolution, and the full dilation already in the first
          block of a dilated stage.
    """

    channels = (64, 512, 2048)
    strides = (8, 16, 32)
    supported_decoders = ("icnet",)  # others would leave branches untrained

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 32), (32, 32), (32, 64))
        self.full = nn.Sequential(*(conv_bn_relu(*width, stride=2) for width in widths))
        self.backbone = ResNet(**RESNET50, output_stride=8)
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        net = self.backbone
        x = halved(images)
        x = net.relu1(net.bn1(net.conv1(x)))
        x = net.relu2(net.bn2(net.conv2(x)))
        x = net.relu3(net.bn3(net.conv3(x)))
        shared, *rest = net.layer2
        half = shared(net.layer1(net.maxpool(x)))
        quarter = halved(half)
        for block in rest:
            quarter = block(quarter)
        return [self.full(images), half, net.layer4(net.layer3(quarter))]
