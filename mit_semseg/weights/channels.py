"""Pretrained filters of red, green and blue for images of other channels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

log = logging.getLogger("mit_semseg")

COLORS = ("red", "green", "blue")


def mixture(channels: int, bands: Sequence[str] = ()) -> Tensor:
    """How the filter of each channel is mixed from those of red, green and blue.

    Without `bands`, the first three keep theirs, and others, such as depth, have the mean. With
    bands of which some are called red, green or blue, these have the filter of that colour, and the
    others the mean; where none is, the three repeat, as in timm. With bands all filters are
    multiplied by 3 / channels, so that the sum over channels keeps its size.

    Returns:
        (channels, 3) float32.
    """
    names = [band.casefold() for band in bands] or list(COLORS)
    rows = torch.full((channels, 3), 1 / 3)
    cycle = bool(bands) and channels > 1 and not set(names) & set(COLORS)
    for i in range(channels):
        name = COLORS[i % 3] if cycle else names[i] if i < len(names) else ""
        if name in COLORS:
            rows[i] = torch.eye(3)[COLORS.index(name)]
    return rows * 3 / channels if bands else rows


def mixed(filters: Tensor, channels: int, bands: Sequence[str] = ()) -> Tensor:
    """Filters (n, 3, h, w) of red, green and blue as (n, channels, h, w), by `mixture`."""
    rows = mixture(channels, bands).to(filters)
    return torch.einsum("nkhw,ck->nchw", filters, rows)


def adapted(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], bands: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Tensors of a file, whose filters of three channels become those of a module.

    Args:
        state: the file's; those that differ from the module's in other ways are left as they are.
        own: the module's, by the same names.
        bands: `DATASET.bands`, which one line in the log says the filters of.
    """
    found = dict(state)
    for key, value in state.items():
        n, channels, *sides = own[key].shape if key in own and own[key].dim() == 4 else (0, 0)
        if channels not in (0, 3) and value.shape == (n, 3, *sides):
            found[key] = mixed(value, channels, bands)
    return found


def describe_filters(bands: Sequence[str]) -> str:
    """What `mixture` does, in one line."""
    colors = [band for band in bands if band.casefold() in COLORS]
    others = [band for band in bands if band not in colors]
    if not colors:
        kind = "those of red, green and blue, repeated" if len(bands) > 1 else "the mean of all"
        return f"filters of the bands {', '.join(bands)}: {kind}, times {3 / len(bands):.3g}"
    return (
        f"filters of the bands {', '.join(colors)}: the pretrained ones; "
        f"{', '.join(others) or 'no others'}: their mean; all times {3 / len(bands):.3g}"
    )
