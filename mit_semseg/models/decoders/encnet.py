"""EncNet: channel attention computed from an encoding of the whole scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm1d
from mit_semseg.losses import functional
from mit_semseg.models.decoders.base import DECODERS, Auxiliary, Decoder, init_weights
from mit_semseg.models.decoders.deepsup import DeepSup
from mit_semseg.models.layers import conv_bn_relu
from mit_semseg.models.pyramid import without_autocast


class Encoding(nn.Module):
    """Residuals of all pixels to learned codewords, with soft assignment, summed over pixels.

    Paper: Zhang et al. 2018, arXiv:1803.08904, eq. 1; Zhang et al. 2017, arXiv:1612.02844, sec. 3.

    Args:
        n_in: number of channels D.
        codewords: number of codewords K.
    """

    def __init__(self, n_in: int, codewords: int) -> None:
        super().__init__()
        bound = (codewords * n_in) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codewords, n_in).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.empty(codewords).uniform_(-1, 0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, K, D), without storing the (H * W, K, D) residuals.

        Computed in at least float32; the result has the wider dtype of parameters and input.
        """
        with without_autocast(x.device):
            pixels = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)  # (B, D, N)
            codewords = self.codewords.to(pixels.dtype)
            distance = (
                pixels.square().sum(1, keepdim=True)
                - 2 * (codewords @ pixels)
                + codewords.square().sum(1)[:, None]
            )  # (B, K, N)
            weights = (self.scale.to(pixels.dtype)[:, None] * distance).softmax(dim=1)
            encoded = weights @ pixels.transpose(1, 2) - weights.sum(2, keepdim=True) * codewords
        return encoded.to(torch.promote_types(self.codewords.dtype, x.dtype))


class ContextEncoding(nn.Module):
    """One vector per image: the mean of its encoding over the codewords."""

    def __init__(self, width: int, codewords: int) -> None:
        super().__init__()
        self.project = conv_bn_relu(width, width, 1)
        self.encoding = Encoding(width, codewords)
        self.norm = SynchronizedBatchNorm1d(codewords)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, 1, 1)."""
        encoded = self.relu(self.norm(self.encoding(self.project(x))))
        return encoded.mean(1)[:, :, None, None]


class SceneAttention(Decoder):
    """Pixel scores with channel attention, and scores of the presence of each class."""

    def __init__(
        self,
        channels: Sequence[int],
        num_class: int = 150,
        width: int = 512,
        codewords: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(channels, num_class, **options)
        self.reduce = conv_bn_relu(channels[-1], width)
        self.context = ContextEncoding(width, codewords)
        self.attention = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_last = nn.Conv2d(width, num_class, 1)
        self.conv_last_presence = nn.Conv2d(width, num_class, 1)
        init_weights(self)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        x = self.reduce(features[-1])
        context = self.context(x)
        attended = (x + x * self.attention(context).sigmoid()).relu()
        main = self.conv_last(self.dropout(attended))
        if not self.training:
            return (main,)
        return main, self.conv_last_presence(context).flatten(1)


@DECODERS.register("encnet")
class EncNet(DeepSup, SceneAttention):
    """Channel attention from an encoding of the whole image, with semantic encoding loss.

    Auxiliary heads: semantic encoding loss on logits (B, num_class) of the presence of each class,
    with weight 0.2 as published; a convolutional head on the map before the last, as in PSPNet.

    If an image is computed in tiles (`models.tiles`), each tile has its own encoding.

    Paper: Zhang et al. 2018, arXiv:1803.08904, sec. 3; with 32 codewords.

    Deviations:
        - As in the authors' code, and not in the paper, a 1x1 convolution precedes the encoding,
          the residuals of the codewords are averaged and not summed, the map is added to its
          attended version, and the auxiliary head on the map before the last classifies pixels; the
          paper has a second encoding with its own presence loss there.
        - That head has the weight TRAIN.deep_sup_scale, 0.4 by default; in their code it is 0.2.
        - Scores are resized with `align_corners=False`; their code has True.
        - Dropout drops whole channels, as their code did when the paper was published; since 2020
          it drops single values.
        - An image without labelled pixels is left out of the presence loss; in their code it counts
          as one without any class.
        - The lateral connections, an option of their code, are not implemented.
    """

    quarter_of = -2
    dropout_kind = nn.Dropout2d
    auxiliary = (
        Auxiliary(weight=0.2, loss=functional.presence, denominator=functional.labelled_images),
        *DeepSup.auxiliary,
    )
