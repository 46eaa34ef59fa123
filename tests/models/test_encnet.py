"""The EncNet decoder: its encoding, and what its loss is given."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from decoder_tester import DecoderTester
from pair_tester import PairTester
from torch import nn

from mit_semseg.losses import functional
from mit_semseg.models import SegmentationModule
from mit_semseg.models.decoders.encnet import Encoding


class TestEncNet(DecoderTester):
    arch = "encnet"
    min_feature_maps = 2
    auxiliary = True

    def test_training_gives_log_probabilities_of_every_head(self) -> None:
        """Of the heads that score pixels; the second gives one logit for each class."""
        main, presence, pixels = self.build().train()(self.features())
        for head in (main, pixels):
            assert head.shape[:2] == (2, 5)
            assert torch.allclose(head.exp().sum(1), torch.ones(()), atol=1e-5)
        assert presence.shape == (2, 5)
        assert not torch.allclose(presence.exp().sum(1), torch.ones(()), atol=1e-2)


class TestPair(PairTester):
    encoder, decoder = "resnet18dilated", "encnet"
    stride = 8


def test_encoding_is_the_plain_sum_over_pixels() -> None:
    torch.manual_seed(0)
    layer = Encoding(6, 4).double()
    torch.nn.init.normal_(layer.codewords)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    wanted = torch.zeros(2, 4, 6, dtype=torch.float64)
    for b in range(2):
        for i in range(3):
            for j in range(5):
                residuals = [x[b, :, i, j] - codeword for codeword in layer.codewords]
                scores = [s * (r @ r) for s, r in zip(layer.scale, residuals, strict=True)]
                shares = torch.stack(scores).softmax(0)
                for k in range(4):
                    wanted[b, k] = wanted[b, k] + shares[k] * residuals[k]
    given = layer(x)
    torch.testing.assert_close(given, wanted)
    sources = (x, layer.codewords, layer.scale)
    direction = torch.randn_like(wanted)
    ours = torch.autograd.grad(given, sources, direction)
    theirs = torch.autograd.grad(wanted, sources, direction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_classes_in_the_label_are_learned_with_weight_0_2() -> None:
    module: SegmentationModule = TestPair().build().train()
    # Without dropout both forward passes are the same.
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout2d):
            layer.p = 0.0
    label = torch.tensor([0, 1, 3, -1])[torch.arange(64).view(1, 8, 8) % 4]
    image = torch.randn(1, 3, 64, 64)
    other = copy.deepcopy(module)
    loss, _ = module({"img_data": image, "seg_label": label})
    main, presence, pixels = other.decoder.log_probabilities(other.encoder(image, True), (8, 8))
    occurs = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0]])
    wanted = (
        F.nll_loss(main, label, ignore_index=-1)
        + 0.4 * F.nll_loss(pixels, label, ignore_index=-1)
        + 0.2 * F.binary_cross_entropy(presence.sigmoid(), occurs)
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_works_in_any_type(dtype: torch.dtype) -> None:
    tester = TestEncNet()
    features = [x.to(dtype) for x in tester.features()]
    (logits,) = tester.build().to(dtype).eval().logits(features)
    assert logits.dtype == dtype and logits.isfinite().all()


# ------------------------------------------------------------------------------- presence loss
def test_presence_by_hand() -> None:
    # Image 0 holds classes 0 and 2, image 1 class 1: p = 0.8 or 0.2 for each class.
    label = torch.tensor([[[0, 2, -1]], [[1, 1, 1]]])
    p = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.8, 0.8]], dtype=torch.float64)
    right, wrong = -torch.tensor(0.8).log().item(), -torch.tensor(0.2).log().item()
    loss = functional.presence(torch.logit(p), label)
    assert loss.item() == pytest.approx((4 * right + 2 * wrong) / 6)


def test_presence_of_ignored_images_takes_no_part() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 5, (3, 2, 2))
    label[1] = -1
    loss = functional.presence(scores, label)
    loss.backward()
    assert torch.equal(scores.grad[1], torch.zeros(5, dtype=torch.float64))
    kept = functional.presence(scores[::2], label[::2])
    assert loss.item() == pytest.approx(kept.item())
    nothing = functional.presence(scores, torch.full_like(label, -1))
    assert nothing.item() == 0
    nothing.backward()


def test_presence_has_the_right_gradient() -> None:
    scores = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    label = torch.randint(-1, 4, (2, 3, 3))
    assert torch.autograd.gradcheck(lambda x: functional.presence(x, label), scores)


def test_presence_refuses_scores_of_pixels() -> None:
    with pytest.raises(ValueError, match=r"scores is \(2, 4, 3, 3\).*expected \(B, C\)"):
        functional.presence(torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long))


@torch.no_grad()
def test_the_scene_weighs_channels() -> None:
    """x + x * sigmoid(what attention says), then ReLU: with 0 and a large number known by hand."""
    decoder = TestEncNet().build().eval()
    features = TestEncNet().features()
    decoder.conv_last_presence = None  # only the main head is asked for
    nn.init.zeros_(decoder.attention.weight)
    nn.init.zeros_(decoder.attention.bias)
    decoder.attention.bias[0] = 50.0
    factor = torch.full((decoder.attention.out_channels, 1, 1), 1.5)
    factor[0] = 2.0
    x = decoder.reduce(features[-1])
    wanted = decoder.conv_last((factor * x).relu())
    torch.testing.assert_close(decoder.logits(features)[0], wanted)


@torch.no_grad()
def test_attention_follows_the_image() -> None:
    decoder = TestEncNet().build().eval()
    x = decoder.reduce(TestEncNet().features()[-1])
    weights = decoder.attention(decoder.context(x)).sigmoid()
    wanted = decoder.conv_last((x + x * weights).relu())
    torch.testing.assert_close(decoder.logits(TestEncNet().features())[0], wanted)
    assert (weights[0] - weights[1]).abs().max() > 1e-3
