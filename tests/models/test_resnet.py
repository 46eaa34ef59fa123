"""ResNet encoders."""

import pytest
import torch
from encoder_tester import EncoderTester

from mit_semseg.models import ENCODERS
from mit_semseg.models.encoders.mobilenetv3 import MobileNetV3Large
from mit_semseg.weights import imagenet_weights


class TestResNet18(EncoderTester):
    arch = "resnet18"
    published = "encoder/resnet18"


class TestResNet18Dilated(EncoderTester):
    arch = "resnet18dilated"
    published = "encoder/resnet18dilated"


class TestResNet18Dilated16(EncoderTester):
    arch = "resnet18_dilated16"
    published = "encoder/resnet18dilated"


class TestResNet50Dilated(EncoderTester):
    arch = "resnet50dilated"
    published = "encoder/resnet50dilated"


class TestResNet101Dilated(EncoderTester):
    arch = "resnet101dilated"
    published = "encoder/resnet101dilated"


class TestResNet34(EncoderTester):
    arch = "resnet34"


# Parameters of table 1 of the paper, as torchvision counts them, without the 1000 classes.
@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("torchvision_resnet18", 11_689_512 - 513_000),
        ("resnet34", 21_797_672 - 513_000),
        ("torchvision_resnet50", 25_557_032 - 2_049_000),
        ("torchvision_resnet101", 44_549_160 - 2_049_000),
        ("resnet152", 60_192_808 - 2_049_000),
        ("resnext50", 25_028_904 - 2_049_000),
    ],
)
def test_the_papers_stem_gives_the_papers_size(arch: str, parameters: int) -> None:
    for name in (arch, f"{arch}dilated", f"{arch}_dilated8", f"{arch}_dilated16"):
        with torch.device("meta"):
            encoder = ENCODERS.get(name)()
        assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert ENCODERS.get(arch).strides == (4, 8, 16, 32)


@pytest.mark.parametrize(
    ("arch", "layer3", "layer4"),
    [
        ("resnet50", [(2, 1), (1, 1), (1, 1)], [(2, 1), (1, 1), (1, 1)]),
        ("resnet50_dilated16", [(2, 1), (1, 1), (1, 1)], [(1, 1), (1, 2), (1, 2)]),
        ("resnet50_dilated8", [(1, 1), (1, 2), (1, 2)], [(1, 2), (1, 4), (1, 4)]),
        ("resnet152_dilated8", [(1, 1), (1, 2), (1, 2)], [(1, 2), (1, 4), (1, 4)]),
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


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "mobilenetv2"),
        *("resnext50", "resnext101", "torchvision_resnet50", "torchvision_resnet101"),
        *("densenet121", "densenet161", "densenet169", "densenet201"),
    ],
)
def test_a_name_says_the_output_stride(name: str) -> None:
    forms = ("", "_dilated16", "dilated", "_dilated8")
    plain, _, dilated8, older = found = [ENCODERS.get(name + form) for form in forms]
    assert dilated8 is older
    assert [form.strides[-1] for form in found] == [32, 16, 8, 8]
    assert {form.channels for form in found} == {plain.channels}
    assert {imagenet_weights(name + form) for form in forms} == {imagenet_weights(name)}


def test_another_output_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="output_stride is 8; .* takes one of 32, 16"):
        MobileNetV3Large(output_stride=8)
