"""What the code under test is compared with, written as plainly as can be."""

import numpy as np
import torch
from PIL import Image

from mit_semseg.config import DataOptions

NEAREST, BILINEAR = Image.Resampling.NEAREST, Image.Resampling.BILINEAR


def normalize(image, options=None):
    """(H, W, 3) uint8 RGB -> (3, H, W) float32 as the encoder expects it."""
    options = options or DataOptions()
    if options.color_order == "BGR":
        image = image[:, :, ::-1]
    values = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()  # 3, H, W
    if options.value_range == 1:
        values.div_(255.0)
    mean = torch.tensor(options.mean, dtype=torch.float32)[:, None, None]
    std = torch.tensor(options.std, dtype=torch.float32)[:, None, None]
    return values.sub_(mean).div_(std)


def levels(normalized, image):
    """The largest difference, in grey levels, between a normalised image and these pixels."""
    difference = (normalized - normalize(image)).abs()
    return float((difference * torch.tensor(DataOptions.std)[:, None, None] * 255).max())


def apart(a, b):
    """Grey levels between two images."""
    return np.abs(a.astype(int) - b.astype(int))


def pillow_resize(image, size):
    return np.asarray(Image.fromarray(image).resize(size, BILINEAR))
