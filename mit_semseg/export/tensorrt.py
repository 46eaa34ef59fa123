"""TensorRT, for NVIDIA GPUs. Written and read as its documentation says; not tried."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mit_semseg.export.base import Format
from mit_semseg.export.graph import IMAGE, Graph
from mit_semseg.export.onnx import onnx_program

# An engine has no metadata: they follow it in the file, with their length at the end.
_MARK, _LENGTH = b"mit_semseg", struct.Struct("<Q")
# Largest batch and side of an engine for images of any size.
_IMAGES, _SIDE = 8, 2048


class TensorRt(Format):
    """An engine of TensorRT for the GPU of this machine, followed by the metadata."""

    name = "tensorrt"
    suffix = ".engine"
    extra = "tensorrt"
    modules = ("tensorrt", "onnx", "onnxscript")
    run_modules = ("tensorrt",)
    torch = (2, 6)

    def check(self) -> None:
        super().check()
        if not torch.cuda.is_available():
            raise ValueError("--format tensorrt needs an NVIDIA GPU, and torch finds none")

    def write(self, graph: Graph, path: Path) -> None:
        import tensorrt

        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(logger)
        network = builder.create_network(0)
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse(onnx_program(graph).model_proto.SerializeToString()):
            errors = [str(parser.get_error(n)) for n in range(parser.num_errors)]
            raise ValueError(f"TensorRT cannot read the network: {' '.join(errors)[:300]}")
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        profile.set_shape(IMAGE, *_shapes(graph))
        config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise ValueError("TensorRT could not build an engine; its messages are above")
        text = json.dumps(graph.description.texts()).encode()
        path.write_bytes(bytes(engine) + text + _LENGTH.pack(len(text)) + _MARK)

    def texts(self, path: Path) -> dict[str, str]:
        texts: dict[str, str] = json.loads(_split(path)[1] or b"{}")
        return texts

    def open(self, path: Path, precision: str = "fp32") -> _Engine:
        self.need_to_run(path)
        return _Engine(_split(path)[0])


def _split(path: Path) -> tuple[bytes, bytes]:
    """The engine and the metadata of a file; no metadata in a file of other origin."""
    data = path.read_bytes()
    if not data.endswith(_MARK):
        return data, b""
    end = len(data) - len(_MARK) - _LENGTH.size
    (length,) = _LENGTH.unpack(data[end : end + _LENGTH.size])
    return data[: end - length], data[end - length : end]


def _shapes(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Smallest, usual and largest shape of the image."""
    usual = tuple(graph.example(1).shape)
    axes = graph.dynamic_shapes()[IMAGE]
    least, most = list(usual), list(usual)
    most[0] = _IMAGES
    multiple = graph.description.multiple
    for axis in axes:
        if axis > 0:
            least[axis], most[axis] = 2 * multiple, max(_SIDE // multiple, 2) * multiple
    return tuple(least), usual, tuple(most)


class _Engine:
    """An engine on the current GPU; images are copied there and results back."""

    def __init__(self, data: bytes) -> None:
        import tensorrt

        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        self.engine: Any = tensorrt.Runtime(logger).deserialize_cuda_engine(data)
        if self.engine is None:
            raise ValueError("this TensorRT or GPU cannot read the engine: export it here")
        self.context = self.engine.create_execution_context()
        modes = tensorrt.TensorIOMode
        names = [self.engine.get_tensor_name(n) for n in range(self.engine.num_io_tensors)]
        self.outputs = [x for x in names if self.engine.get_tensor_mode(x) == modes.OUTPUT]

    def __call__(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        given = torch.from_numpy(np.ascontiguousarray(image)).cuda()
        self.context.set_input_shape(IMAGE, tuple(given.shape))
        self.context.set_tensor_address(IMAGE, given.data_ptr())
        found = {}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            dtype = torch.int64 if name == "labels" else torch.float32
            found[name] = torch.empty(shape, dtype=dtype, device="cuda")
            self.context.set_tensor_address(name, found[name].data_ptr())
        stream = torch.cuda.current_stream()
        self.context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return [found[name].cpu().numpy() for name in outputs]
