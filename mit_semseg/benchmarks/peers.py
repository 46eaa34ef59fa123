"""Comparison with other toolkits: one image at the network's input size to its class map."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mit_semseg.benchmarks.clock import Runnable
from mit_semseg.benchmarks.rows import CLASSES, Row, build
from mit_semseg.engine.predictor import Predictor
from mit_semseg.precision import Precision

SIZE = (512, 672)  # sides that all networks accept


def smp_upernet() -> nn.Module:
    """segmentation_models.pytorch's UPerNet on a ResNet50."""
    import segmentation_models_pytorch as smp

    net: nn.Module = smp.UPerNet("resnet50", encoder_weights=None, classes=CLASSES)
    return net


def torchvision_deeplabv3() -> nn.Module:
    """torchvision's DeepLabv3 on a dilated ResNet50, without its auxiliary head."""
    from torchvision.models.segmentation import deeplabv3_resnet50

    net = deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=False
    )

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = net(x)["out"]
            return out

    plain = Plain()
    plain.net = net
    return plain


@dataclass(frozen=True)
class Peer(Row):
    """A network of this package and a similar one of another toolkit.

    Both run in the same precision, and otherwise with the defaults of their toolkits.
    """

    package: str = ""
    build_peer: Callable[[], nn.Module] = nn.Identity
    encoder: str = "resnet50"
    decoder: str = "upernet"
    repeats: int = 4
    counted: bool = True
    size: tuple[int, int] = SIZE

    group = "Peers"

    @property
    def title(self) -> str:  # type: ignore[override]
        height, width = self.size
        return f"{self.encoder} + {self.decoder}, {width}x{height}, {self.precision}"

    @property
    def missing(self) -> str:
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return ""

    def _image(self) -> Tensor:
        torch.manual_seed(0)
        return torch.randn(1, 3, *self.size, device=self.device)

    def published(self) -> Runnable:
        net, image = self.build_peer().eval().to(self.device), self._image()
        precision = Precision.of(self.precision, torch.device(self.device))

        @torch.no_grad()
        def run() -> Tensor:
            with precision.products(), precision.autocast():
                return net(image).argmax(1)

        return run

    def ours(self) -> Runnable:
        module, image = build(self.encoder, self.decoder), self._image()
        predictor = Predictor(module, {}, self.device, precision=self.precision)

        def run() -> Tensor:
            return predictor.labels(predictor.logits([image]), self.size)

        return run


def _smp(decoder: str, precision: str) -> Peer:
    return Peer(
        baseline="segmentation_models.pytorch UPerNet-ResNet50",
        package="segmentation_models_pytorch",
        build_peer=smp_upernet,
        decoder=decoder,
        precision=precision,
    )


def _torchvision(precision: str) -> Peer:
    return Peer(
        baseline="torchvision deeplabv3_resnet50",
        package="torchvision",
        build_peer=torchvision_deeplabv3,
        encoder="resnet50dilated",
        decoder="ppm",
        precision=precision,
    )


def peers(precisions: Sequence[str]) -> list[Peer]:
    """The rows of this module, in each of the precisions."""
    return [
        # A pyramid of 512 channels, as published, and one of 256, as in the other toolkit.
        *(_smp(decoder, p) for decoder in ("upernet", "upernet_lite") for p in precisions),
        *(_torchvision(p) for p in precisions),
    ]
