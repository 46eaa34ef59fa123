"""Pictures of a few validation images, for the loggers."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mit_semseg.visualize import overlay, side_by_side
from mit_semseg.visualize.bands import picture

COUNT = 4
LONGEST = 512  # side in pixels; larger images are subsampled


class ValidationPictures:
    """Collects pictures during a validation: image, ground truth and prediction side by side.

    Args:
        count: number of validation images.
        batch: images per chunk, `VAL.batch_size`.
        ranks: number of ranks; those of rank 0, every `ranks`-th chunk, are collected.
        colors: of the classes, (K, 3) uint8.
        bands: `DATASET.bands`.
    """

    def __init__(
        self, count: int, batch: int, ranks: int, colors: np.ndarray, bands: tuple[str, ...] = ()
    ) -> None:
        mine = [i for i in range(count) if i // batch % ranks == 0]
        chosen = np.linspace(0, len(mine) - 1, min(COUNT, len(mine))).round().astype(int)
        self.numbers = tuple(mine[k] for k in chosen)
        self.colors, self.bands = colors, bands
        self._pictures: dict[int, np.ndarray] = {}

    def add(self, index: int, image: np.ndarray, truth: Tensor, predicted: Tensor) -> None:
        """Draw image number `index` if it is one of the chosen; called by several threads."""
        if index not in self.numbers:
            return
        step = -(-max(truth.shape) // LONGEST)
        shown = picture(image, self.bands)[::step, ::step]
        maps = (labels.numpy()[::step, ::step] for labels in (truth, predicted))
        self._pictures[index] = side_by_side(
            shown, *(overlay(shown, labels, self.colors) for labels in maps)
        )

    def take(self) -> dict[str, np.ndarray]:
        """The pictures of the last validation, (H, W, 3) uint8 by name; they are forgotten."""
        drawn = {f"images/{index}": image for index, image in sorted(self._pictures.items())}
        self._pictures = {}
        return drawn
