"""Interface of the formats of exported files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch

from mit_semseg.export.graph import Graph


class Runner(Protocol):
    """An exported network that is ready to run on the CPU."""

    def __call__(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Outputs by name.

        Args:
            image: the input of the graph, see `graph.Graph.forward`.
            outputs: `labels` or `scores`, or both.
        """


class Format:
    """A format of exported files.

    Attributes:
        name: as given to `mit-semseg export --format`.
        suffix: of its files.
        extra: extra of this package with the libraries that it needs; "": torch only.
        modules: what is imported to write a file.
        run_modules: what is imported to run one.
        torch: oldest version that can write it.
        precisions: in which a file can be run.
        int8: whether networks can be quantised.
        dynamic: whether a file can take images of any size and number.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ()
    run_modules: ClassVar[tuple[str, ...]] = ()
    torch: ClassVar[tuple[int, int]] = (2, 4)
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    int8: ClassVar[bool] = False
    dynamic: ClassVar[bool] = True

    def check(self) -> None:
        """Checks that files can be written here.

        Raises:
            ValueError: torch is too old, or a library is not installed.
        """
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if version < self.torch:
            least = ".".join(map(str, self.torch))
            raise ValueError(
                f"--format {self.name} needs torch {least} or newer, and this is "
                f"{torch.__version__}: upgrade torch, or use --format torchscript"
            )
        self._need(self.modules, f"--format {self.name}")

    def write(self, graph: Graph, path: Path) -> None:
        """Write a network with its description.

        Raises:
            ValueError: it cannot be converted.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement write")

    def texts(self, path: Path) -> dict[str, str]:
        """The metadata of a file.

        Raises:
            ValueError: the file cannot be read, or a library is not installed.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement texts")

    def open(self, path: Path, precision: str = "fp32") -> Runner:
        """A network that can be run with `torch.get_num_threads()` threads.

        Args:
            path: the file.
            precision: one of `precisions`.

        Raises:
            ValueError: the file cannot be read or run here, or a library is not installed.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement open")

    def quantize(self, source: Path, path: Path, images: Iterable[np.ndarray]) -> None:
        """Write an INT8 version of a file.

        Args:
            source: what `write` has written.
            path: the result.
            images: inputs of the graph from which the ranges of the activations are measured.

        Raises:
            ValueError: a library is not installed.
        """
        raise ValueError(f"--int8 is for the formats onnx and openvino, not {self.name}")

    def not_run_here(self) -> str:
        """Why files cannot be run on this machine whatever is installed; "": they can."""
        return ""

    def need_to_run(self, path: Path) -> None:
        """Checks that the libraries that run a file are installed.

        Raises:
            ValueError: one is not.
        """
        self._need(self.run_modules, str(path))

    def _need(self, modules: Sequence[str], what: str) -> None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"{what} needs {', '.join(missing)}: pip install 'mit_semseg[{self.extra}]'"
            )
