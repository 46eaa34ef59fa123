"""torch.compile for training, and a one-line error if no compiler is installed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mit_semseg.models.module import SegmentationModule

# Messages of torch's errors if no compiler is installed.
NO_COMPILER = re.compile(
    r"no working c\+\+ compiler|c\+\+ compile error|compiler: .* is not found"
    r"|failed to find c compiler|working triton installation",
    re.IGNORECASE,
)


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Turns torch's error at the first call of a compiled function into one line.

    Raises:
        ValueError: torch found no working compiler.
    """
    try:
        yield
    except RuntimeError as error:
        if not NO_COMPILER.search(str(error)):
            raise
        raise ValueError(
            "torch.compile found no working compiler; install a C++ compiler such as g++ (and "
            "Triton for a GPU), or set TRAIN.compile, VAL.compile, TEST.compile False"
        ) from error


def compile_for_training(module: SegmentationModule) -> None:
    """Compiles encoder and decoder of a module for training, with dynamic image sizes."""
    module.encode = torch.compile(module.encode, dynamic=True)
    module.decode = torch.compile(module.decode, dynamic=True)
