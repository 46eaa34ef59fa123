"""Decoders in forms that are faster in prediction on the CPU; parameters and results are the same.

A GPU is faster with one large convolution, as the decoders are written.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from mit_semseg.models.decoders.base import Decoder
from mit_semseg.models.decoders.deepsup import DeepSup
from mit_semseg.models.decoders.ppm import PPM
from mit_semseg.models.decoders.upernet import UPerNet
from mit_semseg.models.pyramid import Tile, convolve_pyramid


class FastPPM(PPM):
    """PPM whose pools are convolved before they are resized."""

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        x = features[-1]
        join, *layers = self.conv_last
        y = convolve_pyramid(cast(nn.Conv2d, join), x, self.pyramid(x, tile), tile)
        for layer in layers:
            y = layer(y)
        return (y,)


class FastUPerNet(UPerNet):
    """UPerNet whose coarser levels are convolved before they are resized."""

    def logits(self, features: list[Tensor], tile: Tile | None = None) -> tuple[Tensor, ...]:
        finest, *coarser = self.levels(features, tile)
        fuse, classify = self.conv_last
        join, norm, relu = cast(nn.Sequential, fuse)
        return (classify(relu(norm(convolve_pyramid(cast(nn.Conv2d, join), finest, coarser)))),)


def fast_decoder(decoder: Decoder) -> Decoder:
    """The main head of a decoder in its faster form, or the decoder where there is none.

    Args:
        decoder: in evaluation mode; left as it is.

    Returns:
        A decoder that shares its layers and has no auxiliary heads.
    """
    for plain, fast in ((PPM, FastPPM), (UPerNet, FastUPerNet)):
        if isinstance(decoder, plain) and _computes_as(decoder, plain):
            form = Decoder.__new__(fast)
            form.__dict__.update(decoder.__dict__)
            return form
    return decoder


def _computes_as(decoder: nn.Module, plain: type[Decoder]) -> bool:
    """Whether the main head is that of a class: nothing below it but an auxiliary head has
    `logits` of its own."""
    kinds = type(decoder).__mro__
    below = [kind for kind in kinds[: kinds.index(plain)] if "logits" in vars(kind)]
    return all(issubclass(kind, DeepSup) and not issubclass(kind, plain) for kind in below)
