"""Conversion of TF-slim's MobileNetV2 to the published names and input normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mit_semseg.weights.sources import IMAGENET_MEAN, IMAGENET_STD
from mit_semseg.weights.torchvision import rename_torchvision_mobilenet


def convert_tfslim_mobilenet(
    state: Mapping[str, Tensor],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> dict[str, Tensor]:
    """Converts a TF-slim MobileNetV2 (torchvision's names) to the published names and input.

    The input of TF-slim is z = 2x - 1 for RGB x in [0, 1], the one here y = (x - mean) / std, so
    z = 2 std y + (2 mean - 1). The factor is merged into the first convolution, and the constant
    into the running mean after it. BatchNorm's eps is 1e-3 in TF-slim and 1e-5 here: the difference
    is added to the running variances. In evaluation mode the results are equal except near the
    image border, where zero padding is grey there and the mean colour here. (On even sizes, TF's
    "SAME" padding also shifts strided convolutions by one pixel, which is not corrected.)

    Args:
        state: the tensors.
        mean: (3,) mean of the input normalisation here.
        std: (3,) its standard deviation.

    Returns:
        New tensors, float32.

    Raises:
        ValueError: the tensors are not those of a MobileNetV2.
    """
    out = rename_torchvision_mobilenet(state)
    first, shift = "features.0.0.weight", "features.0.1.running_mean"
    if first not in out or shift not in out:
        raise ValueError(f"not a MobileNetV2: {first} or {shift} is missing")
    weight = out[first].double()  # (32, 3, 3, 3)
    scale = 2.0 * torch.tensor(list(std), dtype=torch.float64)
    constant = 2.0 * torch.tensor(list(mean), dtype=torch.float64) - 1.0
    out[first] = (weight * scale.view(1, 3, 1, 1)).float()
    out[shift] = (out[shift].double() - (weight.sum((2, 3)) * constant).sum(1)).float()
    for key, value in out.items():
        if key.endswith("running_var"):
            out[key] = (value.double() + (1e-3 - 1e-5)).float()
    return out
