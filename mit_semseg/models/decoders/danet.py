"""DANet: position attention and channel attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.models.attention import attend_maps
from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder, init_weights
from mit_semseg.models.layers import conv_bn_relu
from mit_semseg.models.pyramid import without_autocast


class PositionAttention(nn.Module):
    """Self-attention between pixels, added to the input with a learned factor, initially 0.

    Paper: Fu et al. 2019, arXiv:1809.02983, sec. 3.2, eq. 1 and 2; scores are not scaled.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = max(width // 8, 1)
        self.query = nn.Conv2d(width, narrow, 1)
        self.key = nn.Conv2d(width, narrow, 1, bias=False)
        self.value = nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * attend_maps(self.query(x), self.key(x), self.value(x))


class ChannelAttention(nn.Module):
    """Attention between channels, added to the input with a learned factor, initially 0.

    Paper: Fu et al. 2019, arXiv:1809.02983, sec. 3.3, eq. 3 and 4. As in the authors' code, scores
    are subtracted from their maximum, so dissimilar channels get larger weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        channels = x.flatten(2)  # (B, C, N)
        # Sums over all pixels overflow in float16.
        with without_autocast(x.device):
            wide = channels.to(torch.promote_types(x.dtype, torch.float32))
            mixed = (-(wide @ wide.transpose(1, 2))).softmax(dim=2) @ wide
        return x + self.gamma * mixed.to(x.dtype).unflatten(2, x.shape[2:])


@DECODERS.register("danet")
class DANet(Decoder):
    """The sum of position attention and channel attention, each on a quarter of the channels.

    Auxiliary heads: one after each attention, with weight 1, as in the authors' code.

    Memory is linear in the number of pixels (`models.attention`). If an image is computed in tiles
    (`models.tiles`), attention is computed within each tile.

    Paper: Fu et al. 2019, arXiv:1809.02983, sec. 3.1 and 3.4.

    Deviations:
        - Scores are resized with `align_corners=False`; the authors' code has True.
        - The encoders have no multi-grid; the paper adds it to the last stage, whose blocks the
          authors' code dilates by 4, 8 and 16.
        - The projection to keys has no bias, unlike in the authors' code: a bias would add the same
          value to all scores of a pixel, which the softmax cancels.
    """

    auxiliary = (Auxiliary(weight=1.0), Auxiliary(weight=1.0))

    def __init__(self, channels: Sequence[int], num_class: int = 150, **options: Any) -> None:
        super().__init__(channels, num_class, **options)
        width = max(channels[-1] // 4, 1)
        self.position = nn.Sequential(
            conv_bn_relu(channels[-1], width), PositionAttention(width), conv_bn_relu(width, width)
        )
        self.channel = nn.Sequential(
            conv_bn_relu(channels[-1], width), ChannelAttention(), conv_bn_relu(width, width)
        )
        self.dropout = nn.Dropout2d(0.1)
        self.conv_last = nn.Conv2d(width, num_class, 1)
        self.conv_last_position = nn.Conv2d(width, num_class, 1)
        self.conv_last_channel = nn.Conv2d(width, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        position, channel = self.position(features[-1]), self.channel(features[-1])
        main = self.conv_last(self.dropout(position + channel))
        if not self.training:
            return (main,)
        return (
            main,
            self.conv_last_position(self.dropout(position)),
            self.conv_last_channel(self.dropout(channel)),
        )
