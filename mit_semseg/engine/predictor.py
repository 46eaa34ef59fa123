"""Inference with a trained model, used by prediction, evaluation and `Segmenter`."""

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
from mit_semseg.export import ExportedModule
from mit_semseg.matrices import to_device
from mit_semseg.models import SegmentationModule
from mit_semseg.models.compilation import compiler_errors
from mit_semseg.models.graphs import GraphedNetwork
from mit_semseg.models.inference import inference_copy
from mit_semseg.models.tiles import Sliding, TiledNetwork
from mit_semseg.precision import Precision

log = logging.getLogger("mit_semseg")


class Predictor:
    """Runs a copy of a trained model on one device, in one precision.

    On a GPU the weights are cast once, and repeated shapes are replayed as CUDA graphs. If a device
    runs out of memory, the image is computed again in tiles of half the side, down to 256 pixels,
    and finally on the CPU; each step is logged as a warning.

    On a GPU, `logits` and `labels` have to be called from one thread; `scales` may be called from
    any thread. TF32 is a setting of the whole process: predictors of different precisions cannot
    run concurrently in several threads.

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
        """Copy a module, which is not modified.

        Args:
            module: on any device, in any mode; or an exported file, which runs on the CPU.
            options: `cfg.DATASET`: scales and normalisation of the input.
            device: where to compute.
            precision: fp32 | tf32 | bf16 | fp16 | auto (see `precision.Precision`).
            flip: also average over horizontally flipped images.
            tile: "auto", "off", or a side in pixels (see `models.tiles.TiledNetwork`).
            window: sliding window for images of any size, instead of tiles. Default: none, or for a
                network with a fixed input size a window of that size.
            compile: compile the network with torch.compile, during the first images.

        Raises:
            ValueError: a setting cannot be used, or there is no such device.
        """
        self.device = usable_device(device)
        self.options, self.flip = DataOptions.read(options), flip
        self.precision = Precision.of(precision, self.device)
        if isinstance(module, ExportedModule):
            _check_exported(module, self.device, compile)
            module.prepare(precision)
        else:
            module = self._copy(module)
        self.module = module
        size = getattr(self.module.encoder, "fixed_size", None)
        if window is None and size is not None:
            height, width = size
            window = Sliding(height, width, overlap=0)
        network: Callable[[Tensor], Tensor] = self.module.logits
        if compile:
            network = _compiled(network)
        if self.device.type == "cuda":
            network = GraphedNetwork(network, self.device, flip)
        self.tiled = TiledNetwork(self.module, tile, network, window)

    def _copy(self, module: SegmentationModule) -> SegmentationModule:
        half = self.precision.dtype != torch.float32
        return inference_copy(
            module,
            self.device,
            None if self.options.bands else _normalization(module) or Normalize.of(self.options),
            self.precision.dtype if half else None,
        )

    @classmethod
    def of(
        cls,
        module: SegmentationModule,
        data: DataOptions,
        options: InferenceOptions,
        device: torch.device | str,
    ) -> Predictor:
        """A predictor with the settings of `VAL` or `TEST`."""
        return cls(
            *(module, data.at_scales(options.imgSizes, options.scales), device),
            precision=options.precision,
            flip=options.flip,
            tile=options.tile,
            window=Sliding.of(options),
            compile=options.compile,
        )

    def scales(self, image: np.ndarray, depth: np.ndarray | None = None) -> list[Tensor]:
        """The input of `logits` for one image: a (1, 3, h, w) uint8 tensor per scale, on the CPU.

        Args:
            image: (H, W, 3) uint8 RGB; for a model of `bands` (H, W, C) float32, normalised.
            depth: (H, W) float32 metres, for a model with depth.

        With bands or depth the tensors are normalised float32 with all channels.
        """
        return scaled_inputs(image, self.options, normalized=False, depth=depth)

    @torch.no_grad()
    def logits(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Logits, at the resolution of the network, of the same images at several scales.

        Args:
            scales: (N, 3, h, w) uint8, or normalised floats, on any device.

        Returns:
            (N, C, h', w') for each scale, with `flip` followed by those of the flipped images; on
            the device, or on the CPU if the device ran out of memory.

        Raises:
            ValueError: `scales` is empty.
            MemoryError: the CPU ran out of memory.
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
            (N, H, W), on the device; computed on the CPU if the device runs out of memory.
        """
        try:
            return scores.class_map(logits, size, dtype=dtype).to(self.device)
        except torch.cuda.OutOfMemoryError:
            pass  # the exception keeps tensors alive until here
        self.free_memory()
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
            self.free_memory()
            place = f"in tiles of {sides[n]} pixels" if n < len(sides) else "on the CPU"
            log.warning("out of memory for an image of %dx%d: computing it %s", W, H, place)
        return self._on_cpu.compute(image.cpu(), sides[0])

    def free_memory(self) -> None:
        """Free CUDA graphs and torch's cache; not in an except block, which keeps tensors alive."""
        if isinstance(self.tiled.network, GraphedNetwork):
            self.tiled.network.release()
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).empty_cache()

    @cached_property
    def _on_cpu(self) -> TiledNetwork:
        """The network on the CPU, in float32."""
        module = inference_copy(self.module, "cpu", dtype=torch.float32)
        return TiledNetwork(module, self.tiled.tile, window=self.tiled.window)

    def _mirrored(self, logits: Tensor) -> Tensor:
        """Logits of flipped images, flipped back, with left and right classes exchanged."""
        logits = logits.flip(-1)
        pairs = self.module.mirror_pairs
        if not pairs:
            return logits
        other = dict(pairs) | {b: a for a, b in pairs}
        order = [other.get(k, k) for k in range(logits.shape[1])]
        return logits[:, to_device(torch.tensor(order), logits.device)]


def _check_exported(module: ExportedModule, device: torch.device, compile: bool) -> None:
    """Refuses settings with which a file cannot be run.

    Raises:
        ValueError: with the reason.
    """
    if module.description.resize:
        raise ValueError(
            f"{module.path} resizes images itself and knows one size: export it without --resize"
        )
    if device.type != "cpu":
        raise ValueError(f"{module.path} is run on the CPU: set the device to cpu, not {device}")
    if compile:
        raise ValueError(f"{module.path} is compiled already: set compile False")


def _normalization(module: SegmentationModule) -> Normalize | None:
    """The normalisation that the encoder defines, if any."""
    declared = getattr(module.encoder, "normalization", None)  # any module may be the encoder
    return None if declared is None else declared()


def _compiled(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(network, dynamic=True)

    def run(image: Tensor) -> Tensor:
        with compiler_errors():
            result: Tensor = compiled(image)
        return result

    return run


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is out of memory; torch has no exception class for CPU and Apple GPUs."""
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(
        text in str(error) for text in ("allocate memory", "MPS backend out of memory")
    )
