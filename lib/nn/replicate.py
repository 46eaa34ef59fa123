"""Copies of a module that share its parameters, on any devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel._functions import Broadcast

from .exchange import CallbackContext, ReplicaRun


def replicate(module: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    """Makes one copy of a module per device; gradients of all copies reach the original.

    A copy on the original's device uses the same parameters; on other devices it has
    differentiable copies of them. Copy 0 also uses the original's buffers, so that its in-place
    updates are kept; the others have copies. Tied parameters and modules stay tied.

    Args:
        module: all parameters and buffers on `devices[0]`.
        devices: device of each copy; a device can repeat.

    Raises:
        ValueError: a parameter or buffer is not on `devices[0]`.
    """
    originals = list(module.modules())
    parameters = _distinct(original._parameters for original in originals)
    buffers = _distinct(original._buffers for original in originals)
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
        own = _copies_of_buffers(buffers, device) if copy_id else buffers
        tensors.update(zip(buffers, own, strict=True))
        replicas.append(_copy_tree(originals, tensors))
    return replicas


def _distinct(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The tensors of all groups, without duplicates."""
    tensors = (tensor for group in groups for tensor in group.values() if tensor is not None)
    return list(dict.fromkeys(tensors))


@torch.no_grad()
def _copies_of_buffers(buffers: list[Tensor], device: torch.device) -> list[Tensor]:
    copies = [torch.empty_like(buffer, device=device) for buffer in buffers]
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for copy, buffer in zip(copies, buffers, strict=True):
        to, source = by_type.setdefault(buffer.dtype, ([], []))
        to.append(copy)
        source.append(buffer)
    for to, source in by_type.values():
        torch._foreach_copy_(to, source)  # one kernel per device and dtype
    return copies


def _copies_per_device(
    parameters: list[Tensor], devices: Sequence[torch.device]
) -> dict[torch.device, list[Tensor]]:
    """The parameters on each distinct device; on the first one, the originals."""
    home, *others = dict.fromkeys(devices)
    copies = {home: parameters}
    cuda = [device for device in others if device.type == "cuda"]
    if parameters and cuda and home.type == "cuda":
        # Coalesced: hundreds of small tensors are copied in a few transfers, also in backward.
        flat = Broadcast.apply([home.index, *(device.index for device in cuda)], *parameters)
        for i, device in enumerate(cuda, start=1):
            copies[device] = list(flat[i * len(parameters) : (i + 1) * len(parameters)])
    for device in others:
        if device not in copies:
            copies[device] = [parameter.to(device) for parameter in parameters]
    return copies


def _copy_tree(originals: list[nn.Module], tensors: dict[Tensor, Tensor]) -> nn.Module:
    """Copies a module, `originals[0]`, given all its submodules, and replaces every tensor."""
    copies = {original: _shallow_copy(original) for original in originals}
    for original, copy in copies.items():
        for key, child in original._modules.items():
            copy._modules[key] = None if child is None else copies[child]
        for key, value in original.__dict__.items():
            # Some modules have plain lists of their children.
            if type(value) is list and any(isinstance(x, nn.Module) for x in value):
                copy.__dict__[key] = [
                    copies.get(x, x) if isinstance(x, nn.Module) else x for x in value
                ]
        # RNNs update lists of their parameters in __setattr__. It is slow, so it is called only for
        # classes that override it.
        overrides = type(original).__setattr__ is not nn.Module.__setattr__
        for key, parameter in original._parameters.items():
            tensor = None if parameter is None else tensors[parameter]
            if overrides:
                setattr(copy, key, tensor)
                copy.__dict__.pop(key, None)
            # Plain tensors, too, so that parameters() of a copy works.
            copy._parameters[key] = tensor  # type: ignore[assignment]
        for key, buffer in original._buffers.items():
            copy._buffers[key] = None if buffer is None else tensors[buffer]
    return copies[originals[0]]


def _shallow_copy(module: nn.Module) -> nn.Module:
    """Same as `nn.Module._replicate_for_data_parallel`, whose overhead exceeds that of a small
    network."""
    kind = type(module)
    if kind._replicate_for_data_parallel is not nn.Module._replicate_for_data_parallel:
        return module._replicate_for_data_parallel()
    copy = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(
        _parameters={},
        _buffers=dict(module._buffers),
        _modules=dict(module._modules),
        _is_replica=True,
    )
    return copy


def keep_buffers(module: nn.Module, replica: nn.Module) -> None:
    """Copies buffers that replica 0 replaced, instead of updating them in place, to the module."""
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
        timeout: seconds that a replica waits for the others at one layer.

    Returns:
        The run of these copies.
    """
    run = ReplicaRun(len(modules), timeout)
    contexts = {
        place: CallbackContext(run, name)
        for place, (name, module) in enumerate(modules[0].named_modules())
        if _callback(module) is not None
    }
    for copy_id, replica in enumerate(modules):
        for place, module in enumerate(replica.modules()):
            if place in contexts:
                _callback(module)(contexts[place], copy_id)
    return run


def _callback(module: nn.Module) -> Any:
    # Checked first, because nn.Module.__getattr__ is slow if an attribute does not exist.
    name = "__data_parallel_replicate__"
    known = hasattr(type(module), name) or name in module.__dict__
    return getattr(module, name) if known else None
