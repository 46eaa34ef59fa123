"""Decode heads of mmsegmentation, under its names of layers.

Maps are resized with `align_corners=False`, as its published configurations say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.models.layers import resize

State = Mapping[str, Tensor]
POOLS = (1, 2, 3, 6)
DILATIONS = (1, 12, 24, 36)


class ConvModule(nn.Module):
    """Convolution, BatchNorm, ReLU, with sides kept."""

    def __init__(
        self, n_in: int, n_out: int, kernel: int = 3, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            n_in, n_out, kernel, padding=padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(n_out)
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activate(self.bn(self.conv(x)))
        return y


class SeparableConvModule(nn.Module):
    """A depthwise ConvModule, then one of 1x1."""

    def __init__(self, n_in: int, n_out: int, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(n_in, n_in, 3, dilation, groups=n_in)
        self.pointwise_conv = ConvModule(n_in, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise_conv(self.depthwise_conv(x))
        return y


class Head(nn.Module):
    """Base class of heads: dropout, and the classifier `conv_seg`."""

    def __init__(self, num_class: int, width: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(width, num_class, 1)
        self.dropout = nn.Dropout2d(0.1)

    @staticmethod
    def sign(state: State, prefix: str) -> bool:
        """Whether the tensors under this prefix belong to such a head."""
        raise NotImplementedError

    @staticmethod
    def options(state: State, prefix: str) -> dict[str, Any]:
        """Its keyword arguments, from these tensors."""
        return {"width": state[f"{prefix}conv_seg.weight"].shape[1]}

    def classify(self, x: Tensor) -> Tensor:
        scores: Tensor = self.conv_seg(self.dropout(x))
        return scores


class FCNHead(Head):
    """Convolutions on the deepest map, joined with it before the last, if `concat`."""

    def __init__(
        self, channels: Sequence[int], num_class: int, width: int, convs: int, concat: bool
    ) -> None:
        super().__init__(num_class, width)
        inputs = (channels[-1], *[width] * (convs - 1))
        self.convs = nn.Sequential(*(ConvModule(n_in, width) for n_in in inputs))
        self.conv_cat = ConvModule(channels[-1] + width, width) if concat else None

    @staticmethod
    def sign(state: State, prefix: str) -> bool:
        return f"{prefix}convs.0.conv.weight" in state

    @staticmethod
    def options(state: State, prefix: str) -> dict[str, Any]:
        convs = {k.split(".")[2] for k in state if k.startswith(f"{prefix}convs.")}
        concat = f"{prefix}conv_cat.conv.weight" in state
        return {**Head.options(state, prefix), "convs": len(convs), "concat": concat}

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = maps[-1]
        y = self.convs(x)
        if self.conv_cat is not None:
            y = self.conv_cat(torch.cat([x, y], dim=1))
        return self.classify(y)


class PSPHead(Head):
    """Pyramid pooling: each pool has its convolution before it is resized."""

    def __init__(self, channels: Sequence[int], num_class: int, width: int) -> None:
        super().__init__(num_class, width)
        n_in = channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(n_in, width, 1))
            for scale in POOLS
        )
        self.bottleneck = ConvModule(n_in + len(POOLS) * width, width)

    @staticmethod
    def sign(state: State, prefix: str) -> bool:
        pools = f"{prefix}psp_modules.0.1.conv.weight" in state
        return pools and f"{prefix}fpn_bottleneck.conv.weight" not in state

    def pyramid(self, x: Tensor) -> Tensor:
        pools = [resize(module(x), x.shape[2:]) for module in self.psp_modules]
        y: Tensor = self.bottleneck(torch.cat([x, *pools], dim=1))
        return y

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(self.pyramid(maps[-1]))


class UPerHead(PSPHead):
    """Pyramid pooling on the deepest map, then a feature pyramid over all of them."""

    def __init__(self, channels: Sequence[int], num_class: int, width: int) -> None:
        super().__init__(channels, num_class, width)
        self.lateral_convs = nn.ModuleList(ConvModule(n, width, 1) for n in channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(width, width) for _ in channels[:-1])
        self.fpn_bottleneck = ConvModule(len(channels) * width, width)

    @staticmethod
    def sign(state: State, prefix: str) -> bool:
        return f"{prefix}fpn_bottleneck.conv.weight" in state

    def forward(self, maps: list[Tensor]) -> Tensor:
        top = self.pyramid(maps[-1])
        levels = [top]
        sides = zip(maps[:-1], self.lateral_convs, self.fpn_convs)
        for x, lateral, smooth in reversed(list(sides)):
            side = lateral(x)
            top = side + resize(top, side.shape[2:])
            levels.insert(0, smooth(top))
        joined = [levels[0], *(resize(x, levels[0].shape[2:]) for x in levels[1:])]
        return self.classify(self.fpn_bottleneck(torch.cat(joined, dim=1)))


class ASPPHead(Head):
    """Dilated convolutions side by side, beside the mean of the whole map."""

    def __init__(self, channels: Sequence[int], num_class: int, width: int) -> None:
        super().__init__(num_class, width)
        n_in = channels[-1]
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvModule(n_in, width, 1))
        self.aspp_modules = nn.ModuleList(
            ConvModule(n_in, width, 1 if dilation == 1 else 3, dilation) for dilation in DILATIONS
        )
        self.bottleneck: nn.Module = ConvModule((len(DILATIONS) + 1) * width, width)

    @staticmethod
    def sign(state: State, prefix: str) -> bool:
        aspp = f"{prefix}aspp_modules.0.conv.weight" in state
        return aspp and f"{prefix}sep_bottleneck.0.depthwise_conv.conv.weight" not in state

    def context(self, x: Tensor) -> Tensor:
        whole = self.image_pool(x).expand(-1, -1, *x.shape[2:])
        parts = [module(x) for module in self.aspp_modules]
        y: Tensor = self.bottleneck(torch.cat([whole, *parts], dim=1))
        return y

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(self.context(maps[-1]))


class SeparableASPPHead(ASPPHead):
    """The same with separable convolutions, then joined with the finest map."""

    def __init__(
        self,
        channels: Sequence[int],
        num_class: int,
        width: int,
        low: int,
        separable_bottleneck: bool,
    ) -> None:
        super().__init__(channels, num_class, width)
        for i, dilation in enumerate(DILATIONS):
            if dilation > 1:
                self.aspp_modules[i] = SeparableConvModule(channels[-1], width, dilation)
        if separable_bottleneck:  # in the library's first versions
            self.bottleneck = SeparableConvModule((len(DILATIONS) + 1) * width, width)
        self.c1_bottleneck = ConvModule(channels[0], low, 1)
        self.sep_bottleneck = nn.Sequential(
            SeparableConvModule(width + low, width), SeparableConvModule(width, width)
        )

    @staticmethod
    def sign(state: State, prefix: str) -> bool:
        return f"{prefix}sep_bottleneck.0.depthwise_conv.conv.weight" in state

    @staticmethod
    def options(state: State, prefix: str) -> dict[str, Any]:
        return {
            **Head.options(state, prefix),
            "low": state[f"{prefix}c1_bottleneck.conv.weight"].shape[0],
            "separable_bottleneck": f"{prefix}bottleneck.depthwise_conv.conv.weight" in state,
        }

    def forward(self, maps: list[Tensor]) -> Tensor:
        fine = self.c1_bottleneck(maps[0])
        coarse = resize(self.context(maps[-1]), fine.shape[2:])
        return self.classify(self.sep_bottleneck(torch.cat([coarse, fine], dim=1)))


class SegformerHead(Head):
    """A 1x1 convolution of each map, resized to the finest, and one of all of them."""

    def __init__(self, channels: Sequence[int], num_class: int, width: int) -> None:
        super().__init__(num_class, width)
        self.convs = nn.ModuleList(ConvModule(n_in, width, 1) for n_in in channels)
        self.fusion_conv = ConvModule(len(channels) * width, width, 1)

    @staticmethod
    def sign(state: State, prefix: str) -> bool:
        return f"{prefix}fusion_conv.conv.weight" in state

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = [resize(conv(x), maps[0].shape[2:]) for conv, x in zip(self.convs, maps)]
        return self.classify(self.fusion_conv(torch.cat(levels, dim=1)))


HEADS: dict[str, Any] = {
    "segformer": SegformerHead,
    "uper": UPerHead,
    "psp": PSPHead,
    "sep_aspp": SeparableASPPHead,
    "aspp": ASPPHead,
    "fcn": FCNHead,
}
