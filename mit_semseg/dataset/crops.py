"""Batches of random crops of one size."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from mit_semseg.config import DataOptions
from mit_semseg.dataset.sample import LoadedSample, Plan, Window
from mit_semseg.dataset.transforms import color_jitter, fitted_size, jitter_factors, random_window

_SIGMA = (0.1, 2.0)  # of the blur, in pixels
_IGNORED = -1


class RandomCrops:
    """Random crops with scaling, colour jitter, blur, rotation and flips.

    The augmentation of PSPNet (Zhao et al. 2017, arXiv:1612.01105, sec. 5.1: flips, scales of 0.5
    to 2, rotations of up to 10 degrees, blur), and colour jitter. In this order:

    1. The image is resized with its aspect ratio kept: to a short side from `imgSizes`, as in the
       aspect-preserving style and in evaluation, times a factor from `scale_jitter`.
    2. A random window of `crop_size` is chosen; a smaller side is used whole.
    3. Brightness, contrast and saturation change by `color_jitter`.
    4. With probability `random_blur` the image is blurred.
    5. Image and labels are rotated around the centre of the window, by up to `random_rotation`
       degrees. The corners are filled with what surrounds the window, and beyond the image with the
       mean colour, rounded to integers, and with ignored labels.
    6. With `random_flip`, half of the crops are flipped horizontally, and classes that a flip
       exchanges (`DataFormat.mirror_pairs`) are exchanged.
    7. A crop smaller than `crop_size` is padded on the right and bottom of the batch, with the
       exact mean colour and with ignored labels.

    Factors and angles are uniformly distributed; the paper does not specify it.

    Image and labels are transformed by the same functions (`torchvision.transforms.v2.functional`),
    labels with nearest-neighbour interpolation. So is depth, because means of depths across an edge
    are wrong; it is neither colour-jittered nor blurred.

    torchvision's transform classes are not used, because they draw from torch's global generator;
    here all random numbers are from the generator of the sample. Two of its functions are not used:
    `adjust_contrast` computes a mean whose rounding depends on the number of threads, so that
    samples would depend on `TRAIN.workers`; `gaussian_blur` takes 75 ms, that of OpenCV 0.7 ms
    (416 x 528 pixels, one core).

    Args:
        options: `DATASET` options with `batching` "crop".
    """

    by_orientation = False  # all crops have the same size

    def __init__(self, options: DataOptions) -> None:
        self.options = options
        mean = options.mean if options.color_order == "RGB" else options.mean[::-1]
        levels = np.rint(255 * np.array(mean) / options.value_range).clip(0, 255)
        self._mean_color: list[float] = [0.0] * len(options.bands) or levels.tolist()

    def plan(self, size: tuple[int, int], short: int, rng: np.random.Generator) -> Plan:
        """Size, angle, flip, window, colours and blur; see `BatchStyle`.

        Each crop draws its own short side; that of the batch is not used.
        """
        options = self.options
        short = int(rng.choice(options.imgSizes))
        low, high = options.scale_jitter
        scale = rng.uniform(low, high)
        angle = rng.uniform(-options.random_rotation, options.random_rotation)
        flip = options.random_flip and rng.random() < 0.5
        state = rng.bit_generator.state
        width, height = fitted_size(*size, short, options.imgMaxSize, scale)
        window = random_window((height, width), options.crop_size, rng)
        colors = jitter_factors(options.color_jitter, rng) if options.color_jitter > 0 else None
        sigma = rng.uniform(*_SIGMA) if rng.random() < options.random_blur else None
        return Plan((width, height), window, state, flip, colors, sigma, angle)

    def apply(self, loaded: LoadedSample, plan: Plan) -> LoadedSample:
        """Crop, colour jitter, blur, rotation and flip; see `BatchStyle`."""
        frame = _Frame.around(plan.window, loaded.image.shape[:2], plan.angle)
        loaded = loaded.cropped(frame.inside)
        image = loaded.image
        if plan.colors:
            image = color_jitter(image, *plan.colors)
        if plan.sigma:
            blurred = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), plan.sigma)
            image = blurred.reshape(image.shape)  # OpenCV drops a single channel

        def rotated(part: Tensor, fill: float | list[float]) -> np.ndarray:
            return (frame.rotated(part, plan.angle, fill) if plan.angle else part).numpy()

        pixels = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
        depth = loaded.depth
        loaded = replace(
            loaded.relabelled(rotated(_mask(loaded.labels()), _IGNORED)[0]),
            image=rotated(pixels, self._mean_color).transpose(1, 2, 0),
            depth=None if depth is None else rotated(_mask(depth), 0.0)[0],
        )
        return loaded.flipped() if plan.flip else loaded


class _Frame:
    """A window and the surrounding pixels that a rotation moves into it.

    Attributes:
        inside: rows and columns of the image in the frame.
        beyond: how far the frame exceeds the image: left, top, right, bottom.
        place: the window in the frame: top, left, height, width.
    """

    def __init__(self, inside: Window, beyond: list[int], place: tuple[int, int, int, int]) -> None:
        self.inside, self.beyond, self.place = inside, beyond, place

    @classmethod
    def around(cls, windows: Window, sides: tuple[int, ...], angle: float) -> _Frame:
        """The frame around a window (rows, columns) of an image (height, width)."""
        h, w = (window.stop - window.start for window in windows)
        sin, cos = (abs(f(math.radians(angle))) for f in (math.sin, math.cos))
        bounding = h * cos + w * sin, w * cos + h * sin  # box around the rotated window
        margins = [max(0, math.ceil((b - s) / 2)) for b, s in zip(bounding, (h, w))]
        starts = [window.start - margin for window, margin in zip(windows, margins)]
        stops = [window.stop + margin for window, margin in zip(windows, margins)]
        down, right = (
            slice(max(start, 0), min(stop, side)) for start, stop, side in zip(starts, stops, sides)
        )
        before = [max(-start, 0) for start in starts]
        after = [max(stop - side, 0) for stop, side in zip(stops, sides)]
        beyond = [before[1], before[0], after[1], after[0]]
        return cls((down, right), beyond, (margins[0], margins[1], h, w))

    def rotated(self, part: Tensor, angle: float, fill: float | list[float]) -> Tensor:
        """The window, with the content of the frame rotated around its centre.

        Args:
            part: pixels at `inside`, a tv_tensor.
            angle: in degrees, counterclockwise.
            fill: value beyond the image.
        """
        framed = F.pad(part, self.beyond, fill=fill)
        bilinear = InterpolationMode.BILINEAR  # of masks it is always nearest
        return F.crop(F.rotate(framed, angle, interpolation=bilinear, fill=fill), *self.place)


def _mask(values: np.ndarray) -> tv_tensors.Mask:
    return tv_tensors.Mask(torch.from_numpy(values)[None])
