"""TF-slim's MobileNetV2 -> the published names and input convention."""

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
    """A TF-slim MobileNetV2 (torchvision's names) -> the published names and input convention.

    TF-slim feeds z = 2x - 1 for RGB x in [0, 1]; this project y = (x - mean) / std, so that
    z = 2 std y + (2 mean - 1). The factor goes into the first convolution and the constant into
    the running mean that follows it. TF-slim's BatchNorm adds 1e-3 to the variance, torch's 1e-5:
    the difference is added to the stored variances. In evaluation mode this is exact wherever
    no zero padding is seen; padding stands for grey there and for the mean colour here. (On even
    sizes TF's "SAME" padding also samples stride-2 convolutions one pixel further on; nothing
    makes up for that, and fine-tuning does not mind.)

    Args:
        state: the tensors.
        mean: (3,) of this project's input.
        std: (3,) likewise.

    Returns:
        New tensors, float32.
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
