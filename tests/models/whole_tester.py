"""What an encoder with a decoder must do as a whole; a test class names the two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mit_semseg.losses import build_loss
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.models.inference import inference_copy

CLASSES = 4
COLOURS = ((-1.5, -1.0, 0.5), (1.0, 0.8, -1.2), (-0.3, 1.5, 1.2), (1.4, -1.2, 0.1))


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A 64x96 image (1, 3, 64, 96) of four coloured regions, and its label (1, 64, 96)."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    label = (y > 24 + x // 8).long()
    label[(y > 16) & (y < 56) & (x > 56) & (x < 88)] = 2
    label[((y - 36) ** 2 + (x - 28) ** 2) < 256] = 3
    generator = torch.Generator().manual_seed(0)
    image = torch.tensor(COLOURS)[label].permute(2, 0, 1)
    image = image + 0.2 * torch.randn(image.shape, generator=generator)
    return image[None], label[None]


class WholeTester:
    """Set `encoder` and `decoder`; `rate` and `steps` of Adam, if the usual ones do not do."""

    encoder: str
    decoder: str
    rate: float = 1e-3
    steps: int = 150
    image = (64, 96)  # of the quick tests

    def module(self) -> SegmentationModule:
        torch.manual_seed(0)
        enc = ModelBuilder.build_encoder(self.encoder, weights="none")
        dec = ModelBuilder.build_decoder(
            self.decoder, num_class=CLASSES, channels=enc.channels, strides=enc.strides
        )
        asks = any(head.weight is None for head in dec.auxiliary)
        crit = build_loss("nll", CLASSES)
        return SegmentationModule(enc, dec, crit, deep_sup_scale=0.4 if asks else None)

    @torch.no_grad()
    def trained(self) -> SegmentationModule:
        """In evaluation, with BatchNorms that know what they normalise, and attention begun."""
        module = self.module().train()
        for name, parameter in module.named_parameters():
            if name.endswith("gamma"):
                nn.init.constant_(parameter, 0.5)
        norms = [m for m in module.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        for layer in norms:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.momentum = 1.0
        module.logits(torch.randn(2, 3, 64, 96))
        return module.eval()

    @torch.no_grad()
    def test_the_copy_for_prediction_gives_the_same_logits(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        module = self.trained().double()
        fast = inference_copy(module, "cpu")
        assert "not folded" not in caplog.text
        image = torch.randn(1, 3, *self.image, dtype=torch.float64)
        expected = module.logits(image)
        torch.testing.assert_close(fast.logits(image), expected, rtol=0, atol=1e-9)
        norms = [sum(isinstance(x, nn.BatchNorm2d) for x in m.modules()) for m in (module, fast)]
        assert norms[1] < norms[0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_autocast_rounds_and_does_not_overflow(self, dtype: torch.dtype) -> None:
        module = self.trained()
        image = torch.randn(1, 3, 32, 32)  # convolutions in float16 are slow on a CPU
        expected = module.logits(image)
        with torch.autocast("cpu", dtype=dtype):
            given = module.logits(image).float()
        apart = (given - expected).abs().mean() / expected.std()
        assert apart < (0.15 if dtype == torch.bfloat16 else 0.03)

    def test_one_image_of_odd_sides_trains(self) -> None:
        label = torch.randint(-1, CLASSES, (1, 33, 49), generator=torch.Generator().manual_seed(0))
        batch = {"img_data": torch.randn(1, 3, 65, 97), "seg_label": label}
        losses = []
        for _ in range(2):
            module = self.module().train()
            torch.manual_seed(1)
            loss, _ = module(batch)
            loss.backward()
            losses.append(loss)
        assert torch.isfinite(losses[0])
        assert torch.equal(losses[0], losses[1])
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())

    def training(self) -> Iterator[tuple[int, float]]:
        """Steps taken and pixel accuracy in evaluation, after every ten of them."""
        module = self.module()
        image, label = scene()
        optimizer = torch.optim.Adam(module.parameters(), lr=self.rate)
        for step in range(1, self.steps + 1):
            module.train()
            optimizer.zero_grad()
            loss, _ = module({"img_data": image, "seg_label": label})
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                module.eval()
                predicted = module.predict(image, (64, 96))
                yield step, (predicted == label).double().mean().item()

    @pytest.mark.slow
    def test_learns_an_image_by_heart(self) -> None:
        assert any(accuracy >= 0.98 for _, accuracy in self.training())
