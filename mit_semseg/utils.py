"""Utilities under the names of the published toolkit."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

__all__ = [
    "REGEX",
    "AverageMeter",
    "NotSupportedCliException",
    "accuracy",
    "colorEncode",
    "find_recursive",
    "intersectionAndUnion",
    "parse_devices",
    "process_range",
    "setup_logger",
    "unique",
]


class _StdoutHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the current `sys.stdout`, so that it may be redirected or captured."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AttributeError("this handler always writes to sys.stdout")


class _LogFile(logging.FileHandler):
    """A log file, created with the first line; a write error is reported once."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", delay=True, errors="backslashreplace")
        self._reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._reported:
            self._reported = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


def setup_logger(
    distributed_rank: int = 0, filename: str = "log.txt", named: bool = False, folder: str = ""
) -> logging.Logger:
    """Configure the logger `mit_semseg` to write to standard output and optionally to a file.

    Handlers of an earlier call are replaced.

    Args:
        distributed_rank: ranks above 0 log only warnings and errors.
        filename: name of the log file in `folder`, which is appended to.
        named: include the rank in every line.
        folder: of the log file, created if needed; "" for no file, as published.

    Returns:
        The logger.
    """
    logger = logging.getLogger("mit_semseg")
    logger.setLevel(logging.INFO if distributed_rank == 0 else logging.WARNING)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    handlers: list[logging.Handler] = [_StdoutHandler()]
    if folder and distributed_rank == 0:
        os.makedirs(folder, exist_ok=True)
        handlers.append(_LogFile(os.path.join(folder, filename)))
    who = f" rank {distributed_rank}" if named else ""
    layout = logging.Formatter(f"[%(asctime)s{who} %(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in handlers:
        handler.setFormatter(layout)
        logger.addHandler(handler)
    return logger


def find_recursive(root_dir: str, ext: str | Sequence[str] = ".jpg") -> list[str]:
    """Sorted files below a folder whose names end with one of `ext`, in upper or lower case.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not os.path.isdir(root_dir):
        raise FileNotFoundError(f"{root_dir}: no such folder to search for images")
    endings = tuple(e.lower() for e in ([ext] if isinstance(ext, str) else ext))
    return sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(root_dir)
        for name in names
        if name.lower().endswith(endings)
    )


class AverageMeter:
    """A running weighted average of numbers or arrays.

    Attributes:
        val: the latest value.
        avg: the average; None before the first value.
        sum: the weighted sum.
        count: the sum of the weights.
    """

    def __init__(self) -> None:
        self.initialized = False
        self.val: Any = None
        self.avg: Any = None
        self.sum: Any = 0
        self.count: Any = 0

    def initialize(self, val: Any, weight: Any) -> None:
        """Restart with a value of weight `weight`."""
        self.initialized = True
        self.sum = self.count = 0
        self.add(val, weight)

    def update(self, val: Any, weight: Any = 1) -> None:
        """Add a value of weight `weight`."""
        if self.initialized:
            self.add(val, weight)
        else:
            self.initialize(val, weight)

    def add(self, val: Any, weight: Any) -> None:
        """`update` after the first value."""
        self.val = val
        self.sum = self.sum + val * weight
        self.count = self.count + weight
        self.avg = self.sum / self.count

    def value(self) -> Any:
        """The latest value."""
        return self.val

    def average(self) -> Any:
        """The average; None before the first value."""
        return self.avg


def unique(
    ar: Any,
    return_index: bool = False,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> Any:
    """`numpy.unique` of the flattened array."""
    flags: Any = (return_index, return_inverse, return_counts)
    return np.unique(np.asarray(ar).reshape(-1), *flags)


def colorEncode(labelmap: np.ndarray, colors: np.ndarray, mode: str = "RGB") -> np.ndarray:
    """A label map in colour; negative labels are black. See `visualize.color_encode`.

    Args:
        labelmap: (H, W) class ids; floats are truncated, as published.
        colors: (K, 3) uint8, RGB.
        mode: channel order of the result, RGB or BGR.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: an unknown mode, or a label without a colour.
    """
    from mit_semseg.visualize import color_encode

    if mode not in ("RGB", "BGR"):
        raise ValueError(f"mode is {mode!r}; use 'RGB' or 'BGR'")
    colored = color_encode(np.asarray(labelmap).astype(np.int64), colors)
    return colored if mode == "RGB" else np.ascontiguousarray(colored[:, :, ::-1])


def accuracy(preds: np.ndarray, label: np.ndarray) -> tuple[float, int]:
    """Pixel accuracy, and number of labelled pixels.

    Args:
        preds: class ids.
        label: class ids of the same shape; negative ones are ignored.

    Returns:
        (accuracy in [0, 1], number of labelled pixels); (0.0, 0) without labelled pixels.
    """
    valid = np.asarray(label) >= 0
    valid_sum = int(valid.sum())
    right = int((valid & (np.asarray(preds) == label)).sum())
    return right / (valid_sum + 1e-10), valid_sum


def intersectionAndUnion(
    imPred: np.ndarray, imLab: np.ndarray, numClass: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in the intersection and union of prediction and label, per class.

    Pixels with a label outside 0..numClass-1 are ignored.

    Args:
        imPred: class ids.
        imLab: class ids of the same shape.
        numClass: number of classes.

    Returns:
        (intersection, union), (numClass,) int64 each.
    """
    pred, label = np.asarray(imPred).reshape(-1), np.asarray(imLab).reshape(-1)
    valid = (label >= 0) & (label < numClass)
    # int64: bincount refuses uint64.
    pred, label = pred[valid].astype(np.int64), label[valid].astype(np.int64)
    intersection = np.bincount(label[pred == label], minlength=numClass)
    predicted = np.bincount(pred[(pred >= 0) & (pred < numClass)], minlength=numClass)
    return intersection, predicted + np.bincount(label, minlength=numClass) - intersection


class NotSupportedCliException(ValueError):
    """An invalid list of devices."""


def process_range(xpu: str, inp: Iterable[str]) -> Iterator[str]:
    """Device names for an inclusive range of numbers, in ascending order.

    Example:
        >>> list(process_range("gpu", ("2", "0")))
        ['gpu0', 'gpu1', 'gpu2']
    """
    first, last = sorted(map(int, inp))
    return (f"{xpu}{i}" for i in range(first, last + 1))


# Patterns of the comma-separated parts of a device list, with functions from groups to names.
REGEX: list[tuple[re.Pattern[str], Callable[[Sequence[str]], Iterable[str]]]] = [
    (re.compile(r"^(cpu|mps)$"), list),
    (re.compile(r"^(?:gpu)?(\d{1,4})$"), lambda groups: [f"gpu{int(groups[0])}"]),
    (re.compile(r"^(?:gpu)?(\d{1,4})\s*-\s*(?:gpu)?(\d{1,4})$"), partial(process_range, "gpu")),
]


def parse_devices(input_devices: str) -> list[str]:
    """Device names of a command line option, in the given order, without duplicates.

    Args:
        input_devices: `0-3`, `0,2`, `gpu0-gpu2`, `0-1,5`, `cpu` or `mps`.

    Returns:
        For example `["gpu0", "gpu1"]` or `["cpu"]`.

    Raises:
        NotSupportedCliException: an invalid list.

    Example:
        >>> parse_devices("0-1,5")
        ['gpu0', 'gpu1', 'gpu5']
    """
    devices: list[str] = []
    for part in str(input_devices).lower().split(","):
        for pattern, names in REGEX:
            if match := pattern.match(part.strip()):
                devices.extend(names(match.groups()))
                break
        else:
            raise NotSupportedCliException(
                f"invalid devices {input_devices!r}; give 0-3, 0,2, gpu0-gpu2, cpu or mps"
            )
    return list(dict.fromkeys(devices))
