"""Attention among the pixels of feature maps, in memory that grows with them linearly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mit_semseg.models.pyramid import without_autocast

# Weights (queries x keys) held at a time: 4 MiB in float32, for a CPU's cache; 64 MiB elsewhere.
_BAND_CPU, _BAND = 1 << 20, 1 << 24


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale * query key^T) value, without ever holding all weights.

    Queries are gone through in bands, and the backward pass computes the weights of a band again.
    So memory is linear in queries and keys on any device, with any widths; torch's own
    `scaled_dot_product_attention` falls back to all weights where query and value differ in width,
    as they do in DANet. Scores are computed in float32 at least, also under autocast: unscaled ones
    run over in float16.

    Paper: Rabe and Staats 2021, arXiv:2112.05682, sec. 3, with bands of queries only.

    Args:
        query: (B, N, D) float.
        key: (B, M, D).
        value: (B, M, E).
        scale: multiplies the scores.

    Returns:
        (B, N, E), in the type of `value`.
    """
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
    return _run(q * scale, k, v).to(value.dtype)


def attend_maps(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """`attend` among the pixels of maps.

    Args:
        query: (B, D, H, W) float.
        key: (B, D, h, w).
        value: (B, E, h, w).
        scale: multiplies the scores.

    Returns:
        (B, E, H, W), in the type of `value`.
    """
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, scale).transpose(1, 2).unflatten(2, query.shape[2:])


def leave_uncompiled() -> None:
    """From now on `torch.compile` goes round the loops over bands.

    Unrolled they would be compiled anew for every size of image. This is called when somebody
    compiles, and not before: it imports the compiler, which takes more than a second.
    """
    global _run
    if _run is _banded:  # another object would have what is compiled already compiled again
        _run = torch.compiler.disable(_banded)


def _banded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # Not around the call of `_run`: a graph break within a context is compiled again at every call
    # by some releases (torch 2.11).
    with without_autocast(query.device):
        result: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return result


_run = _banded


class _Attention(torch.autograd.Function):
    """softmax(query key^T) value, and its gradients, which add up in place."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        result = value.new_empty(*query.shape[:2], value.shape[2])
        bands = (x.split(_rows(query, key), dim=1) for x in (query, result))
        for band, part in zip(*bands, strict=True):
            # Parts kept in a list would lie between the weights, and split the free memory.
            part.copy_(_weights(band, key) @ value)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        grad_value = torch.zeros_like(value)
        bands = (x.split(_rows(query, key), dim=1) for x in (query, grad, grad_query))
        with without_autocast(query.device):
            for band, band_grad, result in zip(*bands, strict=True):
                weights = _weights(band, key)
                grad_value.baddbmm_(weights.transpose(1, 2), band_grad)
                # That of the weights, then through the softmax that of the scores.
                scores = (band_grad @ value.transpose(1, 2)).mul_(weights)
                scores.addcmul_(weights, scores.sum(dim=2, keepdim=True), value=-1)
                result.copy_(scores @ key)
                grad_key.baddbmm_(scores.transpose(1, 2), band)
        return grad_query, grad_key, grad_value


def _rows(query: Tensor, key: Tensor) -> int:
    """Queries of a band."""
    limit = _BAND_CPU if query.device.type == "cpu" else _BAND
    return max(limit // (query.shape[0] * key.shape[1]), 1)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(1, 2)).softmax(dim=2)
