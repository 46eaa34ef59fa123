"""What every encoder must do; a test class subclasses this and names its encoder."""

from __future__ import annotations

import math

import torch

from mit_semseg.models import ENCODERS, ModelBuilder


def unmoved(module: torch.nn.Module) -> list[str]:
    """Parameters that no gradient, or none that is finite, has reached."""
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return [n for n, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]


def declared_maps(arch: str, batch: int, height: int, width: int) -> list[torch.Tensor]:
    """What an encoder says that it emits of images, without arithmetic."""
    encoder = ENCODERS.get(arch)
    return [
        torch.zeros(batch, c, math.ceil(height / s), math.ceil(width / s), device="meta")
        for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]


class EncoderTester:
    """Set `arch`, and `published` to a key of state_dicts.json where there is one."""

    arch: str
    published: str | None = None

    def on_meta(self) -> torch.nn.Module:
        """Shapes without arithmetic: quick for the largest encoder."""
        with torch.device("meta"):
            return ENCODERS.get(self.arch)()

    @torch.no_grad()
    def test_emits_what_it_declares(self) -> None:
        encoder = self.on_meta()
        for height, width in ((64, 96), (65, 97)):
            images = torch.zeros(2, 3, height, width, device="meta")
            maps = encoder(images, return_feature_maps=True)
            declared = declared_maps(self.arch, 2, height, width)
            assert [x.shape for x in maps] == [x.shape for x in declared]
        (last,) = encoder(images)
        assert last.shape == maps[-1].shape

    def test_has_the_published_state_dict(
        self, published_shapes: dict[str, dict[str, list[int]]]
    ) -> None:
        own = {key: list(value.shape) for key, value in self.on_meta().state_dict().items()}
        stored = published_shapes.get(self.published or f"encoder/{self.arch}")
        assert stored == (own if self.published else None)

    def test_every_parameter_learns(self) -> None:
        torch.manual_seed(0)
        # In evaluation: statistics of the batch cancel biases that only another BatchNorm follows.
        encoder = ModelBuilder.build_encoder(self.arch, weights="none").eval()
        maps = encoder(torch.randn(2, 3, 32, 32), return_feature_maps=True)
        features = [x for x in maps if x.is_floating_point()]  # pooling indices are not
        sum((x * torch.randn_like(x)).mean() for x in features).backward()
        assert unmoved(encoder) == []
