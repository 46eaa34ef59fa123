"""ResNet encoders."""

import pytest
import torch
from encoder_tester import EncoderTester

from mit_semseg.models import ENCODERS


class TestResNet18(EncoderTester):
    arch = "resnet18"
    published = "encoder/resnet18"


class TestResNet18Dilated(EncoderTester):
    arch = "resnet18dilated"
    published = "encoder/resnet18dilated"


class TestResNet18Dilated16(EncoderTester):
    arch = "resnet18_dilated16"
    published = "encoder/resnet18dilated"


class TestResNet50(EncoderTester):
    arch = "resnet50"
    published = "encoder/resnet50"


class TestResNet50Dilated(EncoderTester):
    arch = "resnet50dilated"
    published = "encoder/resnet50dilated"


class TestResNet101(EncoderTester):
    arch = "resnet101"
    published = "encoder/resnet101"


class TestResNet101Dilated(EncoderTester):
    arch = "resnet101dilated"
    published = "encoder/resnet101dilated"


@pytest.mark.parametrize(
    ("arch", "layer3", "layer4"),
    [
        ("resnet50", [(2, 1), (1, 1), (1, 1)], [(2, 1), (1, 1), (1, 1)]),
        ("resnet50_dilated16", [(2, 1), (1, 1), (1, 1)], [(1, 1), (1, 2), (1, 2)]),
        ("resnet50_dilated8", [(1, 1), (1, 2), (1, 2)], [(1, 2), (1, 4), (1, 4)]),
    ],
)
def test_strides_become_dilations(
    arch: str, layer3: list[tuple[int, int]], layer4: list[tuple[int, int]]
) -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get(arch)()
    for stage, wanted in ((encoder.layer3, layer3), (encoder.layer4, layer4)):
        convs = [block.conv2 for block in stage[:3]]
        assert [(conv.stride[0], conv.dilation[0]) for conv in convs] == wanted
        assert all(conv.padding == conv.dilation for conv in convs)
        assert stage[0].downsample[0].stride == convs[0].stride


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "resnext101", "mobilenetv2"])
def test_older_names_mean_the_same(name: str) -> None:
    assert ENCODERS.get(f"{name}dilated") is ENCODERS.get(f"{name}_dilated8")
    assert ENCODERS.get(f"{name}_dilated16").strides[-1] == 16
