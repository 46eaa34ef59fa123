"""Data parallelism over a list of inputs of different sizes, one per device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from .exchange import ReplicaRun
from .parallel_apply import parallel_apply
from .replica_threads import ReplicaThreads
from .replicate import execute_replication_callbacks, keep_buffers, replicate
from .transfer import gather, parse_device, scatter

Device = int | str | torch.device


class UserScatteredDataParallel(nn.Module):
    """Runs a module on a list of inputs, element i on device i, and gathers the outputs.

    Unlike `torch.nn.DataParallel`, which splits one batch into equal parts, elements can have
    different sizes, and devices can be the CPU and can repeat. Synchronised layers synchronise
    across the replicas. A single input is computed by the module itself; otherwise each replica has
    a thread, which exists as long as this object.

    Before the inputs are copied, `module.prepare_scatter(inputs) -> inputs` is called, if it
    exists; it has access to the whole list.

    Changes that replicas make to themselves are lost, except for the buffers of replica 0.

    Args:
        module: its parameters and buffers must be on the first device.
        device_ids: CUDA indices, `"cuda:N"`, `"cpu"` or `torch.device`; a device can repeat.
            None: all GPUs, or the CPU if there are none.
        output_device: device of the gathered outputs; None: the first device.
        dim: dimension along which output tensors are concatenated.
        timeout: seconds that a replica waits for the others at a synchronised layer, and that a
            failed forward pass waits for hanging replicas.

    Raises:
        ValueError: `device_ids` is empty, or a device does not exist.

    Example:
        >>> model = UserScatteredDataParallel(nn.BatchNorm1d(2), device_ids=["cpu", "cpu"])
        >>> model([torch.zeros(3, 2), torch.ones(5, 2)]).shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[Device] | None = None,
        output_device: Device | None = None,
        dim: int = 0,
        timeout: float = 600.0,
    ) -> None:
        super().__init__()
        if device_ids is None:
            device_ids = list(range(torch.cuda.device_count())) or ["cpu"]
        if len(device_ids) == 0:
            raise ValueError("device_ids is empty: name at least one device, e.g. ['cpu']")
        if timeout <= 0:
            raise ValueError(f"timeout = {timeout}: must be above 0 seconds")
        self.module = module
        self.device_ids = [
            parse_device(device, f"device_ids[{i}]") for i, device in enumerate(device_ids)
        ]
        self.output_device = (
            self.device_ids[0]
            if output_device is None
            else parse_device(output_device, "output_device")
        )
        self.dim = dim
        self.timeout = timeout
        self._threads = ReplicaThreads()

    def forward(self, inputs: Sequence[Any], **kwargs: Any) -> Any:
        """Runs the replicas.

        Args:
            inputs: one to `len(device_ids)` elements; tensors in nested dicts, lists and tuples
                are copied to the element's device.
            **kwargs: passed to every replica, with tensors copied to its device.

        Returns:
            The gathered outputs: tensors concatenated, scalars as a vector (N,), dicts, lists
            and tuples entry by entry.

        Raises:
            ValueError: `inputs` is not a list, is empty or longer than `device_ids`, or the
                outputs cannot be gathered.
            BaseException: the exception of a replica, with its traceback, when all replicas have
                ended.
        """
        if not isinstance(inputs, (list, tuple)) or not 0 < len(inputs) <= len(self.device_ids):
            got = len(inputs) if isinstance(inputs, (list, tuple)) else type(inputs).__name__
            raise ValueError(
                f"inputs must be a list of 1 to {len(self.device_ids)} elements, one per device; "
                f"got {got}"
            )
        prepare = getattr(self.module, "prepare_scatter", None)
        if prepare is not None:
            inputs = prepare(list(inputs))
        devices = self.device_ids[: len(inputs)]
        scattered = scatter(inputs, devices)
        all_kwargs = scatter([kwargs] * len(inputs), devices)

        if len(devices) == 1:
            outputs = [self.module(scattered[0], **all_kwargs[0])]
        else:
            replicas = replicate(self.module, devices)
            run = execute_replication_callbacks(replicas, self.timeout)
            arguments = [(element,) for element in scattered]
            outputs = parallel_apply(self._threads, run, replicas, arguments, all_kwargs, devices)
            keep_buffers(self.module, replicas[0])
        return gather(outputs, self.output_device, self.dim)


def _replicate(
    self: nn.DataParallel, module: nn.Module, device_ids: Sequence[Device]
) -> list[nn.Module]:
    replicas = replicate(module, [parse_device(device) for device in device_ids])
    run = execute_replication_callbacks(replicas)
    # For parallel_apply, which torch calls with the replicas only.
    replicas[0].__dict__["_replica_run"] = run
    return replicas


def _parallel_apply(
    self: nn.DataParallel, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any
) -> list[Any]:
    run: ReplicaRun = replicas[0].__dict__["_replica_run"]
    devices = [parse_device(device) for device in self.device_ids[: len(replicas)]]
    all_kwargs: Sequence[Mapping[str, Any]] = kwargs or [{}] * len(replicas)
    # Stored in the torch module when it is first used, as its constructor is torch's.
    threads: ReplicaThreads = self.__dict__.setdefault("_replica_threads", ReplicaThreads())
    return parallel_apply(threads, run, replicas, inputs, all_kwargs, devices)


class DataParallelWithCallback(nn.DataParallel):
    """`torch.nn.DataParallel` with replication callbacks.

    The method `__data_parallel_replicate__(ctx, copy_id)` of every submodule that defines it is
    called in each replica: the copies of one submodule share `ctx`, and copy 0 is called first.
    """

    replicate = _replicate  # type: ignore[assignment]
    parallel_apply = _parallel_apply  # type: ignore[assignment]


def patch_replication_callback(data_parallel: nn.Module) -> None:
    """Adds replication callbacks to an existing `torch.nn.DataParallel`.

    A `UserScatteredDataParallel` has them already.

    Raises:
        ValueError: the argument is neither.
    """
    if isinstance(data_parallel, UserScatteredDataParallel):
        return
    if not isinstance(data_parallel, nn.DataParallel):
        raise ValueError(
            f"data_parallel is a {type(data_parallel).__name__}: give a torch.nn.DataParallel or "
            "a UserScatteredDataParallel"
        )
    data_parallel.replicate = MethodType(_replicate, data_parallel)  # type: ignore[method-assign]
    data_parallel.parallel_apply = MethodType(  # type: ignore[method-assign]
        _parallel_apply, data_parallel
    )
