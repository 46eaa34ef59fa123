"""An exported file in the place of a network, for `engine.predictor.Predictor`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mit_semseg.dataset.transforms import Normalize
from mit_semseg.export.base import Format, Runner
from mit_semseg.export.description import Description
from mit_semseg.export.graph import SCORES
from mit_semseg.models import SegmentationModule
from mit_semseg.models.decoders.base import Decoder
from mit_semseg.models.encoders.base import Encoder


class _Encoder(Encoder):
    """What is known of the encoder in an exported file.

    Attributes:
        fixed_size: (height, width) of all images; None: any multiples of the strides.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.channels, self.strides = (), description.strides
        self.in_channels = description.options.MODEL.in_channels
        self.fixed_size = description.size


class ExportedModule(SegmentationModule):
    """A network in an exported file: `logits` are computed by another library.

    Attributes:
        description: the metadata of the file.
        runner: computes them, after `prepare`.
    """

    def __init__(self, format: Format, path: Path) -> None:
        """Read the metadata; the network is read by `prepare`, or when it is first used.

        Args:
            format: of the file.
            path: its place.

        Raises:
            ValueError: the file cannot be read, or was not exported by this toolkit.
        """
        description = Description.read(format.texts(path), path)
        data = description.options.DATASET
        super().__init__(
            _Encoder(description),
            Decoder((), num_class=len(description.classes)),
            None,
            normalize=None if data.bands else Normalize.of(data),
            mirror_pairs=description.mirror_pairs,
        )
        self.format, self.path, self.description = format, path, description
        self.runner: Runner | None = None

    def prepare(self, precision: str = "fp32") -> None:
        """Read the network.

        Args:
            precision: of its computations.

        Raises:
            ValueError: the file cannot be run, or not in this precision.
        """
        if precision == "auto":
            precision = "fp32"
        if precision not in self.format.precisions:
            known = " or ".join(self.format.precisions)
            raise ValueError(f"{self.path} computes in {known}, not in {precision}")
        self.runner = self.format.open(self.path, precision)

    def logits(self, image: Tensor) -> Tensor:
        """Scores at the resolution of the network; see `SegmentationModule.logits`.

        Args:
            image: (N, C, H, W), uint8 or normalised.

        Returns:
            (N, K, h, w) float32.
        """
        if self.runner is None:
            self.prepare()
        assert self.runner is not None
        (scores,) = self.runner(self.pixels(image), [SCORES])
        return torch.from_numpy(scores)

    def pixels(self, image: Tensor) -> np.ndarray:
        """The input of the graph from images (N, C, H, W), uint8 or normalised."""
        if self.description.raw:
            found = self.inputs(image).contiguous()
        else:
            # Windows are normalised before they are padded with the mean colour.
            whole = self._bytes(image) if image.is_floating_point() else image
            found = whole.permute(0, 2, 3, 1).contiguous()
        array: np.ndarray = found.numpy()
        return array

    def _bytes(self, image: Tensor) -> Tensor:
        """uint8 RGB from normalised images."""
        assert isinstance(self.normalize, Normalize)
        unit = 255.0 if self.normalize.value_range == 1 else 1.0
        std, mean = (x[:, None, None] for x in (self.normalize.std, self.normalize.mean))
        pixels = ((image * std + mean) * unit).round().clamp(0, 255).to(torch.uint8)
        return pixels.flip(1) if self.normalize.color_order == "BGR" else pixels
