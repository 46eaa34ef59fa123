"""Scattering nested inputs to devices, and gathering nested outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..utils.convert import rebuilt

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def user_scattered_collate(batch: list[Any]) -> list[Any]:
    """Returns the list of samples unchanged: element i is the input of device i."""
    return batch


def parse_device(device: int | str | torch.device, what: str = "device") -> torch.device:
    """Converts a CUDA index, `"cuda:1"`, `"cpu"` or `torch.device` to a device with an index.

    Raises:
        ValueError: the device does not exist.
    """
    usage = f"{what} = {device!r}: use a CUDA index from 0, 'cuda:N' or 'cpu'"
    # torch.device accepts True and -1.
    if isinstance(device, int) and (isinstance(device, bool) or device < 0):
        raise ValueError(usage)
    try:
        parsed = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise ValueError(usage) from error
    if parsed.type == "cpu":
        return torch.device("cpu")  # "cpu:0" is the same device but compares unequal
    if parsed.type == "cuda":
        count = torch.cuda.device_count()
        index = parsed.index
        if index is None:
            index = torch.cuda.current_device() if count else 0
        if index >= count:
            raise ValueError(f"{what} = {device!r}: this machine has {count} CUDA device(s)")
        return torch.device("cuda", index)
    return parsed


def async_copy_to(
    obj: Any, dev: int | str | torch.device, main_stream: torch.cuda.Stream | None = None
) -> Any:
    """Copies the tensors in nested dicts, lists and tuples to a device.

    Args:
        obj: nested containers; other objects are unchanged.
        dev: a CUDA index, `"cuda:N"`, `"cpu"` or `torch.device`.
        main_stream: the stream that uses the copies, if they are made on another one; it is
            recorded, so that their memory is not reused too early.
    """
    device = parse_device(dev, "dev")

    def copy(tensor: Tensor) -> Tensor:
        # A non-blocking copy to the CPU could be read before it is complete.
        moved = tensor.to(device, non_blocking=device.type == "cuda")
        if main_stream is not None and moved.is_cuda:
            moved.record_stream(main_stream)
        return moved

    return map_tensors(copy, obj)


def map_tensors(function: Callable[[Tensor], Any], obj: Any) -> Any:
    """Applies a function to every tensor in nested dicts, lists and tuples."""
    if isinstance(obj, Tensor):
        return function(obj)
    if isinstance(obj, (list, tuple, Mapping)):
        return rebuilt(partial(map_tensors, function), obj)
    return obj


def scatter(inputs: Sequence[Any], devices: Sequence[torch.device]) -> list[Any]:
    """Copies element i to device i; to CUDA on a side stream of that device."""
    scattered = []
    for element, device in zip(inputs, devices, strict=True):
        if device.type != "cuda":
            scattered.append(async_copy_to(element, device))
            continue
        main = torch.cuda.current_stream(device)
        if device not in _side_streams:
            _side_streams[device] = torch.cuda.Stream(device)
        side = _side_streams[device]
        if _holds_cuda(element):
            side.wait_stream(main)  # the source may not be computed yet
        with torch.cuda.stream(side):
            scattered.append(async_copy_to(element, device, main))
        main.wait_stream(side)
    return scattered


def _holds_cuda(obj: Any) -> bool:
    found: list[bool] = []
    map_tensors(lambda tensor: found.append(tensor.is_cuda), obj)
    return any(found)


def gather(outputs: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """Gathers the outputs of replicas on one device.

    Tensors are concatenated along `dim`; 0-dim tensors and Python numbers become a vector with
    one entry per replica; dicts, lists and tuples are gathered entry by entry; of other objects
    the list is returned, or None if all are None.

    Raises:
        ValueError: the outputs have different structures, or tensors of incompatible shapes.
    """
    first = outputs[0]
    if all(isinstance(output, Tensor) for output in outputs):
        moved = [output.to(device) for output in outputs]
        if all(tensor.ndim == 0 for tensor in moved):
            return torch.stack(moved)
        _check_shapes(moved, dim)
        return torch.cat(moved, dim)
    if all(isinstance(output, (bool, int, float)) for output in outputs):
        return torch.tensor(list(outputs), device=device)
    if all(isinstance(output, Mapping) for output in outputs):
        if any(output.keys() != first.keys() for output in outputs):
            raise ValueError(f"replicas returned different keys: {[list(o) for o in outputs]}")
        return {key: gather([output[key] for output in outputs], device, dim) for key in first}
    if all(isinstance(output, (list, tuple)) for output in outputs):
        if any(len(output) != len(first) for output in outputs):
            raise ValueError(f"replicas returned lists of lengths {[len(o) for o in outputs]}")
        joined = [gather(items, device, dim) for items in zip(*outputs, strict=True)]
        if hasattr(first, "_fields"):
            return type(first)(*joined)
        return type(first)(joined)
    if all(output is None for output in outputs):
        return None
    kinds = {isinstance(output, (Tensor, Mapping, list, tuple)) for output in outputs}
    if kinds != {False}:
        raise ValueError(
            f"replicas returned different types: {[type(o).__name__ for o in outputs]}"
        )
    return list(outputs)


def _check_shapes(tensors: list[Tensor], dim: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    ranks = {len(shape) for shape in shapes}
    if len(ranks) == 1:
        rest = {shape[:dim] + shape[dim:][1:] for shape in shapes}
        if len(rest) == 1:
            return
    raise ValueError(
        f"replicas returned tensors of shapes {shapes}, which cannot be concatenated along "
        f"dimension {dim}: return tensors that differ in that dimension only, or scalars"
    )
