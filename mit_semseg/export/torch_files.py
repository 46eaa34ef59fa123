"""Files that torch itself runs: of torch.export (.pt2), and TorchScript."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mit_semseg.errors import one_line
from mit_semseg.export.base import Format
from mit_semseg.export.graph import LABELS, SCORES, Graph

# Name of the metadata in the files.
_EXTRA = "mit_semseg.json"


class Pt2(Format):
    """A program of torch.export."""

    name = "pt2"
    suffix = ".pt2"
    torch = (2, 6)

    def write(self, graph: Graph, path: Path) -> None:
        torch.export.save(graph.program(), path, extra_files=_extra(graph))

    def texts(self, path: Path) -> dict[str, str]:
        return _read(path, torch.export.load)[1]

    def open(self, path: Path, precision: str = "fp32") -> _Module:
        program, texts = _read(path, torch.export.load)
        return _Module(program.module(), texts)


class TorchScript(Format):
    """TorchScript, recorded by torch.jit.trace; C++ and every version of torch run it."""

    name = "torchscript"
    suffix = ".torchscript"

    def write(self, graph: Graph, path: Path) -> None:
        with warnings.catch_warnings():
            # Of sizes that are the same for all images, and that TorchScript is deprecated.
            warnings.simplefilter("ignore")
            torch.jit.save(graph.traced(), str(path), _extra_files=_extra(graph))

    def texts(self, path: Path) -> dict[str, str]:
        return _read(path, _load_script)[1]

    def open(self, path: Path, precision: str = "fp32") -> _Module:
        return _Module(*_read(path, _load_script))


def _extra(graph: Graph) -> dict[str, str]:
    return {_EXTRA: json.dumps(graph.description.texts())}


def _load_script(path: str, extra_files: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path, map_location="cpu", _extra_files=extra_files)


def _read(path: Path, load: Callable[..., Any]) -> tuple[Any, dict[str, str]]:
    """What a file holds, and its metadata; empty if it has none."""
    extra: dict[str, Any] = {_EXTRA: ""}
    errors = (RuntimeError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError)
    try:
        found = load(str(path), extra_files=extra)
    except errors as error:
        raise ValueError(f"{path} cannot be read by torch: {one_line(error, 200)}") from error
    return found, json.loads(extra[_EXTRA] or "{}")


class _Module:
    """A module of torch that returns what `Graph.forward` does."""

    def __init__(self, module: Any, texts: dict[str, str]) -> None:
        self.module = module
        raw = json.loads(texts.get("graph", "{}")).get("raw", False)
        self.outputs = (SCORES,) if raw else (LABELS, SCORES)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        given = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        found = dict(zip(self.outputs, self.module(given), strict=True))
        return [found[name].numpy() for name in outputs]
