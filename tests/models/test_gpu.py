"""Every encoder and every decoder computes on a GPU what it computes on a CPU."""

import copy
import math

import pytest
import torch
from every_model import every_model
from pairs import Pair
from torch import nn

from mit_semseg.engine.predictor import Predictor
from mit_semseg.models import inference

# How much farther from float64 another float32 computation may be. Other kernels add in other
# orders, and Winograd's rounds more; TensorFloat-32, at 2 ** 13 times the rounding, is some
# hundred times as far or more.
SLACK = 16
# Max pooling whose places are kept: where two values are nearly the same the other may win.
MOVED = {"segnet": 0.02}


def image():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def tolerance(module, exact):
    """How far float32 scores may be from those in float64.

    A multiple of the distance of the CPU's, which tells how the network passes on errors, and at
    least of what so many layers round.
    """
    off = float((module.logits(image()).double() - exact).abs().max())
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    layers = sum(isinstance(layer, kinds) for layer in module.modules())
    eps = torch.finfo(torch.float32).eps
    return SLACK * max(off, math.sqrt(layers) * eps * float(exact.abs().max()))


@torch.no_grad()
def compare(encoder, decoder, device):
    """Errors of the scores on a device, (1, C, h, w), and the tolerance."""
    module = Pair(encoder, decoder).trained()
    exact = copy.deepcopy(module).double().logits(image().double())
    (given,) = Predictor(module, {}, device, precision="fp32").logits([image()])
    return (given.cpu().double() - exact).abs(), tolerance(module, exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("encoder", "decoder"), every_model())
def test_the_scores_are_those_of_the_cpu(encoder, decoder, monkeypatch):
    # The copy for prediction proves itself on images of its own: small ones are enough here.
    monkeypatch.setattr(inference, "_TRACE_SIZE", (32, 32))
    monkeypatch.setattr(inference, "_CHECK_SIZES", ((32, 32),))
    off, limit = compare(encoder, decoder, "cuda")
    assert float((off > limit).double().mean()) <= MOVED.get(decoder, 0.0)


@pytest.mark.gpu
def test_the_tolerance_separates_float32_from_reduced_precision():
    """On the CPU, with a network of the kind that errors grow in."""
    off, limit = compare("resnet18dilated", "ppm_deepsup", "cpu")
    assert off.max() <= limit
    rounded = Pair("resnet18dilated", "ppm_deepsup").trained()
    exact = copy.deepcopy(rounded).double().logits(image().double())
    for weight in rounded.parameters():
        weight.data = (weight.data.view(torch.int32) & ~0x1FFF).view(torch.float32)  # as in TF32
    with torch.no_grad():
        apart = (rounded.logits(image()).double() - exact).abs()
    assert float((apart > limit).double().mean()) > 0.5
