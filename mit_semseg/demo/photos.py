"""Images to try a model on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mit_semseg.dataset.images import load_image
from mit_semseg.demo import streets
from mit_semseg.engine.inputs import find_images

SIZE = (480, 640)  # height and width of rendered scenes


def pictures(images: Sequence[str], count: int) -> list[np.ndarray]:
    """The first images of files, folders or globs, or else rendered scenes.

    Args:
        images: as for `engine.inputs.find_images`; empty: scenes.
        count: most images.

    Returns:
        (H, W, 3) uint8 RGB each.

    Raises:
        FileNotFoundError: there are no images.
    """
    if images:
        files, _ = find_images(list(images))
        return [load_image(file) for file in files[:count]]
    return [streets.render(seed, SIZE)[0] for seed in range(count)]
