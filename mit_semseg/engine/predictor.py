"""Images in, scores and class maps out: the one way in which a trained model is run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mit_semseg import scores
from mit_semseg.config import DataOptions, InferenceOptions
from mit_semseg.dataset.transforms import Normalize, scaled_inputs
from mit_semseg.engine.devices import usable_device
from mit_semseg.errors import one_line
from mit_semseg.matrices import to_device
from mit_semseg.models import SegmentationModule
from mit_semseg.models.compilation import compiled_function, compiler_errors
from mit_semseg.models.graphs import GraphedNetwork
from mit_semseg.models.inference import inference_copy
from mit_semseg.models.tiles import Sliding, TiledNetwork
from mit_semseg.precision import Precision

log = logging.getLogger("mit_semseg")


class Predictor:
    """Runs a copy of a trained model on one device, in one precision.

    On a GPU weights are cast once, and shapes that come again are replayed as CUDA graphs. When a
    device runs out of memory, the image is computed again in smaller tiles, half as long each time,
    down to 256 pixels; on a GPU then on the CPU. Each step is a warning.

    On a GPU `logits` and `labels` are to be called from one thread; `scales` may be from others.
    Whether products are rounded to TF32 is a setting of the whole process: predictors of different
    precisions are not for several threads at once.

    Example:
        >>> p = Predictor(module, cfg.DATASET, "cpu")  # doctest: +SKIP
        >>> p.labels(p.logits(p.scales(image)), image.shape[:2])  # doctest: +SKIP
    """

    def __init__(
        self,
        module: SegmentationModule,
        options: Any,
        device: torch.device | str,
        *,
        precision: str = "fp32",
        flip: bool = False,
        tile: str | int = "auto",
        window: Sliding | None = None,
        compile: bool = False,
    ) -> None:
        """Take a copy of a module; the module itself stays as it is.

        Args:
            module: on any device, in any mode.
            options: `cfg.DATASET`: the scales, and how the encoder takes its input.
            device: where to compute.
            precision: fp32 | tf32 | bf16 | fp16 | auto (see `precision.Precision`).
            flip: average over mirrored images too.
            tile: "auto", "off", or a side in pixels (see `models.tiles.TiledNetwork`).
            window: slide this over images of every size, instead of tiles. By default a network
                that takes images of one size only gets windows of that size.
            compile: compile the network with torch.compile: the first images wait for it.

        Raises:
            ValueError: a setting cannot be used, or there is no such device.
        """
        self.device = usable_device(device)
        self.options, self.flip = DataOptions.read(options), flip
        self.precision = Precision.of(precision, self.device)
        half = self.precision.dtype != torch.float32
        self.module = inference_copy(
            module,
            self.device,
            _normalization(module) or Normalize.of(self.options),
            self.precision.dtype if half else None,
        )
        size = getattr(self.module.encoder, "fixed_size", None)
        if window is None and size is not None:
            height, width = size
            window = Sliding(height, width, overlap=0)  # images of other sizes it cannot take
        network: Callable[[Tensor], Tensor] = self.module.logits
        if compile:
            network = _compiled(network)
        if self.device.type == "cuda":
            network = GraphedNetwork(network, self.device)
        self.tiled = TiledNetwork(self.module, tile, network, window)

    @classmethod
    def of(
        cls,
        module: SegmentationModule,
        data: DataOptions,
        options: InferenceOptions,
        device: torch.device | str,
    ) -> Predictor:
        """A predictor as `VAL` or `TEST` ask for it, at the scales of `options.imgSizes`."""
        return cls(
            *(module, data.at_scales(options.imgSizes), device),
            precision=options.precision,
            flip=options.flip,
            tile=options.tile,
            window=Sliding.of(options),
            compile=options.compile,
        )

    def scales(self, image: np.ndarray, depth: np.ndarray | None = None) -> list[Tensor]:
        """What `logits` takes of one image, (1, 3, h, w) uint8 on the host, one for each scale.

        Args:
            image: (H, W, 3) uint8 RGB.
            depth: (H, W) float32 metres for a model that takes depth; the scales are then
                normalised floats.
        """
        return scaled_inputs(image, self.options, normalized=False, depth=depth)

    @torch.no_grad()
    def logits(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Scores at the network's resolution of the same images at several scales.

        Args:
            scales: (N, 3, h, w) uint8, or float as the encoder expects it, on any device.

        Returns:
            (N, C, h', w') for each scale, and for its mirror image with `flip`; on the device, or
            on the CPU where the device has too little memory.

        Raises:
            ValueError: there is no image.
            MemoryError: the host has too little memory.
        """
        if not scales:
            raise ValueError("images is empty: give one (N, 3, h, w) tensor per scale")
        found = []
        with self.precision.products():
            images = [to_device(image, self.device) for image in scales]
            for image in images:
                found.append(self._logits(image))
            if self.flip:
                for image in images:
                    found.append(self._mirrored(self._logits(image.flip(-1))))
        return found

    @torch.no_grad()
    def labels(
        self,
        logits: Sequence[Tensor],
        size: tuple[int, int],
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """The class of every pixel: argmax of the mean over scales of the softmax.

        Args:
            logits: of all scales, from `logits`.
            size: (H, W) of the class map.
            dtype: of the class map (see `scores.label_dtype`).

        Returns:
            (N, H, W), on the device; computed on the CPU where that has too little memory.
        """
        try:
            return scores.class_map(logits, size, dtype=dtype).to(self.device)
        except torch.cuda.OutOfMemoryError:
            pass  # the error holds on to what was computed, until here
        self._free_memory()
        H, W = size
        log.warning("out of memory for a class map of %dx%d: computing it on the CPU", W, H)
        labels = scores.class_map([x.cpu() for x in logits], size, dtype=dtype)
        return labels.to(self.device)

    def _logits(self, image: Tensor) -> Tensor:
        H, W = image.shape[-2:]
        sides = self.tiled.sides(H, W)
        for n, side in enumerate(sides, start=1):
            try:
                return self.tiled.compute(image, side)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if n == len(sides) and self.device.type == "cpu":
                    raise MemoryError(one_line(error)) from error
            self._free_memory()
            place = f"in tiles of {sides[n]} pixels" if n < len(sides) else "on the CPU"
            log.warning("out of memory for an image of %dx%d: computing it %s", W, H, place)
        return self._on_cpu.compute(image.cpu(), sides[0])

    def _free_memory(self) -> None:
        """Give up what is kept for later; after an error, which holds on to what it met."""
        if isinstance(self.tiled.network, GraphedNetwork):
            self.tiled.network.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def _on_cpu(self) -> TiledNetwork:
        """The same on the CPU, in float32."""
        module = inference_copy(self.module, "cpu", dtype=torch.float32)
        return TiledNetwork(module, self.tiled.tile, window=self.tiled.window)

    def _mirrored(self, logits: Tensor) -> Tensor:
        """Scores of mirror images mirrored back, those of left and right classes exchanged."""
        logits = logits.flip(-1)
        pairs = self.module.mirror_pairs
        if not pairs:
            return logits
        other = dict(pairs) | {b: a for a, b in pairs}
        order = [other.get(k, k) for k in range(logits.shape[1])]
        return logits[:, to_device(torch.tensor(order), logits.device)]


def _normalization(module: SegmentationModule) -> Normalize | None:
    """What the encoder's input is made with, where it says so itself."""
    declared = getattr(module.encoder, "normalization", None)  # any module may be the encoder
    return None if declared is None else declared()


def _compiled(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    compiled = compiled_function(network, dynamic=True)

    def run(image: Tensor) -> Tensor:
        with compiler_errors():
            result: Tensor = compiled(image)
        return result

    return run


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; torch has no type of its own for the CPU."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        "allocate memory" in str(error)
    )
