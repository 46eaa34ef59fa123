"""DDRNet: its encoder and decoder."""

from __future__ import annotations

from pathlib import Path

import authors_outputs
import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from encoder_tester import EncoderTester
from pair_tester import PairTester, count

from mit_semseg.models import DECODERS
from mit_semseg.models.encoders.ddrnet import DAPPM


class TestDDRNetEncoder(EncoderTester):
    arch = "ddrnet_23_slim"


class TestDDRNet(DecoderTester):
    arch = "ddrnet_23_slim"
    min_feature_maps = 2
    auxiliary = True

    def test_another_number_of_classes_leaves_out_what_depends_on_it(self) -> None:
        """Classifiers have the authors' names."""
        names = {
            f"{head}.conv2.{part}"
            for head in ("seghead_extra", "final_layer")
            for part in ("weight", "bias")
        }
        assert set(self.build().class_tensors()) == names


class TestPair(PairTester):
    encoder = decoder = "ddrnet_23_slim"
    stride = 8
    square = 64  # at 32 BatchNorm has two values at stride 64


@pytest.mark.parametrize(
    "arch", ["ddrnet_23_slim", pytest.param("ddrnet_23", marks=pytest.mark.slow)]
)
def test_outputs_are_the_authors(arch: str, tmp_path: Path) -> None:
    authors_outputs.check(arch, tmp_path)


@pytest.mark.parametrize(("arch", "millions"), [("ddrnet_23_slim", 5.7), ("ddrnet_23", 20.1)])
def test_size_without_the_auxiliary_head(arch: str, millions: float) -> None:
    """Table V of the paper."""
    with torch.device("meta"):
        head = DECODERS.get(arch)((64, 128) if "slim" in arch else (128, 256), 19).seghead_extra
    auxiliary = sum(p.numel() for p in head.parameters())
    assert (count(arch, arch, 19) - auxiliary) / 1e6 == pytest.approx(millions, rel=0.005)


def test_loss_weights_are_the_published_ones() -> None:
    assert [head.weight for head in DECODERS.get("ddrnet_23").auxiliary] == [0.4]


@torch.no_grad()
def test_the_pyramid_adds_each_scale_to_what_came_of_the_finer_ones() -> None:
    torch.manual_seed(0)
    module = DAPPM(4, 3, 5).eval()
    x = torch.randn(1, 4, 11, 13)
    padded = F.pad(x, (8, 8, 8, 8))
    pools = [
        x,
        *(
            padded[..., 8 - s :, 8 - s :].unfold(2, 2 * s + 1, s).unfold(3, 2 * s + 1, s)
            for s in (2, 4, 8)
        ),
    ]
    sizes = [(-(-11 // s), -(-13 // s)) for s in (2, 4, 8)]
    means = [p.mean((4, 5))[..., :h, :w] for p, (h, w) in zip(pools[1:], sizes)]
    branches = [
        module.scale0,
        module.scale1[1:],
        module.scale2[1:],
        module.scale3[1:],
        module.scale4[1:],
    ]
    scales = [
        branch(y)
        for branch, y in zip(branches, [x, *means, x.mean((2, 3), keepdim=True)], strict=True)
    ]
    maps = [scales[0]]
    for i, scale in enumerate(scales[1:], 1):
        large = F.interpolate(scale, (11, 13), mode="bilinear", align_corners=False)
        maps.append(module.get_submodule(f"process{i}")(large + maps[-1]))
    wanted = module.compression(torch.cat(maps, 1)) + module.shortcut(x)
    torch.testing.assert_close(module(x), wanted)
