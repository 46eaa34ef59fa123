"""What an encoder and a decoder must do together; a test class subclasses this and names them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from mit_semseg.losses import build_loss
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.inference import inference_copy
from mit_semseg.models.recompute import recompute

CLASSES = 5


def regions() -> tuple[Tensor, Tensor]:
    """An image of 64x96 in six squares of four colours with a little noise, and its label."""
    label = torch.tensor([[0, 1, 2], [3, 0, 1]]).repeat_interleave(32, 0).repeat_interleave(32, 1)
    colours = torch.tensor([[1.0, -1, 0], [-1, 1, 0.5], [0, 0.5, -1], [1, 1, 1]])
    image = colours[label].permute(2, 0, 1)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    return (image + 0.1 * noise)[None], label[None]


class PairTester:
    """Set `encoder` and `decoder`, `stride` of the scores, `quanta` that sides are filled up to.

    `steps` and `rate` are of Adam, with which the pair learns one image by heart.
    """

    encoder: str
    decoder: str
    stride: int = 1
    quanta: int = 1
    steps: int = 60
    rate: float = 1e-3

    def build(self, classes: int = CLASSES) -> SegmentationModule:
        torch.manual_seed(0)
        encoder = ModelBuilder.build_encoder(self.encoder, weights="none")
        decoder = ModelBuilder.build_decoder(
            self.decoder, num_class=classes, channels=encoder.channels, strides=encoder.strides
        )
        return SegmentationModule(encoder, decoder, build_loss("nll", classes))

    def on_meta(self, classes: int = CLASSES) -> SegmentationModule:
        with torch.device("meta"):
            return self.build(classes)

    def mebibytes(self, classes: int) -> float:
        return sum(p.numel() * p.element_size() for p in self.on_meta(classes).parameters()) / 2**20

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("size", [(64, 96), (67, 97), (96, 40)])
    def test_scores_any_size(self, batch: int, size: tuple[int, int]) -> None:
        images = torch.zeros(batch, 3, *size, device="meta")
        sides = [math.ceil(math.ceil(n / self.quanta) * self.quanta / self.stride) for n in size]
        for mode in (True, False):
            assert self.on_meta().train(mode).logits(images).shape == (batch, CLASSES, *sides)

    def test_one_odd_image_trains_every_parameter(self) -> None:
        module = self.build().train()
        label = torch.randint(-1, CLASSES, (1, 66, 97))
        loss, accuracy = module({"img_data": torch.randn(1, 3, 66, 97), "seg_label": label})
        loss.backward()
        assert 0 <= accuracy <= 1
        still = [
            n
            for n, p in module.named_parameters()
            if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
        ]
        assert still == []

    @torch.no_grad()
    def test_the_copy_for_prediction_gives_the_same(self) -> None:
        module = self.build()
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 2)
        module.eval()
        image = torch.randn(1, 3, 64, 96)
        expected = module.logits(image)
        fast = inference_copy(module, "cpu").logits(image)
        # Where two maxima were as good as equal, folding may move one: pooling indices jump.
        apart = (fast - expected).abs() / expected.std()
        assert (apart < 1e-4).float().mean() > 0.999
        assert (fast.argmax(1) == expected.argmax(1)).float().mean() > 0.999
        assert torch.equal(module.logits(image), expected)

    def test_half_precision(self) -> None:
        module = self.build().eval()
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            p = module({"img_data": image}, segSize=(50, 70))
        assert p.dtype == torch.float32 and p.shape == (1, CLASSES, 50, 70)
        torch.testing.assert_close(p.sum(1), torch.ones(1, 50, 70))

    def test_recomputation_gives_the_same(self) -> None:
        module = self.build()
        other = copy.deepcopy(module)
        assert recompute(other.encoder)
        image, label = regions()
        results = []
        for net in (module, other):
            torch.manual_seed(1)  # of dropout
            loss, _ = net.train()({"img_data": image, "seg_label": label})
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in net.encoder.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
        assert list(other.state_dict()) == list(module.state_dict())

    @pytest.mark.slow
    def test_learns_one_image_by_heart(self) -> None:
        module = self.build()
        image, label = regions()
        optimizer = torch.optim.Adam(module.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, self.steps)
        module.train()
        for _ in range(self.steps):
            optimizer.zero_grad()
            loss, _ = module({"img_data": image, "seg_label": label})
            loss.backward()
            optimizer.step()
            schedule.step()
        module.eval()
        right = module.predict(image, (64, 96)) == label
        assert right.float().mean() >= 0.98
