"""Attention among the pixels of feature maps, in memory that grows with them linearly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mit_semseg.models.pyramid import without_autocast

# Weights (queries x keys) held at a time: 16 MiB in float32.
_BAND = 1 << 22


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale * query key^T) value, without ever holding all weights.

    Queries are gone through in bands; the backward pass computes the weights of a band again. So
    it holds 4 million weights at a time, on any device, with any widths: torch's own
    `scaled_dot_product_attention` falls back to all of them where query and value differ in width,
    as they do in DANet. Scores are computed in float32 at least, also under autocast: unscaled ones
    run over in float16.

    Args:
        query: (B, N, D) float.
        key: (B, M, D).
        value: (B, M, E).
        scale: multiplies the scores.

    Returns:
        (B, N, E), in the type of `value`.
    """
    rows = max(_BAND // (query.shape[0] * key.shape[1]), 1)
    with without_autocast(query.device):
        q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
        if rows >= query.shape[1]:
            return _weighted(q * scale, k, v).to(value.dtype)
        bands = [
            checkpoint(_weighted, band, k, v, use_reentrant=False, preserve_rng_state=False)
            for band in (q * scale).split(rows, dim=1)
        ]
        return torch.cat(bands, dim=1).to(value.dtype)


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


def _weighted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(1, 2)).softmax(dim=2) @ value
