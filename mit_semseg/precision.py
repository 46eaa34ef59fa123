"""Numeric precision on a device: type of weights and activations, and TensorFloat-32."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from mit_semseg.arguments import PRECISIONS


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 runs faster than float32 on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(capability and capability())


@dataclass(frozen=True)
class Precision:
    """Precision of convolutions and matrix products.

    Attributes:
        device: where they are computed.
        dtype: of weights and activations; in training of autocast.
        tf32: whether a GPU rounds float32 products to TensorFloat-32 (10 bits of mantissa). If not,
            products are in full float32; torch's default has TF32 convolutions.
        keeps_casts: whether autocast keeps the cast weights until the end of its context.
    """

    device: torch.device
    dtype: torch.dtype
    tf32: bool
    keeps_casts: bool = True

    @classmethod
    def of(cls, name: str, device: torch.device, key: str = "precision") -> Precision:
        """The precision with a given name.

        Args:
            name: fp32, full float32; tf32, float32 with TF32 products; bf16; fp16; auto, bf16 if
                the hardware is fast at it, else tf32 on an NVIDIA GPU and fp32 elsewhere.
            device: where to compute.
            key: the setting, for errors.

        Raises:
            ValueError: an unknown name, tf32 or fp16 on the CPU, tf32 on an Apple GPU, or a torch
                without autocast there.
        """
        if name not in PRECISIONS:
            raise ValueError(f"{key} is {name!r}; give one of {', '.join(PRECISIONS)}")
        if device.type == "cpu" and name in ("fp16", "tf32"):
            raise ValueError(f"{key} {name} needs a GPU; on the CPU use bf16 or fp32")
        if device.type == "mps" and name == "tf32":
            raise ValueError(f"{key} tf32 needs an NVIDIA GPU; on mps use fp32, bf16 or fp16")
        half = name in ("bf16", "fp16")
        if device.type == "mps" and half and not torch.amp.is_autocast_available("mps"):
            raise ValueError(
                f"{key} {name} needs autocast, which torch {torch.__version__} does not have on "
                "mps; use fp32"
            )
        if name == "auto":
            slow = "tf32" if device.type == "cuda" else "fp32"
            name = "bf16" if has_fast_bf16(device) else slow
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return cls(device, dtypes.get(name, torch.float32), tf32=name == "tf32")

    def autocast(self) -> AbstractContextManager[object]:
        """Context of autocast for training; weights stay in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=self.keeps_casts)

    def products(self) -> AbstractContextManager[object]:
        """Context that sets or clears TF32, for the whole process; the last to enter wins."""
        return contextlib.nullcontext() if self.device.type != "cuda" else _tf32(self.tf32)


_lock = threading.Lock()
_inside = 0
_outer: Callable[[], None] = lambda: None  # noqa: E731


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    global _inside, _outer
    with _lock:
        if not _inside:
            _outer = _remembered()
        _inside += 1
        _set_tf32(allowed)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _outer()


def _set_tf32(allowed: bool) -> None:
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9, where reading the old names may fail
        for part in _parts():
            part.fp32_precision = "tf32" if allowed else "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def _remembered() -> Callable[[], None]:
    """A function that restores the current setting."""
    if hasattr(torch.backends.cudnn, "conv"):
        before = [part.fp32_precision for part in _parts()]

        def restore() -> None:
            for part, value in zip(_parts(), before, strict=True):
                part.fp32_precision = value

        return restore
    conv, matmul = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def restore_old() -> None:
        torch.backends.cudnn.allow_tf32 = conv
        torch.set_float32_matmul_precision(matmul)

    return restore_old


def _parts() -> list[Any]:
    backends: Any = torch.backends
    return [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
