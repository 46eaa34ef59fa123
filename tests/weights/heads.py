"""Small decoders with the names of real ones."""

import torch
from torch import nn

from mit_semseg.models import Decoder


class Head(Decoder):
    """The names of a C1 head."""

    def __init__(self, channels=(5,), num_class=4, strides=None, width=3):
        super().__init__(channels, num_class, strides)
        self.cbr = nn.Sequential(nn.Conv2d(5, width, 3, bias=False), nn.BatchNorm2d(width))
        self.conv_last = nn.Conv2d(width, num_class, 1)
        self.conv_last_deepsup = nn.Conv2d(width, num_class, 1)


class Pyramid(Decoder):
    """The names of a PPM head: its classifier is the last of several layers."""

    def __init__(self, channels=(5,), num_class=4, strides=None, width=3):
        super().__init__(channels, num_class, strides)
        self.conv_last = nn.Sequential(
            nn.Conv2d(5, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, num_class, 1),
        )


def values(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module, state, but=()):
    return all(torch.equal(v, state[k]) for k, v in module.state_dict().items() if k not in but)
