"""The simple feature pyramid of a plain vision transformer."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mit_semseg.models.layers import ChannelNorm


class SimplePyramid(nn.Module):
    """Maps of several strides from one map: two to four octaves around it.

    Paper: Li et al. 2022, "ViTDet", arXiv:2203.16527, sec. 3 and appendix A.2: transposed 2x2
    convolutions above the map, max pooling below it, then a 1x1 and a 3x3 convolution to 256
    channels, with LayerNorm after each.

    Deviations:
        - A map whose stride is no multiple of 4, as of patches of 14 pixels, has one octave above
          it, not two: strides are whole numbers.
    """

    WIDTH: ClassVar[int] = 256

    @staticmethod
    def strides(stride: int) -> list[int]:
        """Strides of the maps that are made of one of this stride; finest first."""
        octaves = (4, 2) if stride % 4 == 0 else (2,) if stride % 2 == 0 else ()
        return [*(stride // octave for octave in octaves), stride, 2 * stride]

    def __init__(self, n_in: int, width: int, count: int) -> None:
        """Build it.

        Args:
            n_in: channels of the map.
            width: channels of what is made of it.
            count: maps that are made: `len(strides(stride))`.
        """
        super().__init__()
        half, quarter = n_in // 2, n_in // 4
        finer: list[tuple[list[nn.Module], int]] = [
            (
                [
                    nn.ConvTranspose2d(n_in, half, 2, 2),
                    ChannelNorm(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ],
                quarter,
            ),
            ([nn.ConvTranspose2d(n_in, half, 2, 2)], half),
            ([], n_in),
            ([nn.MaxPool2d(2)], n_in),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *resized,
                nn.Conv2d(channels, width, 1, bias=False),
                ChannelNorm(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                ChannelNorm(width),
            )
            for resized, channels in finer[-count:]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, n_in, h, w) -> (B, width, h * stride / s, w * stride / s) for each stride s."""
        return [level(x) for level in self.levels]
