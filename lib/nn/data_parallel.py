"""Data parallelism over a list of inputs, one per device, each of its own size."""

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

    Unlike `torch.nn.DataParallel`, which cuts one batch into equal parts, the elements may have
    any sizes, and the devices may be the CPU and may repeat. Synchronised layers in the module
    see all replicas. One input runs on the module itself, without threads. The others have a thread
    for each replica, which lasts as long as this object.

    Before the inputs are copied, `module.prepare_scatter(inputs) -> inputs` is called if the
    module has it: the only moment when one place sees the whole list.

    Of what replicas change in themselves, the buffers of replica 0 survive, nothing else.

    Args:
        module: has its parameters and buffers on the first device.
        device_ids: CUDA indices, `"cuda:N"`, `"cpu"` or `torch.device`; a device may repeat.
            None: all GPUs there are, else the CPU.
        output_device: where outputs are gathered; None: the first device.
        dim: dimension along which output tensors are concatenated.
        timeout: seconds a replica waits for the others at one synchronised layer; after them a
            forward pass in which one has failed waits for none that hangs.

    Raises:
        ValueError: no device is given, or one does not exist.

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
            inputs: at least one element, at most one per device; tensors inside nested dicts,
                lists and tuples are copied to the element's device.
            **kwargs: given to every replica, tensors copied likewise.

        Returns:
            The outputs gathered: tensors concatenated, scalars as a vector (N,), dicts, lists
            and tuples entry by entry.

        Raises:
            ValueError: `inputs` is no list, is empty or longer than `device_ids`, or the
                outputs cannot be joined.
            BaseException: whatever a replica raised, with its traceback, when all replicas have
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
    # The run has to reach parallel_apply, which torch calls with the replicas alone.
    replicas[0].__dict__["_replica_run"] = run
    return replicas


def _parallel_apply(
    self: nn.DataParallel, replicas: Sequence[nn.Module], inputs: Sequence[Any], kwargs: Any
) -> list[Any]:
    run: ReplicaRun = replicas[0].__dict__["_replica_run"]
    devices = [parse_device(device) for device in self.device_ids[: len(replicas)]]
    all_kwargs: Sequence[Mapping[str, Any]] = kwargs or [{}] * len(replicas)
    # Kept with the torch module, which knows of no threads when it is made.
    threads: ReplicaThreads = self.__dict__.setdefault("_replica_threads", ReplicaThreads())
    return parallel_apply(threads, run, replicas, inputs, all_kwargs, devices)


class DataParallelWithCallback(nn.DataParallel):
    """`torch.nn.DataParallel` whose replicas' submodules learn about each other.

    Every submodule that defines `__data_parallel_replicate__(ctx, copy_id)` is called with it on
    each replica: the copies of one submodule share `ctx`, and copy 0 is called first.
    """

    replicate = _replicate  # type: ignore[assignment]
    parallel_apply = _parallel_apply  # type: ignore[assignment]


def patch_replication_callback(data_parallel: nn.Module) -> None:
    """Gives an existing `torch.nn.DataParallel` what `DataParallelWithCallback` has.

    A `UserScatteredDataParallel` has it already and is left as it is.

    Raises:
        ValueError: the argument is neither of the two.
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
