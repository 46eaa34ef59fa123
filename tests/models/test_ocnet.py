"""The OCNet decoders and their attention within blocks."""

from __future__ import annotations

import pytest
import torch
from decoder_tester import DecoderTester
from pair_tester import PairTester

from mit_semseg.models import DECODERS
from mit_semseg.models.decoders.ocnet import BaseContext, ObjectContext


class TestOCNetBase(DecoderTester):
    arch = "ocnet_base"
    min_feature_maps = 2
    auxiliary = True


class TestOCNetPyramid(TestOCNetBase):
    arch = "ocnet_pyramid"

    def features(self, batch: int = 2) -> list[torch.Tensor]:
        """Larger than in the tester: a pixel alone in its block has nothing to choose from."""
        torch.manual_seed(1)
        return [torch.randn(batch, c, 13, 14) for c in self.channels]


class TestOCNetASP(TestOCNetBase):
    arch = "ocnet_asp"


class TestBasePair(PairTester):
    encoder, decoder = "resnet18dilated", "ocnet_base"
    stride = 8


@pytest.mark.slow
class TestPyramidPair(PairTester):
    encoder, decoder = "resnet18dilated", "ocnet_pyramid"
    stride = 8


@pytest.mark.slow
class TestASPPair(PairTester):
    encoder, decoder = "resnet18dilated", "ocnet_asp"
    stride = 8


def test_ocnet_is_the_base_form() -> None:
    assert DECODERS.get("ocnet") is DECODERS.get("ocnet_base")


@pytest.mark.parametrize(("grid", "height", "width"), [(1, 4, 5), (3, 7, 8), (6, 4, 9)])
@torch.no_grad()
def test_pixels_attend_to_their_block(grid: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    layer = ObjectContext(8, 6, 4, grid).double().eval()
    x = torch.randn(2, 8, height, width, dtype=torch.float64)
    key, value = layer.key(x), layer.value(x)
    block = [
        [sum(y >= j * n // grid for j in range(1, grid)) for y in range(n)] for n in (height, width)
    ]
    wanted = torch.zeros_like(value)
    pixels = [(y, x) for y in range(height) for x in range(width)]
    for y0, x0 in pixels:
        mine = [
            p for p in pixels if (block[0][p[0]], block[1][p[1]]) == (block[0][y0], block[1][x0])
        ]
        for b in range(2):
            scores = torch.stack([key[b, :, y0, x0] @ key[b, :, i, j] for i, j in mine])
            weights = (scores / 2).softmax(0)  # 2: root of the width
            wanted[b, :, y0, x0] = sum(w * value[b, :, i, j] for w, (i, j) in zip(weights, mine))
    torch.testing.assert_close(layer(x), layer.project(wanted))


def test_base_context_is_as_large_as_others_count_it() -> None:
    """10.5 M of 2048 channels: Huang et al. 2019, arXiv:1907.12273, table 1 (self-attention)."""
    with torch.device("meta"):
        context = BaseContext(2048, 512)
    assert sum(p.numel() for p in context.parameters()) / 1e6 == pytest.approx(10.5, rel=0.02)


def test_grids_and_dilations_are_the_papers() -> None:
    with torch.device("meta"):
        pyramid = DECODERS.get("ocnet_pyramid")((8, 16), 5).context
        atrous = DECODERS.get("ocnet_asp")((8, 16), 5).context
    assert [attention.grid for attention in pyramid.attention] == [1, 2, 3, 6]
    found = [branch[0] for branch in atrous.atrous]
    assert [conv.kernel_size for conv in found] == [(3, 3)] * 3
    assert [conv.dilation for conv in found] == [(12, 12), (24, 24), (36, 36)]
    assert [conv.padding for conv in found] == [(12, 12), (24, 24), (36, 36)]


@pytest.mark.parametrize(("form", "rate"), [("base", 0.05), ("pyramid", 0.05), ("asp", 0.1)])
def test_both_heads_drop_what_the_authors_drop(form: str, rate: float) -> None:
    with torch.device("meta"):
        decoder = DECODERS.get(f"ocnet_{form}")((8, 16), 5)
    dropped = [m.p for m in decoder.modules() if isinstance(m, torch.nn.Dropout2d)]
    assert dropped == [rate, rate]
