"""Copies of a module that share its parameters, on any devices, repeated ones too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel._functions import Broadcast

from .exchange import CallbackContext, ReplicaRun


def replicate(module: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    """Makes one copy of a module per device; gradients of all copies reach the original.

    A copy on the original's device uses the very same parameters; elsewhere it uses
    differentiable copies. Copy 0 also uses the original's buffers, so that what it updates in
    place survives; the others get buffers of their own. Tied parameters and modules stay tied.

    Args:
        module: all parameters and buffers on `devices[0]`.
        devices: where the copies go; a device may repeat.

    Raises:
        ValueError: a parameter or buffer is not on `devices[0]`.
    """
    parameters: list[Tensor] = list(dict.fromkeys(module.parameters()))
    buffers: list[Tensor] = list(dict.fromkeys(module.buffers()))
    for tensor in parameters + buffers:
        if tensor.device != devices[0]:
            raise ValueError(
                f"the module has tensors on {tensor.device}, but device_ids[0] is {devices[0]}: "
                f"call module.to('{devices[0]}') first"
            )
    parameters_on = _copies_per_device(parameters, devices)

    replicas = []
    for copy_id, device in enumerate(devices):
        tensors: dict[Tensor, Tensor] = dict(zip(parameters, parameters_on[device], strict=True))
        for buffer in buffers:
            tensors[buffer] = buffer if copy_id == 0 else buffer.detach().to(device, copy=True)
        replicas.append(_copy_tree(module, tensors))
    return replicas


def _copies_per_device(
    parameters: list[Tensor], devices: Sequence[torch.device]
) -> dict[torch.device, list[Tensor]]:
    """The parameters on each distinct device; on the first one they are themselves."""
    home, *others = dict.fromkeys(devices)
    copies = {home: parameters}
    cuda = [device for device in others if device.type == "cuda"]
    if parameters and cuda and home.type == "cuda":
        # Coalesced: hundreds of small tensors travel in a few transfers, both ways.
        flat = Broadcast.apply([home.index, *(device.index for device in cuda)], *parameters)
        for i, device in enumerate(cuda, start=1):
            copies[device] = list(flat[i * len(parameters) : (i + 1) * len(parameters)])
    for device in others:
        if device not in copies:
            copies[device] = [parameter.to(device) for parameter in parameters]
    return copies


def _copy_tree(module: nn.Module, tensors: dict[Tensor, Tensor]) -> nn.Module:
    """Copies a module and its children, with every tensor replaced by its counterpart."""
    originals = list(module.modules())
    copies = {original: original._replicate_for_data_parallel() for original in originals}
    for original, copy in copies.items():
        for key, child in original._modules.items():
            copy._modules[key] = None if child is None else copies[child]
        for key, parameter in original._parameters.items():
            # setattr lets modules that keep their own lists (RNNs) follow; a plain tensor then
            # moves to _parameters, so that parameters() of a copy works as for any module.
            setattr(copy, key, None if parameter is None else tensors[parameter])
            copy.__dict__.pop(key, None)
            copy._parameters[key] = None if parameter is None else tensors[parameter]  # type: ignore[assignment]
        for key, buffer in original._buffers.items():
            copy._buffers[key] = None if buffer is None else tensors[buffer]
    return copies[module]


def keep_buffers(module: nn.Module, replica: nn.Module) -> None:
    """Takes over buffers that replica 0 replaced instead of updating them in place."""
    for original, copy in zip(module.modules(), replica.modules(), strict=False):
        for key in original._buffers:
            if copy._buffers.get(key) is not original._buffers[key]:
                original._buffers[key] = copy._buffers.get(key)


def execute_replication_callbacks(
    modules: Sequence[nn.Module], timeout: float = 600.0
) -> ReplicaRun:
    """Calls `__data_parallel_replicate__(ctx, copy_id)` of every submodule that defines it.

    The copies of one submodule get the same `ctx`; copy 0 is called first.

    Args:
        modules: copies of one module, in device order.
        timeout: seconds a replica waits for the others at one layer.

    Returns:
        The run the contexts belong to.
    """
    run = ReplicaRun(len(modules), timeout)
    contexts = [CallbackContext(run, name) for name, _ in modules[0].named_modules()]
    for copy_id, replica in enumerate(modules):
        for context, submodule in zip(contexts, replica.modules(), strict=True):
            callback = getattr(submodule, "__data_parallel_replicate__", None)
            if callback is not None:
                callback(context, copy_id)
    return run
