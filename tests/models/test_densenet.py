"""DenseNet encoders."""

from __future__ import annotations

import pytest
import torch
import torchvision
from encoder_tester import EncoderTester
from tolerances import rounding
from torch import nn

from mit_semseg.models import ENCODERS


class TestDenseNet121(EncoderTester):
    arch = "densenet121"


class TestDenseNet121Dilated(EncoderTester):
    arch = "densenet121dilated"


# torchvision's counts (of table 1 of the paper, with 1000 classes) without the classifiers.
COUNTS = {
    "densenet121": 7_978_856 - 1025 * 1000,
    "densenet161": 28_681_000 - 2209 * 1000,
    "densenet169": 14_149_480 - 1665 * 1000,
    "densenet201": 20_013_928 - 1921 * 1000,
}


@pytest.mark.parametrize(
    "name", ["densenet121", *(pytest.param(n, marks=pytest.mark.slow) for n in list(COUNTS)[1:])]
)
def test_all_forms_have_torchvisions_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    wanted = {k: v.shape for k, v in theirs.items() if not k.startswith("classifier")}
    for suffix, strides in (
        ("", (4, 8, 16, 32)),
        ("_dilated16", (4, 8, 16, 16)),
        ("dilated", (4, 8, 8, 8)),
    ):
        with torch.device("meta"):
            encoder = ENCODERS.get(name + suffix)()
            maps = encoder(torch.zeros(1, 3, 160, 96), return_feature_maps=True)
        assert {k: v.shape for k, v in encoder.state_dict().items()} == wanted
        assert sum(p.numel() for p in encoder.parameters()) == COUNTS[name]
        assert encoder.strides == strides
        shapes = [tuple(x.shape[1:]) for x in maps]
        assert shapes == [(c, 160 // s, 96 // s) for c, s in zip(encoder.channels, strides)]


@pytest.mark.parametrize("training", [False, True])
def test_the_plain_form_is_torchvisions(training: bool) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.densenet121(weights=None)
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.running_var.uniform_(0.5, 2)
    ours = ENCODERS.get("densenet121")()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier")}
    ours.load_state_dict(weights)
    emitted = []
    for i in (1, 2, 3):
        relu = theirs.features.get_submodule(f"transition{i}.relu")
        relu.register_forward_hook(lambda module, args, output: emitted.append(output))
    image = torch.randn(2, 3, 64, 96)
    emitted.append(theirs.train(training).features(image).relu())
    maps = ours.train(training)(image, return_feature_maps=True)
    for given, wanted in zip(maps, emitted, strict=True):
        torch.testing.assert_close(given, wanted, rtol=0, atol=rounding(wanted, 121))
    maps[-1].square().mean().backward()
    emitted[-1].square().mean().backward()
    torch.testing.assert_close(ours.features.conv0.weight.grad, theirs.features.conv0.weight.grad)


@pytest.mark.parametrize(
    ("arch", "dilations"),
    [
        ("densenet121", [1, 1, 1, 1]),
        ("densenet121_dilated16", [1, 1, 1, 2]),
        ("densenet121_dilated8", [1, 1, 2, 4]),
    ],
)
def test_strides_become_dilations(arch: str, dilations: list[int]) -> None:
    with torch.device("meta"):
        features = ENCODERS.get(arch)().features
    for i, dilation in enumerate(dilations, start=1):
        for layer in features.get_submodule(f"denseblock{i}"):
            assert layer.conv2.dilation == layer.conv2.padding == (dilation, dilation)
            assert layer.conv1.dilation == (1, 1)
