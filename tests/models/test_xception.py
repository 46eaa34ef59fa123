"""The Xception65 encoder."""

import pytest
import torch
import torch.nn.functional as F
from encoder_tester import EncoderTester
from pair_tester import PairTester
from torch import nn

from mit_semseg.models import ENCODERS
from mit_semseg.models.encoders.xception import Separable


class TestXception65(EncoderTester):
    arch = "xception65"


class TestXception65WithC1(PairTester):
    encoder, decoder = "xception65", "c1"
    stride = 16


def separable(n_in: int, *widths: int) -> int:
    """Parameters of separable convolutions, each followed by two BatchNorms."""
    total = 0
    for n_out in widths:
        total += 9 * n_in + 2 * n_in + n_in * n_out + 2 * n_out
        n_in = n_out
    return total


def shortcut(n_in: int, n_out: int) -> int:
    return n_in * n_out + 2 * n_out


def test_size_by_the_table_of_the_paper() -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get("xception65")()
    entry = 27 * 32 + 64 + 9 * 32 * 64 + 128
    entry += separable(64, 128, 128, 128) + shortcut(64, 128)
    entry += separable(128, 256, 256, 256) + shortcut(128, 256)
    entry += separable(256, 728, 728, 728) + shortcut(256, 728)
    leave = separable(728, 728, 1024, 1024) + shortcut(728, 1024)
    leave += separable(1024, 1536, 1536, 2048)
    wanted = entry + 16 * separable(728, 728, 728, 728) + leave
    # timm 1.0 has as many in xception65 without its head.
    assert sum(p.numel() for p in encoder.parameters()) == wanted == 37_867_312


def test_layers_and_dilation() -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get("xception65")()
    convs = {k: m for k, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    layers = [k for k in convs if not k.endswith("depthwise") and "shortcut" not in k]
    assert len(layers) == 65  # a separable convolution is one, as in Xception's 36
    dilated = {k for k, conv in convs.items() if conv.dilation == (2, 2)}
    assert dilated == {f"last.{i}.depthwise" for i in range(3)}
    strided = [k for k, conv in convs.items() if conv.stride == (2, 2) and "shortcut" not in k]
    assert strided == ["conv1", *(f"entry{i}.convs.2.depthwise" for i in (1, 2, 3))]


def test_a_block_does_not_change_its_input() -> None:
    torch.manual_seed(0)
    block = ENCODERS.get("xception65")().middle[0]
    x = torch.randn(1, 728, 3, 4)
    before = x.clone()
    with torch.no_grad():
        y = block.eval()(x)
        residual = block.convs(before.clone())
    assert torch.equal(x, before)
    torch.testing.assert_close(y, before + residual)


@pytest.mark.parametrize("relu_first", [True, False])
@torch.no_grad()
def test_where_the_relus_are(relu_first: bool) -> None:
    torch.manual_seed(0)
    layer = Separable(4, 6, dilation=2, relu_first=relu_first).eval()
    x = torch.randn(1, 4, 9, 9)

    def normalised(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + 1e-3) ** 0.5  # statistics and weights as they begin

    inner = x.relu() if relu_first else x
    inner = F.conv2d(inner, layer.depthwise.weight, padding=2, dilation=2, groups=4)
    inner = normalised(inner) if relu_first else normalised(inner).relu()
    wanted = normalised(F.conv2d(inner, layer.pointwise.weight))
    torch.testing.assert_close(layer(x), wanted if relu_first else wanted.relu())


def test_only_the_last_three_have_their_relus_behind() -> None:
    with torch.device("meta"):
        encoder = ENCODERS.get("xception65")()
    found = [m for m in encoder.modules() if isinstance(m, Separable)]
    behind = [isinstance(m.relu_pointwise, nn.ReLU) for m in found]
    assert behind == [False] * (len(found) - 3) + [True] * 3
    assert behind == [isinstance(m.relu_first, nn.Identity) for m in found]
