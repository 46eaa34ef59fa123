"""Tensors in nested containers, to and from NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_numpy(obj: Any) -> Any:
    """Converts every tensor in nested dicts, lists and tuples to a NumPy array.

    Args:
        obj: a tensor of any device and dtype, a (nested) mapping, list or tuple of them, or
            anything that `numpy.asarray` accepts.

    Returns:
        The same nesting with arrays; bfloat16, which NumPy does not have, becomes float32.
        Strings, bytes and None are unchanged.
    """
    if isinstance(obj, Tensor):
        host = obj.detach().cpu()
        if host.dtype is torch.bfloat16:
            host = host.float()
        return host.resolve_conj().resolve_neg().numpy()
    if isinstance(obj, (list, tuple, Mapping)):
        return rebuilt(as_numpy, obj)
    if obj is None or isinstance(obj, (str, bytes)):
        return obj
    return np.asarray(obj)


def as_variable(obj: Any) -> Any:
    """Converts every number and array in nested dicts, lists and tuples to a tensor.

    (Since torch 0.4 a `Variable` is a tensor.)

    Args:
        obj: a tensor, which is unchanged, an array, a number, or containers of them.

    Returns:
        The same nesting with tensors on the CPU; strings, bytes and None are unchanged.

    Raises:
        RuntimeError, TypeError: `torch.as_tensor` does not accept a value.
    """
    if isinstance(obj, Tensor):
        return obj
    if isinstance(obj, (list, tuple, Mapping)):
        return rebuilt(as_variable, obj)
    if obj is None or isinstance(obj, (str, bytes)):
        return obj
    return torch.as_tensor(obj)


def mark_volatile(obj: Any) -> Any:
    """Sets the attribute `no_grad` of every tensor in nested dicts, lists and tuples.

    As published, it does nothing else. Torch ignores the attribute, as it has had no volatile
    variables since 0.4; use `torch.no_grad()`.

    Returns:
        The same nesting with the same tensors.
    """
    if isinstance(obj, Tensor):
        obj.no_grad = True  # type: ignore[attr-defined]
        return obj
    if isinstance(obj, (list, tuple, Mapping)):
        return rebuilt(mark_volatile, obj)
    return obj


def rebuilt(function: Callable[[Any], Any], obj: Any) -> Any:
    """Applies `function` to the entries of a list, tuple, named tuple or mapping."""
    if isinstance(obj, Mapping):
        return {key: function(value) for key, value in obj.items()}
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*map(function, obj))
    return type(obj)(map(function, obj))
