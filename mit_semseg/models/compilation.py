"""torch.compile for training, and one line where there is nothing to compile with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mit_semseg.models.attention import leave_uncompiled

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


def compile_for_training(module: nn.Module, method: str) -> None:
    """Compile one method of a module, for any size of image; in evaluation it stays as it was.

    The module's class is replaced by a subclass, so that names in the state dict stay and copies
    of the module do not share its code.

    Args:
        module: changed in place.
        method: what training enters it by.
    """
    kind = type(module)
    plain = getattr(kind, method)
    compiled = compiled_function(plain, dynamic=True)

    def enter(self: nn.Module, *args: Any, **options: Any) -> Any:
        return (compiled if self.training else plain)(self, *args, **options)

    module.__class__ = type(f"Compiled{kind.__name__}", (kind,), {method: enter})
