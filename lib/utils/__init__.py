"""Conversion of nested containers of tensors."""

import importlib
from types import ModuleType

from .convert import as_numpy, as_variable, mark_volatile

__all__ = ["as_numpy", "as_variable", "mark_volatile"]


def __getattr__(name: str) -> ModuleType:
    # Importing the published package also imported this module (now in `mit_semseg.compat`).
    if name == "th":
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
