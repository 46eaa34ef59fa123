"""Published `models.models`: encoders made from classifiers, decoders built from `fc_dim`.

`ModelBuilder` builds the classes of `models.encoders` and `models.decoders`, which have the same
layers and state dict names; the classes below are subclasses with the published constructors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from mit_semseg.compat import hrnet, mobilenet, resnet, resnext
from mit_semseg.compat.resnet import BatchNorm2d
from mit_semseg.models.builder import ModelBuilder
from mit_semseg.models.decoders import Decoder, c1, ppm, upernet
from mit_semseg.models.decoders.deepsup import DeepSup
from mit_semseg.models.encoders import mobilenet as mobilenet_encoder
from mit_semseg.models.encoders import resnet as resnet_encoder
from mit_semseg.models.encoders.base import dilate
from mit_semseg.models.layers import conv_bn_relu
from mit_semseg.models.module import SegmentationModule, SegmentationModuleBase
from mit_semseg.models.pyramid import Tile

__all__ = [
    "C1",
    "PPM",
    "BatchNorm2d",
    "C1DeepSup",
    "MobileNetV2Dilated",
    "ModelBuilder",
    "PPMDeepsup",
    "Resnet",
    "ResnetDilated",
    "SegmentationModule",
    "SegmentationModuleBase",
    "UPerNet",
    "conv3x3_bn_relu",
    "hrnet",
    "mobilenet",
    "resnet",
    "resnext",
]

# dilate_scale -> dilations of the last two stages; for other values the strides are kept.
_DILATIONS = {8: (2, 4), 16: (1, 2)}


def conv3x3_bn_relu(in_planes: int, out_planes: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU."""
    return conv_bn_relu(in_planes, out_planes, 3, stride)


# ------------------------------------------------------------------------------ encoders
class Resnet(resnet_encoder.ResNet):
    """A ResNet or ResNeXt without its classifier, as an encoder of output stride 32.

    Args:
        orig_resnet: the network; its layers are used, not copied.
    """

    def __init__(self, orig_resnet: nn.Module) -> None:
        nn.Module.__init__(self)  # not that of ResNet, which creates layers
        for name in resnet.FEATURES:
            setattr(self, name, getattr(orig_resnet, name))
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        self.channels = tuple(_out_channels(stage) for stage in stages)


class ResnetDilated(Resnet):
    """As `Resnet`, with the last two stages dilated.

    Args:
        orig_resnet: the network; its layers are used and changed, not copied.
        dilate_scale: output stride, 8 or 16; as published, it is 32 for any other value.
    """

    def __init__(self, orig_resnet: nn.Module, dilate_scale: int = 8) -> None:
        super().__init__(orig_resnet)
        third, fourth = _DILATIONS.get(dilate_scale, (1, 1))
        dilate(self.layer3, third)
        dilate(self.layer4, fourth)
        self.strides = (4, 8, 16 // third, 32 // fourth)


class MobileNetV2Dilated(mobilenet_encoder.MobileNetV2):
    """A MobileNetV2 without its last convolution and classifier, as an encoder.

    Args:
        orig_net: the network; its layers are used and changed, not copied.
        dilate_scale: output stride, 8 or 16; as published, it is 32 for any other value.
    """

    def __init__(self, orig_net: nn.Module, dilate_scale: int = 8) -> None:
        nn.Module.__init__(self)  # not that of MobileNetV2, which creates layers
        self.features = cast(nn.Sequential, orig_net.features)[:-1]
        self.down_idx, self.total_idx = list(self.out_indices[:-1]), len(self.features)
        third, fourth = _DILATIONS.get(dilate_scale, (1, 1))
        dilate(self.features[self.out_indices[2] : self.out_indices[3]], third)
        dilate(self.features[self.out_indices[3] :], fourth)
        channels = (_out_channels(self.features[i]) for i in self.out_indices)
        self.channels = tuple(channels)
        stride = 32 // fourth
        self.strides = (4, 8, 16 // third, stride, stride)


def _out_channels(stage: nn.Module) -> int:
    return [m for m in stage.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


# ------------------------------------------------------------------------------ decoders
class _FromFcDim(Decoder):
    """A decoder built from `fc_dim`, the channels of the encoder's last feature map.

    Each of its feature maps has half the channels of the next.
    """

    def __init__(self, num_class: int = 150, fc_dim: int = 2048, use_softmax: bool = False) -> None:
        self._build(num_class, fc_dim, use_softmax)

    def _build(self, num_class: int, fc_dim: int, use_softmax: bool, **options: Any) -> None:
        channels = [fc_dim // 2**k for k in reversed(range(self.min_feature_maps))]
        super().__init__(channels, num_class, use_softmax=use_softmax, **options)

    def with_classes(self, num_class: int) -> Decoder:
        return type(self)(num_class=num_class, fc_dim=self.channels[-1])


class _FromFcDimWithPools(_FromFcDim):
    """As `_FromFcDim`, with `pool_scales`."""

    def __init__(
        self,
        num_class: int = 150,
        fc_dim: int = 4096,
        use_softmax: bool = False,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        self._build(num_class, fc_dim, use_softmax, pool_scales=pool_scales)


class _AuxiliaryInEvaluation(DeepSup):
    """As published, the auxiliary head is also computed in evaluation without `use_softmax`."""

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        heads = super().logits(features, tile)
        if self.training or self.use_softmax:
            return heads
        return (*heads, self.auxiliary_logits(features))


class C1(_FromFcDim, c1.C1):
    """3x3 convolution to a quarter of the channels, then 1x1 to the classes."""


class C1DeepSup(_FromFcDim, _AuxiliaryInEvaluation, c1.C1DeepSup):
    """`C1` with an auxiliary head on the map before the last, which has fc_dim // 2 channels."""


class PPM(_FromFcDimWithPools, ppm.PPM):
    """Average pools of several sizes, concatenated with the feature map."""


class PPMDeepsup(_FromFcDimWithPools, _AuxiliaryInEvaluation, ppm.PPMDeepSup):
    """`PPM` with an auxiliary head on the map before the last, which has fc_dim // 2 channels."""


class UPerNet(_FromFcDim, upernet.UPerNet):
    """UPerNet on feature maps of `fpn_inplanes` channels."""

    def __init__(
        self,
        num_class: int = 150,
        fc_dim: int = 4096,
        use_softmax: bool = False,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        fpn_inplanes: Sequence[int] = (256, 512, 1024, 2048),
        fpn_dim: int = 256,
    ) -> None:
        self.fpn_dim = fpn_dim
        channels = (*fpn_inplanes[:-1], fc_dim)
        upernet.UPerNet.__init__(self, channels, num_class, pool_scales, use_softmax=use_softmax)
