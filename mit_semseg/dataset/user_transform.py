"""A user-defined transform of training samples (`DATASET.transform`)."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mit_semseg.dataset.sample import LoadedSample
from mit_semseg.errors import one_line


class UserTransform:
    """Applies `function(image, mask)`, for example a transform of `torchvision.transforms.v2`.

    The function takes and returns torchvision's `tv_tensors`: an Image, (3, h, w) uint8 RGB or,
    with `bands`, (C, h, w) float32, normalised, and a Mask, (h, w) int64 with -1 ignored. The
    generators of torch, NumPy and Python are seeded for each call, and restored after it, so that a
    sample does not depend on the process that loads it.

    Args:
        name: "module:function"; the module can be in the working folder.

    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = _load(name)

    def __getstate__(self) -> str:
        return self.name  # a function need not be picklable

    def __setstate__(self, name: str) -> None:
        self.__init__(name)  # type: ignore[misc]

    def __call__(self, sample: LoadedSample, rng: np.random.Generator) -> LoadedSample:
        """The sample, transformed.

        Raises:
            RuntimeError: the function raised an error, or returned something else. Unlike an
                unreadable file, this is not skipped.
        """
        from torchvision import tv_tensors  # slow to import

        pixels = np.ascontiguousarray(sample.image.transpose(2, 0, 1))
        image = tv_tensors.Image(torch.from_numpy(pixels))
        mask = tv_tensors.Mask(torch.from_numpy(sample.labels()))
        with _seeded(int(rng.integers(2**32))):
            try:
                given = self._function(image, mask)
            except Exception as error:  # noqa: BLE001  # the user's function may raise anything
                raise RuntimeError(
                    f"DATASET.transform {self.name} failed with {type(error).__name__}: "
                    f"{one_line(error)}"
                ) from error
        image, mask = self._checked(given, torch.from_numpy(pixels))
        labels = mask.numpy().astype(np.int64)
        last = sample.label_map.num_class - 1
        outside = labels[(labels < -1) | (labels > last)]
        if outside.size:
            raise RuntimeError(
                f"DATASET.transform {self.name} returned the class {outside[0]}; give 0..{last}, "
                "or -1 for ignored pixels"
            )
        return replace(
            sample.relabelled(labels),
            image=np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
        )

    def _checked(self, given: Any, taken: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The returned image and mask, of an image `taken`; RuntimeError for anything else."""
        pair = given if isinstance(given, (tuple, list)) else ()
        if len(pair) == 2 and all(isinstance(part, torch.Tensor) for part in pair):
            image, mask = (part.as_subclass(torch.Tensor) for part in pair)
            whole = not mask.is_floating_point() and image.dtype == taken.dtype
            if whole and image.ndim == 3 and image.shape == (len(taken), *mask.shape):
                return image, mask
        shown = [
            f"{tuple(part.shape)} {part.dtype}" if isinstance(part, torch.Tensor) else type(part)
            for part in pair or [given]
        ]
        raise RuntimeError(
            f"DATASET.transform {self.name} returned {', '.join(map(str, shown))}; it has to "
            f"return (image, mask): ({len(taken)}, h, w) {str(taken.dtype)[6:]} and (h, w) integers"
        )


def _load(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(
            f"DATASET.transform is {name!r}; give module:function, such as my_transforms:train"
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"DATASET.transform {name}: {module} cannot be imported ({one_line(error)}); put "
            f"{module.partition('.')[0]}.py into {here}, or install it"
        ) from error
    function = getattr(found, attribute, None)
    if not callable(function):
        raise ValueError(f"DATASET.transform {name}: {found.__file__} has no function {attribute}")
    return function  # type: ignore[no-any-return]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context in which the global random generators are seeded; they are restored after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
