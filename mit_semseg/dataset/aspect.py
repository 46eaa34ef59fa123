"""Aspect-preserving batches as published, with optional crops and colour jitter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mit_semseg.config import DataOptions
from mit_semseg.dataset.sample import LoadedSample, Plan
from mit_semseg.dataset.transforms import color_jitter, fitted_size, jitter_factors, random_window


class AspectPreserving:
    """Samples as published: resized, flipped at random, and, with `crop_size`, cropped.

    Args:
        options: `DATASET` options.
    """

    by_orientation = True  # batches are padded to their largest width and height

    def __init__(self, options: DataOptions) -> None:
        self.options = options

    def plan(self, size: tuple[int, int], short: int, rng: np.random.Generator) -> Plan:
        """Size, flip, window and colours; see `BatchStyle`."""
        options = self.options
        flip = options.random_flip and rng.random() < 0.5
        if options.crop_size:  # crops need no padding, so the batch need not share a size
            short = int(rng.choice(options.imgSizes))
        state = rng.bit_generator.state
        width, height = fitted_size(*size, short, options.imgMaxSize)
        window = slice(0, height), slice(0, width)
        if options.crop_size:
            window = random_window((height, width), options.crop_size, rng)
        colors = jitter_factors(options.color_jitter, rng) if options.color_jitter > 0 else None
        return Plan((width, height), window, state, flip, colors)

    def apply(self, loaded: LoadedSample, plan: Plan) -> LoadedSample:
        """Flip, crop and colour jitter; see `BatchStyle`."""
        if plan.flip:
            loaded = loaded.flipped()
        loaded = loaded.cropped(plan.window)
        if plan.colors:
            loaded = replace(loaded, image=color_jitter(loaded.image, *plan.colors))
        return loaded
