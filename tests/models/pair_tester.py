"""What an encoder and a decoder must do together; a test class subclasses this and names them."""

from __future__ import annotations

import math

import pytest
import torch
from encoder_tester import unmoved
from torch import Tensor, nn

from mit_semseg.losses import build_loss
from mit_semseg.models import ModelBuilder, SegmentationModule, inference
from mit_semseg.models.activation_checkpointing import checkpoint_activations

CLASSES = 5


def scene(side: int = 32) -> tuple[Tensor, Tensor]:
    """An image in two rows of three squares of four colours with a little noise, and its label.

    Squares of 32 are what the scores of the largest stride can tell apart.
    """
    label = torch.tensor([[0, 1, 2], [3, 0, 1]])
    label = label.repeat_interleave(side, 0).repeat_interleave(side, 1)
    colours = torch.tensor([[1.0, -1, 0], [-1, 1, 0.5], [0, 0.5, -1], [1, 1, 1]])
    image = colours[label].permute(2, 0, 1)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + 0.1 * noise)[None], label[None]


def build_pair(encoder: str, decoder: str, classes: int = CLASSES) -> SegmentationModule:
    torch.manual_seed(0)
    enc = ModelBuilder.build_encoder(encoder, weights="none")
    dec = ModelBuilder.build_decoder(
        decoder, num_class=classes, channels=enc.channels, strides=enc.strides
    )
    asks = any(head.weight is None for head in dec.auxiliary)
    crit = build_loss("nll", classes)
    return SegmentationModule(enc, dec, crit, deep_sup_scale=0.4 if asks else None)


def count(encoder: str, decoder: str, classes: int) -> int:
    """Parameters of a pair; in float32 four bytes each."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_pair(encoder, decoder, classes).parameters())


class PairTester:
    """Set `encoder` and `decoder`, `stride` of the scores, `quanta` that sides are filled up to.

    Attributes:
        rate, steps: of Adam, with which the pair learns one image by heart.
        right: share of its pixels that must be right then.
        folds: whether prediction makes BatchNorms part of convolutions.
        rounding: how far scores may be off on average, in standard deviations, in bfloat16 and
            float16.
        odd: the image that must train every parameter; larger where it leaves too few pixels.
        square: side of the squares of the image that it learns; likewise.
    """

    encoder: str
    decoder: str
    stride: int = 1
    quanta: int = 1
    rate: float = 1e-3
    steps: int = 150
    right: float = 0.98
    folds: bool = True
    rounding: tuple[float, float] = (0.15, 0.03)
    odd: tuple[int, int] = (49, 65)
    square: int = 32

    def build(self) -> SegmentationModule:
        return build_pair(self.encoder, self.decoder)

    def begun(self) -> SegmentationModule:
        """With attention whose share is not 0, where it begins and nothing reaches its layers."""
        module = self.build()
        for name, parameter in module.named_parameters():
            if name.endswith("gamma"):
                nn.init.constant_(parameter, 0.5)
        return module

    @torch.no_grad()
    def trained(self) -> SegmentationModule:
        """In evaluation, with BatchNorms that know what they normalise, as after training."""
        module = self.begun().train()
        norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        for layer in norms:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.momentum = 1.0
        module.logits(torch.randn(2, 3, 64, 96))
        return module.eval()

    @torch.no_grad()
    def test_scores_any_size(self) -> None:
        with torch.device("meta"):  # shapes without arithmetic
            module = self.build()
        for batch, *size in ((2, 64, 96), (1, 67, 97), (1, 96, 40)):
            filled = [math.ceil(n / self.quanta) * self.quanta for n in size]
            wanted = (batch, CLASSES, *(math.ceil(n / self.stride) for n in filled))
            for mode in (True, False):
                images = torch.zeros(batch, 3, *size, device="meta")
                assert module.train(mode).logits(images).shape == wanted

    def test_one_odd_image_trains_every_parameter_also_recomputed(self) -> None:
        generator = torch.Generator().manual_seed(2)
        batch = {
            "img_data": torch.randn(1, 3, *self.odd, generator=generator),
            "seg_label": torch.randint(-1, CLASSES, (1, 33, 47), generator=generator),
        }
        batch["seg_label"][:, 16:] = 0  # not every pixel is at a boundary
        plain, again = self.begun(), self.begun()
        assert checkpoint_activations(again.encoder)
        losses = []
        for module in (plain, again):
            torch.manual_seed(1)  # of dropout
            loss, accuracy = module.train()(batch)
            loss.backward()
            losses.append(loss.item())
            assert 0 <= accuracy <= 1
        assert unmoved(plain) == []
        assert math.isfinite(losses[0]) and losses[0] == losses[1]
        for mine, its in zip(plain.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(again.state_dict(), plain.state_dict(), rtol=0, atol=0)

    @torch.no_grad()
    def test_the_copy_for_prediction_gives_the_same(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What the copy proves to itself is proved here: the smallest image is enough for that.
        monkeypatch.setattr(inference, "_WIRING", (32, 32))
        monkeypatch.setattr(inference, "_PROOF", ((32, 32),))
        module = self.trained().double()
        fast = inference.inference_copy(module, "cpu")
        assert "not folded" not in caplog.text
        image = torch.randn(1, 3, 32, 64, dtype=torch.float64)
        expected = module.logits(image)
        torch.testing.assert_close(fast.logits(image), expected, rtol=0, atol=1e-9)
        norms = [sum(isinstance(x, nn.BatchNorm2d) for x in m.modules()) for m in (module, fast)]
        assert (norms[1] < norms[0]) == self.folds

    @torch.no_grad()
    def test_half_precision_rounds_and_does_not_overflow(self) -> None:
        module = self.trained()
        image = torch.randn(1, 3, 32, 32)  # convolutions in float16 are slow on a CPU

        def log_probabilities() -> Tensor:
            return module.decoder.log_probabilities(module.features(image), (40, 30))[0]

        expected = log_probabilities()
        for dtype, limit in zip((torch.bfloat16, torch.float16), self.rounding, strict=True):
            with torch.autocast("cpu", dtype=dtype):
                given = log_probabilities()
            assert given.dtype == torch.float32
            torch.testing.assert_close(given.exp().sum(1), torch.ones(1, 40, 30))
            assert (given - expected).abs().mean() / expected.std() < limit
        # With weights of that type, as in prediction.
        fast = inference.inference_copy(module, "cpu", dtype=torch.bfloat16)
        cast = fast.decoder.log_probabilities(fast.features(image), (40, 30))[0]
        assert (cast - expected).abs().mean() / expected.std() < self.rounding[0]

    @pytest.mark.slow
    def test_learns_one_image_by_heart(self) -> None:
        module = self.build()
        image, label = scene(self.square)
        optimizer = torch.optim.Adam(module.parameters(), lr=self.rate)
        reached = []
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            loss, _ = module.train()({"img_data": image, "seg_label": label})
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                with torch.no_grad():
                    predicted = module.eval()({"img_data": image}, segSize=label.shape[1:]).argmax(
                        1
                    )
                reached.append((predicted == label).double().mean().item())
                if reached[-1] >= self.right:
                    return
        raise AssertionError(f"of the pixels were right, after every ten steps: {reached}")
