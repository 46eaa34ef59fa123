"""Published `lib.utils.data`, once a copy of torch's loader of 2018: today's torch.utils.data."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils import data
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from mit_semseg.lib.nn.transfer import map_tensors

__all__ = [
    "BatchSampler",
    "ConcatDataset",
    "DataLoader",
    "DataLoaderIter",
    "Dataset",
    "DistributedSampler",
    "ExceptionWrapper",
    "RandomSampler",
    "Sampler",
    "SequentialSampler",
    "Subset",
    "SubsetRandomSampler",
    "TensorDataset",
    "WeightedRandomSampler",
    "default_collate",
    "pin_memory_batch",
    "random_split",
]


class TensorDataset(data.TensorDataset):
    """A data set of two tensors, indexed along the first dimension.

    Args:
        data_tensor: samples.
        target_tensor: their targets.
    """

    def __init__(self, data_tensor: Tensor, target_tensor: Tensor) -> None:
        super().__init__(data_tensor, target_tensor)
        self.data_tensor, self.target_tensor = data_tensor, target_tensor


class Sampler(data.Sampler[Any]):
    """Base class of samplers, with the argument that torch's no longer has."""

    def __init__(self, data_source: Sized | None = None) -> None:
        pass


def DataLoaderIter(loader: DataLoader[Any]) -> Iterator[Any]:
    """One pass over a loader."""
    return iter(loader)


def pin_memory_batch(batch: Any) -> Any:
    """Copies tensors in nested dicts, lists and tuples to pinned memory."""
    return map_tensors(torch.Tensor.pin_memory, batch)
