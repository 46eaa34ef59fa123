"""DRN-C-26: a dilated residual network with layers that remove gridding artifacts."""

from __future__ import annotations

from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, collect_outputs, init_weights
from mit_semseg.models.encoders.resnet import BasicBlock

# Channels, blocks, stride of the first block, dilation, residual: figure 5, DRN-C-26.
LEVELS = (
    (16, 1, 1, 1, True),
    (32, 1, 2, 1, True),
    (64, 2, 2, 1, True),
    (128, 2, 2, 1, True),
    (256, 2, 1, 2, True),
    (512, 2, 1, 4, True),
    (512, 1, 1, 2, False),
    (512, 1, 1, 1, False),
)


class DilatedBlock(BasicBlock):
    """Two 3x3 convolutions with the same dilation; the residual connection is optional."""

    def __init__(
        self, n_in: int, width: int, stride: int = 1, dilation: int = 1, residual: bool = True
    ) -> None:
        super().__init__(n_in, width, stride)
        self.residual = residual
        for conv in (self.conv1, self.conv2):
            conv.dilation = conv.padding = (dilation, dilation)

    def forward(self, x: Tensor) -> Tensor:
        if self.residual:
            return super().forward(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


@ENCODERS.register("drn_c_26")
class DRNC26(Encoder):
    """DRN-C-26 at output stride 8.

    The last two levels have less dilation and no residual connections, which removes gridding
    artifacts. There is no pooling layer. Feature maps: levels 3, 4, 5 and 8.

    Paper: Yu et al. 2017, arXiv:1705.09914, sec. 4 and fig. 5. State dict names are those of the
    published weights.

    Deviations:
        - In a level whose stride is replaced by dilation, both convolutions of the first block have
          the new dilation, as the published weights require; not so in the paper.
        - The paper classifies the last level with a 1x1 convolution; decoder c1 has a 3x3
          convolution before it, of 2.25 MiB.
        - The authors' code upsamples the scores by a transposed convolution with fixed bilinear
          weights; here they are resized, which differs only at the image border.
    """

    channels = (64, 128, 256, 512)
    strides = (4, 8, 8, 8)
    out_indices = (2, 3, 4, 7)  # of the feature maps, in `LEVELS`

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, padding=3, bias=False)
        self.bn1 = BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        n_in = 16
        for level, (width, depth, stride, dilation, residual) in enumerate(LEVELS, start=1):
            blocks = [DilatedBlock(n_in, width, stride, dilation, residual)]
            blocks += [DilatedBlock(width, width, 1, dilation, residual) for _ in range(depth - 1)]
            self.add_module(f"layer{level}", nn.Sequential(*blocks))
            n_in = width
        init_weights(self)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        levels = [self.get_submodule(f"layer{level + 1}") for level in range(len(LEVELS))]
        return collect_outputs(levels, self.relu(self.bn1(self.conv1(images))), self.out_indices)
