"""Core ML, for devices of Apple. Written on any system, run on macOS only."""

from __future__ import annotations

import json
import logging
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mit_semseg.errors import one_line
from mit_semseg.export.base import Format
from mit_semseg.export.graph import IMAGE, Graph

_TEXTS = "mit_semseg.json"


class CoreMl(Format):
    """A Core ML package whose input is a picture; predictions with it have not been tried."""

    name = "coreml"
    suffix = ".mlpackage"
    extra = "coreml"
    modules = ("coremltools",)
    run_modules = ("coremltools",)
    dynamic = False

    def write(self, graph: Graph, path: Path) -> None:
        import coremltools

        logging.getLogger("coremltools").setLevel(logging.ERROR)  # of int64 that becomes int32
        if graph.description.raw:
            kind: Any = coremltools.TensorType(IMAGE, shape=tuple(graph.example(1).shape))
            module: nn.Module = graph
        else:
            height, width = graph.image_size()
            layout = coremltools.colorlayout.RGB
            shape = (1, 3, height, width)
            kind = coremltools.ImageType(IMAGE, shape=shape, color_layout=layout)
            module = _OfPicture(graph)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = coremltools.convert(
                    graph.traced(module, torch.zeros(kind.shape.to_list())),
                    inputs=[kind],
                    outputs=[coremltools.TensorType(name) for name in graph.outputs],
                    minimum_deployment_target=coremltools.target.iOS16,
                    compute_precision=coremltools.precision.FLOAT32,
                    skip_model_load=True,
                )
            except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
                raise ValueError(f"coremltools: {one_line(error, 300)}") from error
        model.user_defined_metadata[_TEXTS] = json.dumps(graph.description.texts())
        model.short_description = graph.description.architecture
        model.save(str(path))

    def not_run_here(self) -> str:
        return "" if platform.system() == "Darwin" else "Core ML runs on macOS only"

    def texts(self, path: Path) -> dict[str, str]:
        self.need_to_run(path)
        import coremltools

        model = coremltools.models.MLModel(str(path), skip_model_load=True)
        found: dict[str, str] = json.loads(model.user_defined_metadata.get(_TEXTS, "{}"))
        return found

    def open(self, path: Path, precision: str = "fp32") -> _Predictor:
        self.need_to_run(path)
        if reason := self.not_run_here():
            raise ValueError(f"{path} cannot be run here: {reason}")
        return _Predictor(path)


class _OfPicture(nn.Module):
    """The graph for a picture of Core ML: (1, 3, H, W) float32 in 0..255."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        labels, scores = self.inner(image.permute(0, 2, 3, 1))
        return labels.to(torch.int32), scores


class _Predictor:
    """A package that Core ML runs, one image at a time."""

    def __init__(self, path: Path) -> None:
        import coremltools

        self.model = coremltools.models.MLModel(str(path))

    def __call__(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        from PIL import Image

        found = []
        for one in image:
            given = Image.fromarray(one) if one.dtype == np.uint8 else one[None]
            found.append(self.model.predict({IMAGE: given}))
        return [np.concatenate([np.asarray(one[name]) for one in found]) for name in outputs]
