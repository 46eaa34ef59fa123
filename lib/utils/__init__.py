"""Small helpers around tensors."""

from .convert import as_numpy

__all__ = ["as_numpy"]
