"""torch.compile for training, and one line where there is nothing to compile with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mit_semseg.models.attention import leave_uncompiled
from mit_semseg.models.module import SegmentationModule

# How torch says that it has nothing to compile with.
NO_COMPILER = re.compile(
    r"no working c\+\+ compiler|c\+\+ compile error|compiler: .* is not found"
    r"|failed to find c compiler|working triton installation",
    re.IGNORECASE,
)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """One line for what torch says at the first call when it has nothing to compile with.

    Raises:
        ValueError: there is no compiler that works.
    """
    try:
        yield
    except RuntimeError as error:
        if not NO_COMPILER.search(str(error)):
            raise
        raise ValueError(
            "torch.compile found no compiler that works; install a C++ compiler such as g++ (and "
            "Triton for a GPU), or set TRAIN.compile, VAL.compile, TEST.compile False"
        ) from error


def compiled_function(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile(function, **options)`, for networks of this package."""
    leave_uncompiled()
    return torch.compile(function, **options)


def compile_for_training(module: SegmentationModule) -> None:
    """Compile how a module enters encoder and decoder in training, for any size of image."""
    module.encode = compiled_function(module.encode, dynamic=True)
    module.decode = compiled_function(module.decode, dynamic=True)
