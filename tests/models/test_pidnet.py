"""PIDNet: its encoder and decoder."""

from __future__ import annotations

from pathlib import Path

import authors_outputs
import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from encoder_tester import EncoderTester
from pair_tester import PairTester, build_pair

from mit_semseg.losses import boundary
from mit_semseg.models import DECODERS, ENCODERS


class TestPIDNetEncoder(EncoderTester):
    arch = "pidnet_s"


class TestPIDNet(DecoderTester):
    arch = "pidnet_s"
    min_feature_maps = 3
    auxiliary = True

    def test_training_gives_log_probabilities_of_every_head(self) -> None:
        """Of the two that score classes; the others have losses of their own."""
        main, detail, edges, both = self.build().train()(self.features())
        for head in (main, detail):
            torch.testing.assert_close(head.exp().sum(1), torch.ones_like(head[:, 0]))
        assert edges.shape[1] == 1 and both.shape[1] == 1 + 5

    def test_another_number_of_classes_leaves_out_what_depends_on_it(self) -> None:
        """Classifiers have the authors' names."""
        names = {
            f"{head}.conv2.{part}"
            for head in ("seghead_p", "final_layer")
            for part in ("weight", "bias")
        }
        assert set(self.build().class_tensors()) == names


class TestPair(PairTester):
    encoder = decoder = "pidnet_s"
    stride = 8
    square = 64  # at 32 BatchNorm has two values at stride 64


@pytest.mark.parametrize(
    "arch", ["pidnet_s", pytest.param("pidnet_m", marks=pytest.mark.slow), "pidnet_l"]
)
def test_outputs_are_the_authors(arch: str, tmp_path: Path) -> None:
    authors_outputs.check(arch, tmp_path)


# The paper has 34.4 million for PIDNet-M, whose authors' code has the 28.5 that are here.
@pytest.mark.parametrize(
    ("arch", "millions"), [("pidnet_s", 7.6), ("pidnet_m", 28.5), ("pidnet_l", 36.9)]
)
def test_size_without_auxiliary_heads(arch: str, millions: float) -> None:
    """Table 5 of the paper."""
    with torch.device("meta"):
        encoder = ENCODERS.get(arch)()
        head = DECODERS.get(arch)(encoder.channels, 19).final_layer
    numbers = sum(p.numel() for part in (encoder, head) for p in part.parameters())
    assert numbers / 1e6 == pytest.approx(millions, rel=0.005)


def test_the_loss_is_the_sum_of_eq_10() -> None:
    module = build_pair("pidnet_s", "pidnet_s").train()
    torch.manual_seed(0)
    label = torch.randint(-1, 5, (2, 4, 6)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        module.decoder.seghead_d.conv2.bias.fill_(1.4)  # sure of many pixels, not of all
        loss, _ = module({"img_data": image, "seg_label": label})
        # Statistics of the batch: what is computed again is the same.
        heads = module.decoder.logits(module.encoder(image, return_feature_maps=True))
    main, detail, edges = (
        F.interpolate(x, (64, 96), mode="bilinear", align_corners=False) for x in heads[:3]
    )
    found = boundary.boundaries(label)
    sure = torch.where(edges[:, 0].sigmoid() > 0.8, label, -1)
    assert 0 < (sure >= 0).sum() < (label >= 0).sum()
    valid = label >= 0
    share = found.sum() / valid.sum()
    each = F.binary_cross_entropy_with_logits(edges[:, 0], found.float(), reduction="none")
    wanted = (
        F.cross_entropy(main, label, ignore_index=-1)
        + 0.4 * F.cross_entropy(detail, label, ignore_index=-1)
        + 20 * (each * torch.where(found, 1 - share, share))[valid].mean()
        + F.cross_entropy(main, sure, ignore_index=-1)
    )
    torch.testing.assert_close(loss, wanted)
