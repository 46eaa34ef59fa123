"""The DeepLabv3+ decoder."""

from __future__ import annotations

import pytest
import torch
from decoder_tester import DecoderTester
from pair_tester import PairTester, count
from torch import nn

from mit_semseg.models import DECODERS, ENCODERS
from mit_semseg.models.decoders.deeplabv3plus import low_level


class TestDeepLabV3Plus(DecoderTester):
    arch = "deeplabv3plus"
    min_feature_maps = 2


class TestDeepLabV3PlusWithResNet18(PairTester):
    encoder, decoder = "resnet18_dilated16", "deeplabv3plus"
    stride = 4


# The sizes that are known of it, for 11 to 21 classes, in float32.
@pytest.mark.parametrize(("arch", "mib"), [("resnet50dilated", 154), ("resnet101dilated", 226)])
@pytest.mark.parametrize("num_class", [11, 21])
def test_size(arch: str, mib: float, num_class: int) -> None:
    given = count(arch, "deeplabv3plus", num_class) * 4 / 2**20
    assert given == pytest.approx(mib, rel=0.05)


@pytest.mark.parametrize(
    ("strides", "index"),
    [(None, 0), ((4, 8, 8, 8), 0), ((2, 4, 8, 16, 32), 1), ((8, 16), 0), ((1, 2, 4), 1)],
)
def test_the_low_level_is_that_of_stride_4(strides: tuple[int, ...] | None, index: int) -> None:
    assert low_level(strides) == index
    if strides:
        channels = tuple(range(5, 5 + len(strides)))
        with torch.device("meta"):
            decoder = DECODERS.get("deeplabv3plus")(channels, num_class=3, strides=strides)
            maps = [torch.zeros(1, c, 96 // s, 64 // s) for c, s in zip(channels, strides)]
            (logits,) = decoder.eval().logits(maps)
        assert decoder.low[0].in_channels == channels[index]
        assert logits.shape == (1, 3, 96 // strides[index], 64 // strides[index])


def test_xceptions_low_level_is_read_before_the_stride() -> None:
    encoder = ENCODERS.get("xception65")
    assert encoder.channels[low_level(encoder.strides)] == 256


@pytest.mark.parametrize(("name", "rate"), [("deeplabv3plus", 0.1), ("deeplabv3", 0.5)])
def test_aspp_drops_what_its_model_drops(name: str, rate: float) -> None:
    """0.1 in the authors' code; 0.5 in torchvision, whose weights `deeplabv3` takes."""
    with torch.device("meta"):
        decoder = DECODERS.get(name)((8, 16), num_class=3)
    assert [m.p for m in decoder.modules() if isinstance(m, nn.Dropout)] == [rate]
