"""Tensors to numpy."""

from __future__ import annotations

from collections.abc import Mapping
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
    if isinstance(obj, Mapping):
        return {key: as_numpy(value) for key, value in obj.items()}
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*(as_numpy(value) for value in obj))
    if isinstance(obj, (list, tuple)):
        return type(obj)(as_numpy(value) for value in obj)
    if obj is None or isinstance(obj, (str, bytes)):
        return obj
    return np.asarray(obj)
