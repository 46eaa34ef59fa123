"""HRNetV2: parallel branches at strides 4 to 32 that are fused repeatedly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.encoders.base import ENCODERS, Encoder, init_weights
from mit_semseg.models.encoders.resnet import BasicBlock, Bottleneck
from mit_semseg.models.layers import conv_bn, conv_bn_relu, resize


class Exchange(nn.Module):
    """Residual blocks on every branch, followed by fusion: each branch gets the sum of all."""

    def __init__(self, widths: Sequence[int], depth: int = 4) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width, width) for _ in range(depth))) for width in widths
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._path(widths, source, target) for source in range(len(widths)))
            for target in range(len(widths))
        )
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _path(widths: Sequence[int], source: int, target: int) -> nn.Module:
        """Layers from branch `source` to the channels, and the stride if larger, of `target`."""
        if source == target:
            return nn.Identity()
        n_in, n_out = widths[source], widths[target]
        if source > target:
            return conv_bn(n_in, n_out, 1)
        halvings = target - source
        return nn.Sequential(
            *(conv_bn_relu(n_in, n_in, 3, 2) for _ in range(halvings - 1)),
            conv_bn(n_in, n_out, 3, 2),
        )

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        branches = [blocks(x) for blocks, x in zip(self.branches, branches, strict=True)]
        fused = []
        for target, paths in enumerate(self.fuse_layers):
            terms = [path(x) for path, x in zip(cast(nn.ModuleList, paths), branches, strict=True)]
            total = terms[0]
            for source, x in enumerate(terms[1:], start=1):
                total = total + (resize(x, branches[target].shape[2:]) if source > target else x)
            fused.append(self.relu(total))
        return fused


@ENCODERS.register("hrnetv2")
class HRNetV2(Encoder):
    """HRNetV2-W48: the finest branch has 48 channels, and each coarser one twice as many.

    One feature map: the four branches, resized to stride 4 and concatenated.

    Paper: Sun et al. 2019, arXiv:1904.04514; Wang et al. 2020, arXiv:1908.07919, sec. 3.

    Deviations:
        - The layers after the concatenated map belong to the decoder: c1 has a 3x3 convolution to a
          quarter of the channels there, the paper a 1x1 convolution that keeps all of them.
        - Branches are resized with `align_corners=False`, as in the authors' first code and the
          published MIT toolkit; their later code has True.
        - Weights are initialised with He's normal distribution; theirs have a standard deviation of
          0.001.
    """

    widths: ClassVar[tuple[int, ...]] = (48, 96, 192, 384)
    channels: tuple[int, ...] = (sum(widths),)
    strides = (4,)

    def __init__(self) -> None:
        super().__init__()
        widths = self.widths
        self.conv1 = nn.Conv2d(3, 64, 3, 2, padding=1, bias=False)
        self.bn1 = BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, 2, padding=1, bias=False)
        self.bn2 = BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Bottleneck(64, 64), *(Bottleneck(256, 64) for _ in range(3)))
        self.transition1 = self._transition((256,), widths[:2])
        self.stage2 = nn.Sequential(Exchange(widths[:2]))
        self.transition2 = self._transition(widths[:2], widths[:3])
        self.stage3 = nn.Sequential(*(Exchange(widths[:3]) for _ in range(4)))
        self.transition3 = self._transition(widths[:3], widths)
        self.stage4 = nn.Sequential(*(Exchange(widths) for _ in range(3)))
        init_weights(self)

    @staticmethod
    def _transition(before: Sequence[int], after: Sequence[int]) -> nn.ModuleList:
        """Layers to the channels of the next stage; its new branch reads the coarsest one."""
        paths: list[nn.Module] = []
        for i, width in enumerate(after):
            if i >= len(before):
                paths.append(nn.Sequential(conv_bn_relu(before[-1], width, 3, 2)))
            elif before[i] != width:
                paths.append(conv_bn_relu(before[i], width))
            else:
                paths.append(nn.Identity())
        return nn.ModuleList(paths)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        branches = [self.layer1(x)]
        for transition, stage in (
            (self.transition1, self.stage2),
            (self.transition2, self.stage3),
            (self.transition3, self.stage4),
        ):
            # The new branch starts from the coarsest one.
            sources = branches + branches[-1:]
            branches = stage([path(x) for path, x in zip(transition, sources, strict=True)])
        finest, *coarser = branches
        return [torch.cat([finest, *(resize(x, finest.shape[2:]) for x in coarser)], dim=1)]


@ENCODERS.register("hrnetv2_w32")
class HRNetV2W32(HRNetV2):
    """HRNetV2-W32: the finest branch has 32 channels."""

    widths = (32, 64, 128, 256)
    channels = (sum(widths),)


@ENCODERS.register("hrnetv2_w18")
class HRNetV2W18(HRNetV2):
    """HRNetV2-W18: the finest branch has 18 channels."""

    widths = (18, 36, 72, 144)
    channels = (sum(widths),)
