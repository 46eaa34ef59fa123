"""A cache of constant matrices that depend only on the size of an image."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_export = threading.local()


@contextmanager
def exporting() -> Iterator[None]:
    """Context in which this thread records graphs that other libraries run.

    Layers then use common operations, and no size of the recorded image becomes a constant.
    """
    _export.active = True
    try:
        yield
    finally:
        _export.active = False


def is_exporting() -> bool:
    """Whether the thread is in `exporting`."""
    return getattr(_export, "active", False)


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is an ordinary one, not one of torch.compile or a trace, whose sizes may be
    symbolic."""
    traced = is_exporting() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and type(x) in (Tensor, nn.Parameter)


class MatrixCache:
    """A least-recently-used cache of constant tensors per device.

    Args:
        limit: bytes per device.
    """

    def __init__(self, limit: int = 64 << 20) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._held: dict[torch.device, OrderedDict[Hashable, Tensor]] = {}
        self._bytes: dict[torch.device, int] = {}
        self._recorders: dict[int, list[Tensor]] = {}  # by thread

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The matrix of a key.

        Args:
            key: identifies the matrix, including its dtype.
            device: of the matrix.
            make: computes it on the CPU.
        """
        if device.type == "cuda":
            # Per stream: another stream could read it before the copy is done.
            key = key, torch.cuda.current_stream(device).cuda_stream
        with self._lock:
            held = self._held.setdefault(device, OrderedDict())
            matrix = held.get(key)
            if matrix is not None:
                held.move_to_end(key)
        if matrix is None:
            # Not an inference tensor, since it may be used in training later.
            with torch.inference_mode(False):
                matrix = to_device(make(), device)
            self._put(held, key, device, matrix)
        recorder = self._recorders.get(threading.get_ident())
        if recorder is not None:
            recorder.append(matrix)
        return matrix

    def _put(
        self, held: OrderedDict[Hashable, Tensor], key: Hashable, device: torch.device, x: Tensor
    ) -> None:
        with self._lock:
            if key not in held:
                self._bytes[device] = self._bytes.get(device, 0) + x.nbytes
            held[key] = x
            while self._bytes[device] > self.limit and len(held) > 1:
                _, dropped = held.popitem(last=False)
                self._bytes[device] -= dropped.nbytes

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Context that collects the matrices used by this thread, which a CUDA graph must keep."""
        used: list[Tensor] = []
        self._recorders[threading.get_ident()] = used
        try:
            yield used
        finally:
            del self._recorders[threading.get_ident()]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; asynchronously from the CPU to a GPU."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


MATRICES = MatrixCache()
