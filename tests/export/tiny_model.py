"""A tiny network with the parts that exporters find hard, as a trained model."""

import importlib.util

import pytest
import torch
from torch import nn

from mit_semseg.config import Options
from mit_semseg.dataset import ClassTable
from mit_semseg.engine.pretrained import Pretrained
from mit_semseg.models import SegmentationModule
from mit_semseg.models.decoders.ppm import PPM
from mit_semseg.models.encoders.base import Encoder
from mit_semseg.models.layers import conv_bn_relu

NAMES = ("road", "sky", "tree", "car")


class Tiny(Encoder):
    """Maps at strides 2, 4 and 8."""

    channels = (8, 8, 16)
    strides = (2, 4, 8)

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            conv_bn_relu(n_in, n_out, stride=2) for n_in, n_out in ((3, 8), (8, 8), (8, 16))
        )

    def feature_maps(self, images):
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


def tiny_model(**data):
    """A model of four classes whose labels vary within an image."""
    torch.manual_seed(0)
    decoder = PPM(Tiny.channels, num_class=len(NAMES), width=8)
    module = SegmentationModule(Tiny(), decoder, None)
    options = Options.read(
        {
            "DATASET": {
                "num_class": len(NAMES),
                "imgSizes": (48, 64),
                "imgMaxSize": 200,
                "padding_constant": 8,
                **data,
            },
            "MODEL": {"weights_encoder": "none"},
        }
    )
    with torch.no_grad():
        images = torch.randn(4, 3, 48, 64)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0
        module.train().logits(images)
        std, mean = torch.std_mean(module.eval().logits(images), dim=(0, 2, 3))
        last = decoder.conv_last[-1]
        last.weight.div_(std[:, None, None, None])
        last.bias.copy_((last.bias - mean) / std)
    return Pretrained(module, ClassTable.of(NAMES), options)


def installed(form):
    """Skips a test unless a format can be written and run here."""
    for module in (*form.modules, *form.run_modules):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    try:
        form.check()
    except ValueError as error:
        pytest.skip(str(error))
