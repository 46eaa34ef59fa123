"""A model made ready to parse images: what it is fed, its logits, and its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mit_semseg import scores
from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.transforms import Normalize, scaled_inputs
from mit_semseg.engine.launch import autocast
from mit_semseg.models import SegmentationModule
from mit_semseg.models.inference import inference_copy
from mit_semseg.models.tiles import Sliding


class Predictor:
    """Scales, logits and labels of images on one device.

    On CUDA all calls of `logits` and `labels` come from one thread.

    Args:
        module: the model; it is copied.
        opt: `cfg.DATASET`, with the scales in `imgSizes`.
        device: where to compute.
        precision: fp32 | bf16 | fp16 | auto.
        flip: logits of the mirrored scales are added to those of the scales.
        tile, window, compile: see `models.inference.inference_copy`.
    """

    def __init__(
        self,
        module: SegmentationModule,
        opt: Any,
        device: torch.device,
        *,
        precision: str = "fp32",
        flip: bool = False,
        tile: str | int = "auto",
        window: Sliding | None = None,
        compile: bool = False,
    ) -> None:
        self.device, self.precision, self.flip = device, precision, flip
        self.options = DataOptions.read(opt)
        self.module = inference_copy(
            *(module, device, Normalize.of(opt)),
            compile=compile,
            replay=False,
            tile=tile,
            window=window,
        )

    def scales(self, image: np.ndarray, depth: np.ndarray | None = None) -> list[Tensor]:
        """(1, 3, h, w) uint8 on the host, one per scale; may be called from any thread."""
        return scaled_inputs(image, self.options, normalized=False, depth=depth)

    @torch.no_grad()
    def logits(self, scales: Sequence[Tensor]) -> list[Tensor]:
        """Logits of (N, 3, h, w) scales, and of their mirror images: (N, C, h', w') each."""
        found = []
        for scale in scales:
            image = scale.to(self.device, non_blocking=True)
            with autocast(self.device, self.precision):
                found.append(self.module.logits(image))
                if self.flip:
                    found.append(self.module.mirrored_logits(image))
        return found

    def labels(
        self, logits: Sequence[Tensor], size: tuple[int, int], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """(N, H, W) class ids."""
        return scores.class_map(logits, size, dtype=dtype)
