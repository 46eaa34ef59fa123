"""Exported networks: files that other libraries run.

One module per format; `graph` is what they all write, and `description` what is stored with it.
"""

from __future__ import annotations

import os
from pathlib import Path

from mit_semseg.export.base import Format, Runner
from mit_semseg.export.coreml import CoreMl
from mit_semseg.export.description import Description
from mit_semseg.export.executorch import ExecuTorch
from mit_semseg.export.graph import IMAGE, LABELS, SCORES, Graph
from mit_semseg.export.module import ExportedModule
from mit_semseg.export.onnx import Onnx
from mit_semseg.export.openvino import OpenVino
from mit_semseg.export.tensorrt import TensorRt
from mit_semseg.export.torch_files import Pt2, TorchScript

__all__ = [
    "FORMATS",
    "IMAGE",
    "LABELS",
    "SCORES",
    "Description",
    "ExportedModule",
    "Format",
    "Graph",
    "Runner",
    "format_of",
    "open_exported",
]

_ALL = (Onnx, TorchScript, Pt2, OpenVino, CoreMl, ExecuTorch, TensorRt)
FORMATS: dict[str, Format] = {kind.name: kind() for kind in _ALL}


def format_of(path: str | os.PathLike[str]) -> Format | None:
    """The format of an exported file, by its suffix; None: there is no such file."""
    path = Path(path)
    found = [one for one in FORMATS.values() if one.suffix == path.suffix.lower()]
    return found[0] if found and path.exists() else None


def open_exported(path: str | os.PathLike[str]) -> ExportedModule:
    """The network of an exported file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was not exported by this toolkit, or its library is not installed.
    """
    kind = format_of(path)
    if kind is None:
        raise FileNotFoundError(f"{os.fspath(path)}: no such exported file")
    return ExportedModule(kind, Path(path))
