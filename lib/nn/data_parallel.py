"""Data parallelism over a list of inputs, one per device, each of its own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def user_scattered_collate(batch: list[Any]) -> list[Any]:
    """Returns the list of samples as it is: element i goes to device i."""
    return batch


def async_copy_to(obj: Any, dev: int | str | torch.device, main_stream: Any = None) -> Any:
    """Copies the tensors inside nested dicts, lists and tuples to `dev`."""
    if isinstance(obj, Tensor):
        return obj.to(torch.device(dev), non_blocking=True)
    if isinstance(obj, Mapping):
        return {key: async_copy_to(value, dev, main_stream) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return type(obj)([async_copy_to(value, dev, main_stream) for value in obj])
    return obj


class UserScatteredDataParallel(nn.Module):
    """Runs a module on a list with one dict per device."""

    def __init__(self, module: nn.Module, device_ids: Sequence[int | str | torch.device] = ()):
        super().__init__()
        self.module = module
        self.device_ids = list(device_ids) or ["cpu"]

    def forward(self, inputs: list[Any], **kwargs: Any) -> Any:
        return self.module(inputs[0], **kwargs)
