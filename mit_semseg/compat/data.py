"""`lib.utils.data` as published, a copy of torch's loader of 2018: torch's own of today."""

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
    """Pairs of entries of two tensors of the same length.

    Args:
        data_tensor: samples, one an entry along the first dimension.
        target_tensor: their targets.
    """

    def __init__(self, data_tensor: Tensor, target_tensor: Tensor) -> None:
        super().__init__(data_tensor, target_tensor)
        self.data_tensor, self.target_tensor = data_tensor, target_tensor


class Sampler(data.Sampler[Any]):
    """The base of samplers; torch's takes no argument any more."""

    def __init__(self, data_source: Sized | None = None) -> None:
        pass


def DataLoaderIter(loader: DataLoader[Any]) -> Iterator[Any]:
    """One pass over a loader; torch keeps the class of it to itself."""
    return iter(loader)


def pin_memory_batch(batch: Any) -> Any:
    """The tensors inside nested dicts, lists and tuples in pinned memory; others are passed on."""
    return map_tensors(torch.Tensor.pin_memory, batch)
