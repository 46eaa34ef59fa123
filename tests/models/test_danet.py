"""The DANet decoder and its two attentions."""

from __future__ import annotations

import pytest
import torch
from decoder_tester import DecoderTester
from pair_tester import PairTester
from torch import nn

from mit_semseg.models import Decoder, attention
from mit_semseg.models.decoders.danet import ChannelAttention, PositionAttention


class TestDANet(DecoderTester):
    arch = "danet"
    auxiliary = True

    def build(self, **options: object) -> Decoder:
        decoder = super().build(**options)
        # At 0, where they begin, nothing reaches the projections.
        for name, parameter in decoder.named_parameters():
            if name.endswith("gamma"):
                nn.init.constant_(parameter, 0.5)
        return decoder


def test_attention_begins_with_nothing() -> None:
    x = torch.randn(2, 16, 4, 5)
    for layer in (PositionAttention(16), ChannelAttention()):
        assert torch.equal(layer(x), x)


class TestPair(PairTester):
    encoder, decoder = "resnet18dilated", "danet"
    stride = 8


@torch.no_grad()
def test_position_attention_by_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BAND_CPU", 60)  # several bands
    torch.manual_seed(0)
    layer = PositionAttention(16).double()
    layer.gamma.fill_(0.3)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    q, k, v = (conv(x).flatten(2) for conv in (layer.query, layer.key, layer.value))
    wanted = x.flatten(2).clone()
    for b in range(2):
        for j in range(20):  # eq. 1 and 2: s_ji, and E_j
            weights = torch.stack([(q[b, :, j] @ k[b, :, i]).exp() for i in range(20)])
            wanted[b, :, j] += 0.3 * (v[b] @ (weights / weights.sum()))
    torch.testing.assert_close(layer(x).flatten(2), wanted)


@torch.no_grad()
def test_channel_attention_by_the_formula() -> None:
    torch.manual_seed(0)
    layer = ChannelAttention().double()
    layer.gamma.fill_(0.3)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    flat = x.flatten(2)
    wanted = flat.clone()
    for b in range(2):
        scores = flat[b] @ flat[b].T
        for j in range(6):
            weights = (scores[j].max() - scores[j]).exp()
            wanted[b, j] += 0.3 * (weights / weights.sum()) @ flat[b]
    torch.testing.assert_close(layer(x).flatten(2), wanted)
