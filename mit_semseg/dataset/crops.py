"""Random crops of one size: the batch style beside the aspect-preserving one."""

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
    """Crops of one size out of images that are scaled, coloured, blurred, rotated and flipped.

    The augmentation of PSPNet (Zhao et al. 2017, arXiv:1612.01105, sec. 5.1: mirror images, scales
    of 0.5 to 2, rotations of up to 10 degrees, blur), and random colours. In this order:

    1. The image is resized with its aspect kept: a short side out of `imgSizes`, as the
       aspect-preserving style and the evaluation have it, times a factor from `scale_jitter`.
    2. A window of `crop_size` is laid anywhere into it; a side that is smaller is taken whole.
    3. Brightness, contrast and saturation change by `color_jitter`.
    4. With a probability of `random_blur` the image is blurred.
    5. Image and labels are rotated about the middle of the window, by up to `random_rotation`
       degrees. What lies around the window comes into its corners; only what lies beyond the image
       is filled: with the mean colour, rounded to bytes, and with ignored labels.
    6. With `random_flip` every other crop is mirrored, in its classes too where a mirror turns
       one into another (`DataFormat.mirror_pairs`).
    7. A crop smaller than `crop_size` is padded at its right and bottom when it is put into a
       batch, exactly with the mean colour, and with ignored labels.

    The paper leaves open how factors and angles are distributed; here they are uniform.

    Image and labels go through the same calls of `torchvision.transforms.v2.functional`, the labels
    as nearest neighbours. So does depth, whose nearest neighbours are true depths, which means of
    them are not; it is neither coloured nor blurred.

    Nothing is drawn from torchvision's transform classes, since they draw from torch's global
    generator: every number is from the generator of the sample. Nor are two of its functions used:
    its contrast is about a mean that torch adds up in another order with another number of
    threads, so that a sample would depend on `TRAIN.workers`; its blur took 75 ms where OpenCV's
    took 0.7 ms (416 x 528 pixels, one core).

    Args:
        options: the settings of samples, `batching` "crop".
    """

    by_orientation = False  # all crops are of one size

    def __init__(self, options: DataOptions) -> None:
        self.options = options
        mean = options.mean if options.color_order == "RGB" else options.mean[::-1]
        levels = np.rint(255 * np.array(mean) / options.value_range)
        self._mean_color: list[float] = levels.clip(0, 255).tolist()

    def plan(self, size: tuple[int, int], short: int, rng: np.random.Generator) -> Plan:
        """Size, angle, flip, window, colours and blur; see `BatchStyle`.

        Every crop draws a short side of its own, in place of the batch's.
        """
        options = self.options
        short = int(rng.choice(options.imgSizes))
        low, high = options.scale_jitter
        scale = rng.uniform(low, high)
        angle = rng.uniform(-options.random_rotation, options.random_rotation)
        flip = options.random_flip and rng.random() < 0.5
        state = rng.bit_generator.state
        width, height = fitted_size(*size, short * scale, options.imgMaxSize * scale)
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
            image = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), plan.sigma)

        def turned(part: Tensor, fill: float | list[float]) -> np.ndarray:
            return (frame.turned(part, plan.angle, fill) if plan.angle else part).numpy()

        pixels = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))
        depth = loaded.depth
        loaded = replace(
            loaded.relabelled(turned(_mask(loaded.labels()), _IGNORED)[0]),
            image=turned(pixels, self._mean_color).transpose(1, 2, 0),
            depth=None if depth is None else turned(_mask(depth), 0.0)[0],
        )
        return loaded.flipped() if plan.flip else loaded


class _Frame:
    """A window with as much around it as comes into it when it is turned.

    Attributes:
        inside: the rows and columns of the image that lie in the frame.
        beyond: how far the frame passes the image: left, top, right, bottom.
        place: of the window in the frame: top, left, height, width.
    """

    def __init__(self, inside: Window, beyond: list[int], place: tuple[int, int, int, int]) -> None:
        self.inside, self.beyond, self.place = inside, beyond, place

    @classmethod
    def around(cls, windows: Window, sides: tuple[int, ...], angle: float) -> _Frame:
        """The frame around a window (rows, columns) of an image (height, width)."""
        h, w = (window.stop - window.start for window in windows)
        sin, cos = (abs(f(math.radians(angle))) for f in (math.sin, math.cos))
        needs = h * cos + w * sin, w * cos + h * sin  # the sides of what holds the turned window
        margins = [max(0, math.ceil((n - s) / 2)) for n, s in zip(needs, (h, w))]
        starts = [window.start - margin for window, margin in zip(windows, margins)]
        stops = [window.stop + margin for window, margin in zip(windows, margins)]
        down, right = (
            slice(max(start, 0), min(stop, side)) for start, stop, side in zip(starts, stops, sides)
        )
        before = [max(-start, 0) for start in starts]
        after = [max(stop - side, 0) for stop, side in zip(stops, sides)]
        beyond = [before[1], before[0], after[1], after[0]]
        return cls((down, right), beyond, (margins[0], margins[1], h, w))

    def turned(self, part: Tensor, angle: float, fill: float | list[float]) -> Tensor:
        """The window of what is in the frame, turned about its middle.

        Args:
            part: what lies at `inside`, a tv_tensor.
            angle: in degrees, counterclockwise.
            fill: what lies beyond the image.
        """
        framed = F.pad(part, self.beyond, fill=fill)
        bilinear = InterpolationMode.BILINEAR  # masks take their nearest whatever is asked for
        return F.crop(F.rotate(framed, angle, interpolation=bilinear, fill=fill), *self.place)


def _mask(values: np.ndarray) -> tv_tensors.Mask:
    return tv_tensors.Mask(torch.from_numpy(values)[None])
