"""ONNX, run by ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mit_semseg.errors import one_line
from mit_semseg.export.base import Format
from mit_semseg.export.graph import IMAGE, Graph

# What is computed in INT8. Not the normalisation and the resizing of the scores, which take little
# time and decide on the labels.
_INT8_OPERATIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Concat", "MaxPool", "Relu")


class Onnx(Format):
    """ONNX, written by torch.onnx and run by ONNX Runtime."""

    name = "onnx"
    suffix = ".onnx"
    extra = "onnx"
    modules = ("onnx", "onnxscript")
    run_modules = ("onnxruntime",)
    torch = (2, 6)
    int8 = True

    def write(self, graph: Graph, path: Path) -> None:
        program = onnx_program(graph)
        program.model.metadata_props.update(graph.description.texts())
        program.save(str(path))

    def texts(self, path: Path) -> dict[str, str]:
        self.need_to_run(path)
        session = _session(path)
        return dict(session.get_modelmeta().custom_metadata_map)

    def open(self, path: Path, precision: str = "fp32") -> _Session:
        self.need_to_run(path)
        return _Session(path)

    def quantize(self, source: Path, path: Path, images: Iterable[np.ndarray]) -> None:
        self._need(("onnx", "onnxruntime"), "--int8")
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(prepared),
                str(path),
                _Reader(images),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(_INT8_OPERATIONS),
                nodes_to_exclude=_before_network(onnx.load(str(prepared))),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )


def onnx_program(graph: Graph) -> Any:
    """The graph as an ONNX program (`torch.onnx.ONNXProgram`).

    Raises:
        ValueError: a layer cannot be converted.
    """
    from torch.onnx import OnnxExporterError

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return torch.onnx.export(
            graph.program(),
            dynamo=True,
            input_names=[IMAGE],
            output_names=list(graph.outputs),
            verbose=False,
        )
    except OnnxExporterError as error:
        raise ValueError(
            f"the network cannot be converted to ONNX: {one_line(error, 300)}"
        ) from error
    finally:
        logger.setLevel(level)


def _before_network(model: Any) -> list[str]:
    """Names of the nodes that prepare the image: those before the first convolution or product."""
    names = []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm"):
            break
        names.append(node.name)
    return names


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    errors = onnxruntime.capi.onnxruntime_pybind11_state
    known = (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph, errors.NoSuchFile)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except known as error:
        raise ValueError(
            f"{path} cannot be read by ONNX Runtime: {one_line(error, 200)}"
        ) from error


class _Session:
    """A session of ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.session = _session(path)
        self.options = onnxruntime.RunOptions()
        # Labels are not computed if only scores are asked for.
        self.options.only_execute_path_to_fetches = True

    def __call__(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        found: list[np.ndarray] = self.session.run(list(outputs), {IMAGE: image}, self.options)
        return found


class _Reader:
    """Images in the interface of `onnxruntime.quantization.CalibrationDataReader`."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self.images: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {IMAGE: image}
