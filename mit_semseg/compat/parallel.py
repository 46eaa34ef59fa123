"""Published `lib.nn.modules` and `lib.nn.parallel`: synchronised layers, replicas, gathering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import Full, Queue
from typing import Any, NamedTuple
from unittest import TestCase

import numpy as np
import torch
from torch import Tensor, nn

from mit_semseg.lib.nn import (
    DataParallelWithCallback,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
    UserScatteredDataParallel,
    async_copy_to,
    patch_replication_callback,
    user_scattered_collate,
)
from mit_semseg.lib.nn.exchange import CallbackContext
from mit_semseg.lib.nn.replicate import execute_replication_callbacks
from mit_semseg.lib.nn.transfer import gather, parse_device, scatter
from mit_semseg.lib.utils import as_numpy

__all__ = [
    "CallbackContext",
    "DataParallelWithCallback",
    "DictGatherDataParallel",
    "FutureResult",
    "SlavePipe",
    "SyncMaster",
    "SynchronizedBatchNorm1d",
    "SynchronizedBatchNorm2d",
    "SynchronizedBatchNorm3d",
    "TorchTestCase",
    "UserScatteredDataParallel",
    "as_numpy",
    "async_copy_to",
    "dict_gather",
    "execute_replication_callbacks",
    "patch_replication_callback",
    "user_scattered_collate",
]

Device = int | str | torch.device


# ------------------------------------------------------------------------------ data_parallel
def dict_gather(outputs: Sequence[Any], target_device: Device, dim: int = 0) -> Any:
    """Gathers the outputs of replicas on one device, also in dicts, lists and tuples.

    Args:
        outputs: one per replica, all of the same structure.
        target_device: a CUDA index, `"cuda:N"`, `"cpu"` or `torch.device`; -1 is the CPU.
        dim: dimension along which tensors are concatenated; scalars become a vector.

    Raises:
        ValueError: the structures or shapes differ, or the device does not exist.
    """
    device = "cpu" if target_device == -1 else target_device
    return gather(outputs, parse_device(device, "target_device"), dim)


class DictGatherDataParallel(nn.DataParallel):
    """`torch.nn.DataParallel` whose outputs can be dicts and scalars."""

    def gather(self, outputs: Sequence[Any], output_device: Device) -> Any:
        """Gathers the outputs of the replicas, see `dict_gather`."""
        return dict_gather(outputs, output_device, dim=self.dim)


def _async_copy_stream(inputs: Sequence[Any], device_ids: Sequence[Device]) -> list[Any]:
    """Copies element i to device i; to a GPU on a side stream."""
    return scatter(inputs, [parse_device(device) for device in device_ids])


def _async_copy(inputs: Sequence[Any], device_ids: Sequence[Device]) -> tuple[Any, ...]:
    """As `_async_copy_stream`."""
    return tuple(_async_copy_stream(inputs, device_ids))


# ------------------------------------------------------------------------------ comm
class FutureResult:
    """Passes one result at a time from one thread to another."""

    def __init__(self) -> None:
        self._slot: Queue[Any] = Queue(maxsize=1)

    def put(self, result: Any) -> None:
        """Stores a result.

        Raises:
            RuntimeError: the previous one has not been fetched.
        """
        try:
            self._slot.put_nowait(result)
        except Full:
            raise RuntimeError("the previous result has not been fetched") from None

    def get(self) -> Any:
        """Waits for a result and removes it."""
        return self._slot.get()


class SlavePipe(NamedTuple):
    """Connection of another replica to the first one.

    Attributes:
        identifier: identifier of the replica.
        queue: messages to the first replica.
        result: answer of the first replica.
    """

    identifier: Any
    queue: Queue[Any]
    result: FutureResult

    def run_slave(self, msg: Any) -> Any:
        """Sends a message to the first replica and waits for its answer."""
        self.queue.put((self.identifier, msg))
        return self.result.get()


class SyncMaster:
    """Collects messages of all replicas in the first one, and distributes answers.

    `SynchronizedBatchNorm` of this package does not use it; it is for custom layers that were
    written for it. `__data_parallel_replicate__` of the first copy stores it in `ctx`.

    Args:
        master_callback: messages [(identifier, message), ...] -> answers in the same form. The
            first in both is that of the first replica, whose identifier is 0.
    """

    def __init__(self, master_callback: Callable[[list[Any]], Sequence[Any]]) -> None:
        self._master_callback = master_callback
        self._queue: Queue[Any] = Queue()
        self._answers: dict[Any, FutureResult] = {}
        self._used = False

    def register_slave(self, identifier: Any) -> SlavePipe:
        """A pipe for a replica; the first call after `run_master` starts a new set of replicas.

        Raises:
            RuntimeError: there are messages of earlier replicas.
        """
        if self._used:
            if not self._queue.empty():
                raise RuntimeError("messages of earlier replicas have not been collected")
            self._answers.clear()
            self._used = False
        self._answers[identifier] = FutureResult()
        return SlavePipe(identifier, self._queue, self._answers[identifier])

    def run_master(self, master_msg: Any) -> Any:
        """Waits for a message of every other replica, and distributes the answers.

        Returns:
            The answer for the first replica.

        Raises:
            ValueError: the first answer of the callback is not for the first replica.
        """
        self._used = True
        messages = [(0, master_msg), *(self._queue.get() for _ in self._answers)]
        (first, own), *others = self._master_callback(messages)
        if first != 0:
            raise ValueError(f"the first answer is for {first!r}; it must be for 0, the master")
        for identifier, result in others:
            self._answers[identifier].put(result)
        return own

    @property
    def nr_slaves(self) -> int:
        """Number of replicas with a pipe."""
        return len(self._answers)


# ------------------------------------------------------------------------------ unittest
class TorchTestCase(TestCase):
    """A test case that can compare tensors."""

    def assertTensorClose(
        self, a: Tensor, b: Tensor, atol: float = 1e-3, rtol: float = 1e-3
    ) -> None:
        """Fails unless |a - b| <= atol + rtol |b| everywhere."""
        np.testing.assert_allclose(as_numpy(a), as_numpy(b), atol=atol, rtol=rtol)
