"""Attention between the pixels of feature maps, in memory linear in the number of pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mit_semseg.matrices import is_exporting
from mit_semseg.models.pyramid import without_autocast

# Attention weights (queries x keys) in memory at a time: 4 MiB in float32, which fits a CPU's
# cache, and 64 MiB on other devices.
_CHUNK_CPU, _CHUNK = 1 << 20, 1 << 24


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale * query key^T) value, without storing all attention weights at once.

    Queries are processed in chunks, and the backward pass recomputes the weights of each chunk.
    Memory is linear in queries and keys on any device and for any widths;
    `F.scaled_dot_product_attention` stores all weights if query and value differ in width, as in
    DANet. Scores are computed in at least float32, also under autocast, because unscaled scores
    overflow in float16.

    Paper: Rabe and Staats 2021, arXiv:2112.05682, sec. 3, with chunks of queries only.

    Args:
        query: (B, N, D) float.
        key: (B, M, D).
        value: (B, M, E).
        scale: factor of the scores.

    Returns:
        (B, N, E), in the dtype of `value`.
    """
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
    if is_exporting():
        return (_weights(q * scale, k) @ v).to(value.dtype)
    result: Tensor = torch.ops.mit_semseg.attention(q * scale, k, v)
    return result.to(value.dtype)


def attend_maps(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """`attend` between the pixels of feature maps.

    Args:
        query: (B, D, H, W) float.
        key: (B, D, h, w).
        value: (B, E, h, w).
        scale: factor of the scores.

    Returns:
        (B, E, H, W), in the dtype of `value`.
    """
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, scale).transpose(1, 2).unflatten(2, query.shape[2:])


# Custom operators: `torch.compile` would unroll the loops over chunks and compile them again for
# every image size. `torch.library.custom_op` is not used, as it imports the compiler when called.
torch.library.define("mit_semseg::attention", "(Tensor query, Tensor key, Tensor value) -> Tensor")
torch.library.define(
    "mit_semseg::attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("mit_semseg::attention", "default")
def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T) value."""
    result = _empty_result(query, key, value)
    with without_autocast(query.device):
        chunks = (x.split(_chunk_size(query, key), dim=1) for x in (query, result))
        for q, out in zip(*chunks, strict=True):
            # Not a list and `torch.cat`: that would fragment the memory between chunks.
            out.copy_(_weights(q, key) @ value)
    return result


@torch.library.impl("mit_semseg::attention_backward", "default")
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, accumulated in place."""
    grad_query, grad_key, grad_value = gradients = _empty_gradients(grad, query, key, value)
    grad_key.zero_()
    grad_value.zero_()
    chunks = (x.split(_chunk_size(query, key), dim=1) for x in (query, grad, grad_query))
    with without_autocast(query.device):
        for q, grad_out, grad_q in zip(*chunks, strict=True):
            weights = _weights(q, key)
            grad_value.baddbmm_(weights.transpose(1, 2), grad_out)
            # Gradient of the weights, and through the softmax that of the scores.
            grad_scores = (grad_out @ value.transpose(1, 2)).mul_(weights)
            grad_scores.addcmul_(weights, grad_scores.sum(dim=2, keepdim=True), value=-1)
            grad_q.copy_(grad_scores @ key)
            grad_key.baddbmm_(grad_scores.transpose(1, 2), q)
    return gradients


@torch.library.register_fake("mit_semseg::attention")
def _empty_result(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value.new_empty(*query.shape[:2], value.shape[2])


@torch.library.register_fake("mit_semseg::attention_backward")
def _empty_gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in inputs)


torch.library.register_autograd(
    "mit_semseg::attention",
    lambda ctx, grad: torch.ops.mit_semseg.attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@register_flop_formula(torch.ops.mit_semseg.attention)
def _flop(query: torch.Size, key: torch.Size, value: torch.Size, **_: Any) -> int:
    return 2 * query[0] * query[1] * key[1] * (query[2] + value[2])


def _chunk_size(query: Tensor, key: Tensor) -> int:
    """Number of queries processed at a time."""
    limit = _CHUNK_CPU if query.device.type == "cpu" else _CHUNK
    return max(limit // (query.shape[0] * key.shape[1]), 1)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(1, 2)).softmax(dim=2)
