"""Names that code written for the published toolkit imports from here; quick to import."""

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
    """Writes to what `sys.stdout` is at the time, so that it may be redirected or captured."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        raise AttributeError("this handler always writes to sys.stdout")


class _LogFile(logging.FileHandler):
    """Opened at the first line; a disk that takes no more lines is told of once."""

    def __init__(self, filename: str) -> None:
        super().__init__(filename, encoding="utf-8", delay=True, errors="backslashreplace")
        self._told = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._told:
            self._told = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


def setup_logger(
    distributed_rank: int = 0, filename: str = "log.txt", named: bool = False, folder: str = ""
) -> logging.Logger:
    """The package's logger `mit_semseg`, writing to standard output and, if asked, to a file.

    Calling it again replaces the earlier handlers, so no line is written twice.

    Args:
        distributed_rank: ranks above 0 only pass on warnings and errors.
        filename: name of the log file in `folder`.
        named: begin every line with the rank.
        folder: where the log file is appended to, made with it at the first line; "" = no file,
            as published, whatever `filename` is.

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
    """Files below a folder whose name ends in one of `ext`, in any case, sorted.

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
        """Start anew with a value that counts `weight` times."""
        self.initialized = True
        self.sum = self.count = 0
        self.add(val, weight)

    def update(self, val: Any, weight: Any = 1) -> None:
        """Take in a value that counts `weight` times, the first one or a further one."""
        if self.initialized:
            self.add(val, weight)
        else:
            self.initialize(val, weight)

    def add(self, val: Any, weight: Any) -> None:
        """Take in a further value that counts `weight` times."""
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
    """Sorted distinct values of an array, flattened; otherwise as `numpy.unique`."""
    flags: Any = (return_index, return_inverse, return_counts)
    return np.unique(np.asarray(ar).reshape(-1), *flags)


def colorEncode(labelmap: np.ndarray, colors: np.ndarray, mode: str = "RGB") -> np.ndarray:
    """A label map in colour; negative labels stay black. See `visualize.color_encode`.

    Args:
        labelmap: (H, W) class ids; other numbers are cut to integers, as published.
        colors: (K, 3) uint8, RGB.
        mode: order of the result's channels, RGB or BGR.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: an unknown mode, or a label that has no colour.
    """
    from mit_semseg.visualize import color_encode

    if mode not in ("RGB", "BGR"):
        raise ValueError(f"mode is {mode!r}; use 'RGB' or 'BGR'")
    colored = color_encode(np.asarray(labelmap).astype(np.int64), colors)
    return colored if mode == "RGB" else np.ascontiguousarray(colored[:, :, ::-1])


def accuracy(preds: np.ndarray, label: np.ndarray) -> tuple[float, int]:
    """Share of labelled pixels that are predicted right, and how many are labelled.

    Args:
        preds: class ids.
        label: class ids of the same shape; negative ones are ignored.

    Returns:
        (accuracy in [0, 1], number of labelled pixels); (0.0, 0) when there is none.
    """
    valid = np.asarray(label) >= 0
    valid_sum = int(valid.sum())
    right = int((valid & (np.asarray(preds) == label)).sum())
    return right / (valid_sum + 1e-10), valid_sum


def intersectionAndUnion(
    imPred: np.ndarray, imLab: np.ndarray, numClass: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in the intersection and in the union of prediction and label, per class.

    Pixels whose label is no class (negative, or numClass and above) count in neither.

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
    """Devices on a command line that cannot be read."""


def process_range(xpu: str, inp: Iterable[str]) -> Iterator[str]:
    """Names of the devices between two numbers, both included, in rising order.

    Example:
        >>> list(process_range("gpu", ("2", "0")))
        ['gpu0', 'gpu1', 'gpu2']
    """
    first, last = sorted(map(int, inp))
    return (f"{xpu}{i}" for i in range(first, last + 1))


# What may stand between the commas of a list of devices, and the names that the groups stand for.
REGEX: list[tuple[re.Pattern[str], Callable[[Sequence[str]], Iterable[str]]]] = [
    (re.compile(r"^cpu$"), lambda groups: ["cpu"]),
    (re.compile(r"^(?:gpu)?(\d{1,4})$"), lambda groups: [f"gpu{int(groups[0])}"]),
    (re.compile(r"^(?:gpu)?(\d{1,4})\s*-\s*(?:gpu)?(\d{1,4})$"), partial(process_range, "gpu")),
]


def parse_devices(input_devices: str) -> list[str]:
    """Device names from a command line, in the order given, each once.

    Args:
        input_devices: `0-3`, `0,2`, `gpu0-gpu2`, `0-1,5` or `cpu`.

    Returns:
        Such as `["gpu0", "gpu1"]` or `["cpu"]`.

    Raises:
        NotSupportedCliException: it cannot be read.

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
                f"cannot read the devices {input_devices!r}; write 0-3, 0,2, gpu0-gpu2 or cpu"
            )
    return list(dict.fromkeys(devices))
