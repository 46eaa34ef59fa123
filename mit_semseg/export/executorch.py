"""ExecuTorch, for phones and other small devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mit_semseg.errors import one_line
from mit_semseg.export.base import Format
from mit_semseg.export.graph import LABELS, SCORES, Graph

# A method of the program that returns the metadata, as bytes of JSON.
_TEXTS = "mit_semseg_json"


class ExecuTorch(Format):
    """A program of ExecuTorch, with XNNPACK's kernels, for one size of image."""

    name = "executorch"
    suffix = ".pte"
    extra = "executorch"
    modules = ("executorch",)
    run_modules = ("executorch",)
    torch = (2, 9)
    dynamic = False

    def write(self, graph: Graph, path: Path) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        text = json.dumps(graph.description.texts()).encode()
        try:
            program = to_edge_transform_and_lower(
                graph.program(dynamic=False),
                partitioner=[XnnpackPartitioner()],
                constant_methods={_TEXTS: torch.frombuffer(bytearray(text), dtype=torch.uint8)},
            ).to_executorch()
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            raise ValueError(f"executorch: {one_line(error, 300)}") from error
        path.write_bytes(program.buffer)

    def texts(self, path: Path) -> dict[str, str]:
        self.need_to_run(path)
        program = _load(path)
        if _TEXTS not in program.method_names:
            return {}
        (found,) = program.load_method(_TEXTS).execute(())
        texts: dict[str, str] = json.loads(bytes(found.numpy()).decode())
        return texts

    def open(self, path: Path, precision: str = "fp32") -> _Method:
        raw = json.loads(self.texts(path)["graph"])["raw"]
        return _Method(_load(path), (SCORES,) if raw else (LABELS, SCORES))


def _load(path: Path) -> Any:
    from executorch.runtime import Runtime

    try:
        return Runtime.get().load_program(path.read_bytes())
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read by ExecuTorch: {one_line(error, 200)}") from error


class _Method:
    """The program's `forward`, one image at a time."""

    def __init__(self, program: Any, outputs: tuple[str, ...]) -> None:
        self.program, self.outputs = program, outputs
        self.method = program.load_method("forward")

    def __call__(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.outputs}
        for one in image:
            given = torch.from_numpy(np.ascontiguousarray(one[None]))
            results = self.method.execute((given,))
            for name, result in zip(self.outputs, results, strict=True):
                found[name].append(result.numpy().copy())  # the next image overwrites it
        return [np.concatenate(found[name]) for name in outputs]
