"""Pictures of images with other channels than red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_COLORS = ("red", "green", "blue")
_PERCENTILES = (2, 98)
_SAMPLED = 1 << 20  # pixels that percentiles are computed of, at most


def picture(image: np.ndarray, bands: Sequence[str] = ()) -> np.ndarray:
    """An image as colours.

    Its bands called red, green and blue, or the first three, or the only one, are stretched each
    from its 2nd to its 98th percentile.

    Args:
        image: (H, W, C) float32, NaN where there is no value, which becomes black; or (H, W, 3)
            uint8 RGB, which is returned as it is.
        bands: names of the bands, if there are any.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    if image.dtype == np.uint8:
        return image
    names = [band.casefold() for band in bands]
    if set(_COLORS) <= set(names):
        chosen = [names.index(color) for color in _COLORS]
    else:
        chosen = [0, 1, 2] if image.shape[2] > 2 else [0, 0, 0]
    H, W = image.shape[:2]
    result = np.empty((H, W, 3), dtype=np.uint8)
    for channel, band in enumerate(chosen):
        values = image[:, :, band]
        step = max(1, int((H * W / _SAMPLED) ** 0.5))
        sampled = values[::step, ::step]
        known = sampled[~np.isnan(sampled)]
        low, high = np.percentile(known, _PERCENTILES) if known.size else (0.0, 1.0)
        levels = (values - np.float32(low)) * np.float32(255 / max(high - low, 1e-12))
        result[:, :, channel] = np.rint(np.nan_to_num(levels).clip(0, 255))
    return result
