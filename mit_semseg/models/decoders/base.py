"""Base class of decoders: feature maps -> logits, and the published calling convention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models.layers import resize
from mit_semseg.models.pyramid import Tile, pooled
from mit_semseg.registry import Registry

DECODERS: Registry[type[Decoder]] = Registry("decoder", "docs/models.md")


def reduce(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), not larger: means over areas that cover all pixels.

    In contrast, `resize` reads four pixels for each output, and the others get no gradient.
    """
    (h, w), (H, W) = x.shape[2:], size
    if h % H == w % W == 0:
        return F.avg_pool2d(x, (h // H, w // W))
    return F.interpolate(x, size=(H, W), mode="area")


def crop(x: Tensor, sides: tuple[int, int] | None) -> Tensor:
    """(N, C, h, w) -> (N, C, min(h, H), min(w, W)) with sides (H, W); None: unchanged."""
    return x if sides is None else x[..., : sides[0], : sides[1]]


@dataclass(frozen=True)
class Auxiliary:
    """An auxiliary head, used in training only.

    Attributes:
        weight: weight of its loss; None: TRAIN.deep_sup_scale.
        loss: `loss(logits, label (B, h, w) int64, -1 ignored)` -> scalar, for a head that does not
            score pixels; None: the configured loss, with its scores resized to the label.
        denominator: `denominator(label)` -> scalar, what the mean in `loss` is divided by, from
            which the weights of replicas and ranks are computed; None: as for the configured loss.
            If `loss` returns several means, (n,), it returns their denominators, (n,).
    """

    weight: float | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    denominator: Callable[[Tensor], Tensor] | None = None


class Decoder(nn.Module):
    """Computes class scores from the feature maps of an encoder.

    A subclass passes the arguments below to this class, builds its layers, and implements
    `logits`.

    Attributes:
        min_feature_maps: least number of feature maps that it can be built for.
        supported_encoders: names of the encoders it works with; empty: all with enough maps.
        auxiliary: its auxiliary heads, in the order in which `logits` returns their scores.
        trains_scores: whether the configured loss is computed for the main head; if not, only the
            losses of `auxiliary` are.
        pool_scales: output sizes of its adaptive average pools of the deepest map (see `pools`).
            Tiles of an image get the pools of the whole image: if set, `logits` has a second
            argument, `tile` (see `models.pyramid.Tile`).

    Deviations:
        - Bilinear interpolation does not align the corners (`align_corners=False`), as in the
          published MIT toolkit: a pixel of a map covers the same area whatever the size of the
          image, which multi-scale prediction and tiles rely on. Models whose authors align them are
          listed.
        - BatchNorm has torch's defaults, momentum 0.1 and eps 1e-5, unless stated otherwise. The
          published MIT toolkit has momentum 0.001.
        - Weights are initialised by `init_weights` as in the published MIT toolkit: He's normal
          distribution by fan-in, and 1e-4 as the bias of BatchNorm.
    """

    min_feature_maps: ClassVar[int] = 1
    supported_encoders: ClassVar[tuple[str, ...]] = ()
    trains_scores: ClassVar[bool] = True
    auxiliary: ClassVar[tuple[Auxiliary, ...]] = ()
    pool_scales: tuple[int, ...] = ()

    def __init__(
        self,
        channels: Sequence[int],
        num_class: int = 150,
        strides: Sequence[int] | None = None,
        use_softmax: bool = False,
    ) -> None:
        """Initialise the decoder.

        Args:
            channels: channels of each feature map, deepest last.
            num_class: number of classes.
            strides: strides of the feature maps, for decoders that depend on them.
            use_softmax: `forward` returns probabilities (inference) instead of log-probabilities
                (training).
        """
        super().__init__()
        self.channels = tuple(channels)
        self.num_class = num_class
        self.strides = None if strides is None else tuple(strides)
        self.use_softmax = use_softmax

    def class_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> axes of the tensors whose shape depends on the number of classes.

        All other tensors can be loaded from a checkpoint with another number of classes. To find
        them, two decoders whose number of classes differs by one are built on the meta device.
        """
        states = []
        for num_class in (self.num_class, self.num_class + 1):
            with torch.device("meta"):
                states.append(self.with_classes(num_class).state_dict())
        few, more = states
        axes = {
            name: tuple(i for i, side in enumerate(few[name].shape) if side != value.shape[i])
            for name, value in more.items()
        }
        return {name: found for name, found in axes.items() if found}

    def with_classes(self, num_class: int) -> Decoder:
        """A new decoder of this class for another number of classes."""
        return type(self)(self.channels, num_class=num_class, strides=self.strides)

    def encoder_layers(self) -> list[nn.Module]:
        """Layers pretrained with the encoder, which learn at its rate, in order of depth."""
        return []

    def set_progress(self, share: float) -> None:
        """Learn how much of the training is done, from 0 to 1, before each step."""

    def pools(self, x: Tensor, tile: Tile | None) -> list[Tensor]:
        """Adaptive average pools at `pool_scales`, (B, C, s, s) each, of the whole image's map; x,
        (B, C, h, w), is that map, or the part of it at `tile`."""
        return pooled(x, self.pool_scales, tile)

    def logits(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """Scores of the main head, followed in training by those of the `auxiliary` heads.

        Args:
            features: (B, channels[i], h_i, w_i), deepest last.

        Returns:
            Tuple of (B, num_class, h, w); for a head with its own `loss`, the input of that.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement logits")

    def probabilities(
        self,
        features: list[Tensor],
        size: tuple[int, int] | None = None,
        image: tuple[int, int] | None = None,
    ) -> Tensor:
        """Class probabilities of the main head, (B, num_class, *size), in at least float32.

        Logits are resized before the softmax, as published. Before that they are cropped to
        `image`, the (H, W) of the input, which they can exceed as strides round sizes up.
        """
        return self._scores(crop(self.logits(features)[0], image), size).softmax(dim=1)

    def log_probabilities(
        self,
        features: list[Tensor],
        size: tuple[int, int] | None = None,
        image: tuple[int, int] | None = None,
    ) -> tuple[Tensor, ...]:
        """Log-probabilities of every head, (B, num_class, *size) each, in at least float32.

        In training, scores that are finer than the label are averaged over areas, so that all of
        them get a gradient. The scores of heads with their own `loss` are returned unchanged.
        `image` is as in `probabilities`.
        """
        main, *others = self.logits(features)
        areas = self.training
        heads = [self._scores(crop(main, image), size, areas).log_softmax(dim=1)]
        for head, scores in zip(self.auxiliary, others):
            if head.loss:
                heads.append(self._scores(scores, None))
            else:
                heads.append(self._scores(crop(scores, image), size, areas).log_softmax(dim=1))
        return tuple(heads)

    def forward(
        self, conv_out: list[Tensor], segSize: tuple[int, int] | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The published calling convention.

        Args:
            conv_out: feature maps, deepest last.
            segSize: (H, W) that the scores are resized to; None: the network's resolution.

        Returns:
            With `use_softmax`: probabilities (B, num_class, H, W). Otherwise log-probabilities:
            a tensor, or in training with auxiliary heads the tuple (main, *auxiliary).
        """
        if self.use_softmax:
            return self.probabilities(conv_out, segSize)
        heads = self.log_probabilities(conv_out, segSize)
        return heads if len(heads) > 1 else heads[0]

    @staticmethod
    def _scores(logits: Tensor, size: tuple[int, int] | None, areas: bool = False) -> Tensor:
        # Under autocast logits are in half precision, too coarse for a sum over classes.
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if size is not None and tuple(logits.shape[-2:]) != tuple(size):
            finer = logits.shape[-2] >= size[0] and logits.shape[-1] >= size[1]
            logits = reduce(logits, size) if areas and finer else resize(logits, size)
        return logits


def init_weights(decoder: nn.Module) -> None:
    """Kaiming normal for convolutions, also transposed; BatchNorm gets weight 1 and bias 1e-4.

    Paper: He et al. 2015, arXiv:1502.01852, sec. 2.2.
    """
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.ConvTranspose2d):
            # Each output pixel is the sum of k^2 / stride^2 taps of a k x k kernel.
            taps = math.prod(module.kernel_size) / math.prod(module.stride)
            nn.init.normal_(module.weight, std=(2 / (module.in_channels * taps)) ** 0.5)
        elif isinstance(module, BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.constant_(module.bias, 1e-4)
