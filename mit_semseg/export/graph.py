"""The network that is exported: preprocessing, network and labels in common operations."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mit_semseg.dataset.transforms import Normalize
from mit_semseg.export.description import Description
from mit_semseg.matrices import exporting
from mit_semseg.models import SegmentationModule
from mit_semseg.models.inference import folded_copy
from mit_semseg.models.layers import resize

IMAGE, LABELS, SCORES = "image", "labels", "scores"
# Most pixels of a side and images of a batch of a graph for images of any size.
MOST_PIXELS, MOST_IMAGES = 16384, 1024


class Graph(nn.Module):
    """A segmentation network from images to labels.

    Attributes:
        description: what is stored with it.
    """

    factor: Tensor
    shift: Tensor

    def __init__(
        self, module: SegmentationModule, normalize: Normalize, description: Description
    ) -> None:
        """Copy a network, in float32 on the CPU.

        Args:
            module: the network, which is not modified.
            normalize: of uint8 images; not used by a raw graph.
            description: what the graph computes.
        """
        super().__init__()
        self.network = folded_copy(module)
        self.description = description
        self.bgr = normalize.color_order == "BGR"
        mean, std = normalize.mean.double(), normalize.std.double()
        unit = 255.0 if normalize.value_range == 1 else 1.0
        # One product and one sum instead of two divisions and a difference.
        self.register_buffer("factor", (1 / (std * unit)).float()[:, None, None])
        self.register_buffer("shift", (-mean / std).float()[:, None, None])
        self.eval()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return (SCORES,) if self.description.raw else (LABELS, SCORES)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The outputs of the graph.

        Args:
            image: (N, H, W, 3) uint8 RGB; of a raw graph (N, C, H, W) float32, normalised.

        Returns:
            labels (N, H, W) int64, unless raw, and scores (N, K, h, w) float32, the logits at the
            resolution of the network.
        """
        if self.description.raw:
            return (self.network.logits(image),)
        size = image.shape[1], image.shape[2]
        pixels = image.permute(0, 3, 1, 2)
        if self.bgr:
            pixels = pixels.flip(1)
        pixels = pixels.to(torch.float32)
        if self.description.resize:
            pixels = self._resized(pixels)
        scores = self.network.logits(pixels * self.factor + self.shift)
        return resize(scores, size).argmax(1), scores

    def _resized(self, pixels: Tensor) -> Tensor:
        """Images at the first scale of the recipe, as by `dataset.transforms.scaled_inputs`."""
        inner = self.description.network_size()
        if tuple(pixels.shape[2:]) == inner:
            return pixels
        return F.interpolate(pixels, size=inner, mode="bilinear", antialias=True).round()

    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that record the graph."""
        if self.description.size is not None:
            return self.description.size
        # Sides that differ and are no powers of two: no size is taken for another one.
        return 6 * self.description.multiple, 7 * self.description.multiple

    def example(self, batch: int = 2) -> Tensor:
        """An image that the graph can be recorded with."""
        size = self.image_size()
        if self.description.raw:
            channels = self.description.options.MODEL.in_channels
            return torch.zeros(batch, channels, *size)
        return torch.zeros(batch, *size, 3, dtype=torch.uint8)

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        """For `torch.export`: the axes of the image whose lengths differ between calls."""
        axes: dict[int, Any] = {0: torch.export.Dim("batch", max=MOST_IMAGES)}
        if self.description.size is None:
            multiple = self.description.multiple
            first = 2 if self.description.raw else 1
            for axis, name in enumerate(("rows", "columns"), start=first):
                blocks = torch.export.Dim(name, min=2, max=MOST_PIXELS // multiple)
                axes[axis] = multiple * blocks if multiple > 1 else blocks
        return {IMAGE: axes}

    def program(self, dynamic: bool = True) -> Any:
        """The graph recorded by torch.export (`torch.export.ExportedProgram`).

        Args:
            dynamic: for images of any number, and of any size unless the graph has one; False: for
                one image of one size.
        """
        shapes = self.dynamic_shapes() if dynamic else None
        example = self.example(2 if dynamic else 1)
        with torch.no_grad(), exporting():
            return torch.export.export(self, (example,), dynamic_shapes=shapes, strict=False)

    def traced(self, module: nn.Module | None = None, example: Tensor | None = None) -> Any:
        """The graph recorded by `torch.jit.trace` (`torch.jit.ScriptModule`).

        Args:
            module: a module around this one; None: this one.
            example: its input.
        """
        given = self.example() if example is None else example
        with torch.no_grad(), exporting():
            return torch.jit.trace(module or self, given, check_trace=False)


def multiple_of(module: SegmentationModule, padding: int) -> int:
    """What height and width have to be multiples of: the padding constant, and encoder strides."""
    strides = getattr(module.encoder, "strides", ())
    return math.lcm(padding, *strides) if strides else padding
