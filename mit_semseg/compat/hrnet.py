"""Published `models.hrnet`: HRNetV2-W48."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mit_semseg.compat.resnet import BasicBlock, BatchNorm2d, Bottleneck, conv3x3, load_url
from mit_semseg.compat.urls import initialized
from mit_semseg.models.encoders import hrnet, resnet
from mit_semseg.weights import imagenet_weights

__all__ = [
    "BN_MOMENTUM",
    "BasicBlock",
    "BatchNorm2d",
    "Bottleneck",
    "HRNetV2",
    "HighResolutionModule",
    "blocks_dict",
    "conv3x3",
    "hrnetv2",
    "load_url",
    "model_urls",
]

BN_MOMENTUM = 0.1  # torch's default; not used by the layers here
logger = logging.getLogger(__name__)
blocks_dict = {"BASIC": BasicBlock, "BOTTLENECK": Bottleneck}
model_urls = {"hrnetv2": imagenet_weights("hrnetv2").urls[0]}


class HighResolutionModule(hrnet.Exchange):
    """Residual blocks on every branch, followed by fusion: each branch gets the sum of all.

    Args:
        num_branches: number of branches, each at half the resolution of the one before.
        blocks: `BasicBlock` or `Bottleneck`.
        num_blocks: number of blocks of each branch.
        num_inchannels: input channels of each branch; as published, the list is changed in place
            to the output channels.
        num_channels: channels of each branch; outputs have `blocks.expansion` times as many.
        fuse_method: ignored, as published; branches are summed.
        multi_scale_output: False: output the first branch only.

    Raises:
        ValueError: the length of a list is not `num_branches`.
    """

    def __init__(
        self,
        num_branches: int,
        blocks: Any,
        num_blocks: Sequence[int],
        num_inchannels: list[int],
        num_channels: Sequence[int],
        fuse_method: str,
        multi_scale_output: bool = True,
    ) -> None:
        given = {
            "num_blocks": num_blocks,
            "num_channels": num_channels,
            "num_inchannels": num_inchannels,
        }
        for name, values in given.items():
            if len(values) != num_branches:
                raise ValueError(f"{name} is {list(values)}; num_branches is {num_branches}")
        widths = [width * blocks.expansion for width in num_channels]
        super().__init__(widths, depth=0)
        for branch, n_in, n_out, width, depth in zip(
            self.branches, num_inchannels, widths, num_channels, num_blocks, strict=True
        ):
            assert isinstance(branch, nn.Sequential)
            branch.append(blocks(n_in, width, 1, resnet.shortcut(n_in, n_out, 1)))
            branch.extend(blocks(n_out, width) for _ in range(depth - 1))
        if not multi_scale_output:
            self.fuse_layers = self.fuse_layers[:1]
        num_inchannels[:] = widths
        self.num_inchannels, self.num_branches = num_inchannels, num_branches
        self.fuse_method, self.multi_scale_output = fuse_method, multi_scale_output

    def get_num_inchannels(self) -> list[int]:
        """Output channels of each branch."""
        return self.num_inchannels

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """(B, num_inchannels[i], H / 2^i, W / 2^i) each -> the same with the new channels."""
        return super().forward(x)


class HRNetV2(hrnet.HRNetV2):
    """The encoder `hrnetv2`, which has no classifier.

    Args:
        n_class: ignored, as published.
        kwargs: ignored.
    """

    def __init__(self, n_class: int, **kwargs: Any) -> None:
        super().__init__()


def hrnetv2(pretrained: bool = False, **kwargs: Any) -> HRNetV2:
    """HRNetV2-W48; `pretrained` loads the published ImageNet weights, downloaded once."""
    return initialized(HRNetV2(n_class=1000, **kwargs), "hrnetv2", pretrained)
