"""Tensors inside nested containers, to and from numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_numpy(obj: Any) -> Any:
    """Turns every tensor inside nested dicts, lists and tuples into a numpy array.

    Args:
        obj: a tensor of any device and dtype, a (nested) mapping, list or tuple of them, or
            anything `numpy.asarray` takes.

    Returns:
        The same nesting with arrays on the host; bfloat16, which numpy lacks, becomes float32.
        Strings, bytes and None are returned as they are.
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
    """Turns every number and array inside nested dicts, lists and tuples into a tensor.

    A `Variable` has been the same as a tensor since torch 0.4.

    Args:
        obj: a tensor, which is returned as it is, an array, a number, or containers of them.

    Returns:
        The same nesting with tensors on the host; strings, bytes and None are returned as they are.

    Raises:
        RuntimeError, TypeError: something else is among them.
    """
    if isinstance(obj, Tensor):
        return obj
    if isinstance(obj, (list, tuple, Mapping)):
        return rebuilt(as_variable, obj)
    if obj is None or isinstance(obj, (str, bytes)):
        return obj
    return torch.as_tensor(obj)


def mark_volatile(obj: Any) -> Any:
    """Sets the attribute `no_grad` of every tensor inside nested dicts, lists and tuples.

    As published, that is all. torch has had no volatile variables since 0.4 and does not read the
    attribute: what spares the graph is `torch.no_grad()`.

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
    """A list, tuple, named tuple or mapping of what `function` makes of its entries."""
    if isinstance(obj, Mapping):
        return {key: function(value) for key, value in obj.items()}
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*map(function, obj))
    return type(obj)(map(function, obj))
