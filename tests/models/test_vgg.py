"""VGG16 encoders."""

import pytest
import torch
import torch.nn.functional as F
from encoder_tester import EncoderTester
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from mit_semseg.models import ENCODERS, Encoder
from mit_semseg.weights import load_into


class TestVGG16(EncoderTester):
    arch = "vgg16"


class TestVGG16BN(EncoderTester):
    arch = "vgg16_bn"


class TestVGG16BNIndices(EncoderTester):
    arch = "vgg16_bn_indices"


def twins(arch: str) -> tuple[Encoder, nn.Sequential]:
    """Ours, and torchvision's layers with the same weights."""
    torch.manual_seed(0)
    theirs = make_layers(cfgs["D"], batch_norm=arch != "vgg16")
    for layer in theirs:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    ours = ENCODERS.get(arch)()
    ours.features.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("arch", ["vgg16", "vgg16_bn", "vgg16_bn_indices"])
@torch.no_grad()
def test_computes_what_torchvision_does(arch: str) -> None:
    ours, theirs = twins(arch)
    x = torch.randn(2, 3, 64, 96)
    for mode in (True, False):
        maps = ours.train(mode)(x, return_feature_maps=True)
        pooled, y = [], x
        for layer in theirs.train(mode):
            before, y = y, layer(y)
            if isinstance(layer, nn.MaxPool2d):
                pooled.append((y, before))
        torch.testing.assert_close(maps[-1], pooled[-1][0])
        for given, (wanted, before) in zip(maps, pooled):
            if arch == "vgg16_bn_indices":
                assert given.dtype == torch.int64
                given = before.flatten(2).gather(2, given.flatten(2)).view_as(given)
            torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("arch", ["vgg16", "vgg16_bn", "vgg16_bn_indices"])
def test_takes_weights_under_torchvisions_names(arch: str) -> None:
    ours, theirs = twins(arch)
    state = {f"features.{key}": value for key, value in theirs.state_dict().items()}
    report = load_into(ours, {**state, "classifier.0.bias": torch.zeros(9)}, what="encoder")
    assert report.ok and report.unexpected == ["classifier.0.bias"]
    assert {k for k in ours.state_dict() if "num_batches" not in k} <= set(report.matched)


@torch.no_grad()
def test_indices_of_an_odd_image_point_at_the_maxima() -> None:
    ours, theirs = twins("vgg16_bn_indices")
    x = torch.randn(1, 3, 45, 71)
    *indices, last = ours.eval()(x, return_feature_maps=True)
    y, found = F.pad(x, (0, 1, 0, 1)), iter(indices)
    for layer in theirs.eval():
        if isinstance(layer, nn.MaxPool2d):
            plane, index = y, next(found)
            y = F.max_pool2d(plane, 2, ceil_mode=True)
            torch.testing.assert_close(plane.flatten(2).gather(2, index.flatten(2)), y.flatten(2))
        else:
            y = layer(y)
    torch.testing.assert_close(last, y)
    # Each plane but the first has the shape of the indices before.
    assert [tuple(i.shape[2:]) for i in indices] == [(23, 36), (12, 18), (6, 9), (3, 5), (2, 3)]
