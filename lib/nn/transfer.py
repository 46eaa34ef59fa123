"""Moving nested inputs to devices, and nested outputs back together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..utils.convert import rebuilt

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def user_scattered_collate(batch: list[Any]) -> list[Any]:
    """Returns the list of samples as it is: the user decides what goes to which device."""
    return batch


def parse_device(device: int | str | torch.device, what: str = "device") -> torch.device:
    """A CUDA index, `"cuda:1"`, `"cpu"` or a `torch.device` as a device with an index.

    Raises:
        ValueError: there is no such device here.
    """
    usage = f"{what} = {device!r}: use a CUDA index from 0, 'cuda:N' or 'cpu'"
    # torch.device takes True and -1.
    if isinstance(device, int) and (isinstance(device, bool) or device < 0):
        raise ValueError(usage)
    try:
        parsed = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise ValueError(usage) from error
    if parsed.type == "cpu":
        return torch.device("cpu")  # "cpu:0" is the same place but compares unequal
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
    """Copies the tensors inside nested dicts, lists and tuples to a device.

    Args:
        obj: nested containers; what is not a tensor is passed through.
        dev: a CUDA index, `"cuda:N"`, `"cpu"` or `torch.device`.
        main_stream: the stream that will use the copies when they are made on another one; it
            is recorded on them, so that their memory is not reused too early.
    """
    device = parse_device(dev, "dev")

    def copy(tensor: Tensor) -> Tensor:
        # A copy to the host that does not block could be read before it has arrived.
        moved = tensor.to(device, non_blocking=device.type == "cuda")
        if main_stream is not None and moved.is_cuda:
            moved.record_stream(main_stream)
        return moved

    return map_tensors(copy, obj)


def map_tensors(function: Callable[[Tensor], Any], obj: Any) -> Any:
    """Applies a function to every tensor inside nested dicts, lists and tuples."""
    if isinstance(obj, Tensor):
        return function(obj)
    if isinstance(obj, (list, tuple, Mapping)):
        return rebuilt(partial(map_tensors, function), obj)
    return obj


def scatter(inputs: Sequence[Any], devices: Sequence[torch.device]) -> list[Any]:
    """Copies element i to device i; from the host to CUDA on a side stream of that device."""
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
            side.wait_stream(main)  # the source may still be computed there
        with torch.cuda.stream(side):
            scattered.append(async_copy_to(element, device, main))
        main.wait_stream(side)
    return scattered


def _holds_cuda(obj: Any) -> bool:
    found: list[bool] = []
    map_tensors(lambda tensor: found.append(tensor.is_cuda), obj)
    return any(found)


def gather(outputs: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """Joins the replicas' outputs, structure by structure, on one device.

    Tensors are concatenated along `dim`; 0-dim tensors and Python numbers become a vector with
    one entry per replica; dicts, lists and tuples are joined entry by entry; of anything else
    the list is returned, or None when all are None.

    Raises:
        ValueError: the replicas returned different structures, or tensors that do not fit.
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
            raise ValueError(f"replicas returned {[len(o) for o in outputs]} items: no pairing")
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
        f"replicas returned tensors of shapes {shapes}, which do not join along dimension {dim}: "
        "return tensors that differ there only, or scalars"
    )
