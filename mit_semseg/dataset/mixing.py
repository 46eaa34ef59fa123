"""CutMix and ClassMix: parts of one training sample are pasted onto another of its batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mit_semseg.config import DataOptions
from mit_semseg.dataset.sample import LoadedSample


class Mixing:
    """CutMix and ClassMix between the samples of a batch.

    Pixels and labels of the next sample are pasted onto each sample, and those of the first onto
    the last; all are taken from the samples before mixing. Samples are aligned at the top left, and
    parts outside the smaller one are cropped. If both apply, the union of their masks is pasted.

    Papers: CutMix, Yun et al. 2019, arXiv:1905.04899, eq. 2: a rectangle with a uniformly
    distributed share of the area, around a uniformly distributed pixel. ClassMix, Olsson et al.
    2021, arXiv:2007.07936, alg. 1: half of the classes, rounded down, at least one.

    Args:
        options: `cutmix` and `classmix`, probabilities.
    """

    def __init__(self, options: DataOptions) -> None:
        self.cutmix, self.classmix = options.cutmix, options.classmix

    def __bool__(self) -> bool:
        return bool(self.cutmix or self.classmix)

    def __call__(
        self, samples: Sequence[LoadedSample], rng: np.random.Generator
    ) -> list[LoadedSample]:
        """The mixed samples; a single sample is unchanged."""
        if len(samples) < 2:
            return list(samples)
        labels = [sample.labels() for sample in samples]
        sources = [*range(1, len(samples)), 0]
        return [
            self._mixed(samples[k], labels[k], samples[source], labels[source], rng)
            for k, source in enumerate(sources)
        ]

    def _mixed(
        self,
        sample: LoadedSample,
        labels: np.ndarray,
        other: LoadedSample,
        others: np.ndarray,
        rng: np.random.Generator,
    ) -> LoadedSample:
        taken = np.zeros(others.shape, dtype=bool)
        if rng.random() < self.cutmix:
            taken |= _rectangle(others.shape, rng)
        if rng.random() < self.classmix:
            taken |= _half_of_classes(others, rng)
        if not taken.any():
            return sample
        h, w = (min(sides) for sides in zip(labels.shape, others.shape))
        taken = taken[:h, :w]
        image, mixed = sample.image.copy(), labels.copy()
        image[:h, :w][taken] = other.image[:h, :w][taken]
        mixed[:h, :w][taken] = others[:h, :w][taken]
        depth = sample.depth
        if depth is not None and other.depth is not None:
            depth = depth.copy()
            depth[:h, :w][taken] = other.depth[:h, :w][taken]
        return replace(sample.relabelled(mixed), image=image, depth=depth)


def _rectangle(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """The mask of CutMix, bool."""
    side = math.sqrt(rng.random())
    windows = []
    for n in shape:
        middle, half = int(rng.integers(n)), round(n * side) // 2
        windows.append(slice(max(middle - half, 0), middle + half))
    taken = np.zeros(shape, dtype=bool)
    taken[tuple(windows)] = True
    return taken


def _half_of_classes(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mask of ClassMix, bool; ignored pixels do not count as a class."""
    classes = np.unique(labels[labels >= 0])
    count = min(len(classes), max(1, len(classes) // 2))
    return np.isin(labels, rng.choice(classes, count, replace=False))
