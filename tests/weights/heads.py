"""Small decoders with the names of real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mit_semseg.models import Decoder


class Head(Decoder):
    """The names of a C1 head."""

    def __init__(
        self, channels: Any = (5,), num_class: int = 4, strides: Any = None, width: int = 3
    ) -> None:
        super().__init__(channels, num_class, strides)
        self.cbr = nn.Sequential(nn.Conv2d(5, width, 3, bias=False), nn.BatchNorm2d(width))
        self.conv_last = nn.Conv2d(width, num_class, 1)
        self.conv_last_deepsup = nn.Conv2d(width, num_class, 1)


class Pyramid(Decoder):
    """The names of a PPM head: its classifier is the last of several layers."""

    def __init__(
        self, channels: Any = (5,), num_class: int = 4, strides: Any = None, width: int = 3
    ) -> None:
        super().__init__(channels, num_class, strides)
        self.conv_last = nn.Sequential(
            nn.Conv2d(5, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, num_class, 1),
        )


def values(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module: nn.Module, state: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    return all(torch.equal(v, state[k]) for k, v in module.state_dict().items() if k not in but)
