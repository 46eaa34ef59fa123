"""OpenVINO, for Intel and other x86 CPUs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mit_semseg.errors import one_line
from mit_semseg.export.base import Format
from mit_semseg.export.graph import IMAGE, Graph

# Place of the metadata in the runtime information of a model.
_INFO = "mit_semseg"
_HINTS = {"fp32": "f32", "bf16": "bf16"}


class OpenVino(Format):
    """OpenVINO's intermediate representation: an .xml file, and the weights in a .bin beside it."""

    name = "openvino"
    suffix = ".xml"
    extra = "openvino"
    modules = ("openvino",)
    run_modules = ("openvino",)
    torch = (2, 6)
    precisions = ("fp32", "bf16")
    int8 = True

    def write(self, graph: Graph, path: Path) -> None:
        import openvino
        from openvino.frontend import GeneralFailure, OpConversionFailure, OpValidationFailure

        try:
            model = openvino.convert_model(graph.program())
        except (GeneralFailure, OpConversionFailure, OpValidationFailure) as error:
            raise ValueError(
                f"the network cannot be converted to OpenVINO: {one_line(error, 200)}; give "
                "--size HEIGHT WIDTH, or --format onnx"
            ) from error
        model.inputs[0].get_tensor().set_names({IMAGE})
        for output, name in zip(model.outputs, graph.outputs, strict=True):
            output.get_tensor().set_names({name})
        for name, text in graph.description.texts().items():
            model.set_rt_info(text, [_INFO, name])
        openvino.save_model(model, str(path), compress_to_fp16=False)

    def texts(self, path: Path) -> dict[str, str]:
        self.need_to_run(path)
        model = _read(path)
        if not model.has_rt_info([_INFO]):
            return {}
        return dict(model.get_rt_info([_INFO]).value)

    def open(self, path: Path, precision: str = "fp32") -> _Compiled:
        self.need_to_run(path)
        return _Compiled(path, precision)

    def quantize(self, source: Path, path: Path, images: Iterable[np.ndarray]) -> None:
        self._need(("openvino", "nncf"), "--int8")
        import nncf
        import openvino

        logging.getLogger("nncf").setLevel(logging.ERROR)
        model = _read(source)
        data = nncf.Dataset(list(images), lambda image: {IMAGE: image})
        quantized = nncf.quantize(model, data, preset=nncf.QuantizationPreset.MIXED)
        openvino.save_model(quantized, str(path), compress_to_fp16=False)


@cache
def _core() -> Any:
    """OpenVINO's library of devices, one for the process.

    When the last one is deleted, OpenVINO unloads its CPU plugin, after which a signal such as
    SIGTERM crashes the process.
    """
    import openvino

    return openvino.Core()


def _read(path: Path) -> Any:
    try:
        return _core().read_model(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read by OpenVINO: {one_line(error, 200)}") from error


class _Compiled:
    """A model compiled for the CPU."""

    def __init__(self, path: Path, precision: str) -> None:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.model = _core().compile_model(_read(path), "CPU", settings)
        self.local = threading.local()

    def __call__(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        if not hasattr(self.local, "request"):  # a request is for one thread
            self.local.request = self.model.create_infer_request()
        found = self.local.request.infer({IMAGE: image})
        return [np.array(found[name]) for name in outputs]
