"""Metrics of a run: `metrics.jsonl`, the history by epoch, and `curves.png`."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mit_semseg.engine.training.loggers import Loggers
from mit_semseg.engine.training.pictures import ValidationPictures
from mit_semseg.files import replacing
from mit_semseg.visualize import curves

log = logging.getLogger("mit_semseg")

METRICS = "metrics.jsonl"
CURVES = "curves.png"


def best_validation(scores: Iterable[tuple[float, float]]) -> tuple[int, float] | None:
    """Epoch and value of the highest finite mean IoU; the latest epoch if several are equal.

    Args:
        scores: (epoch, mean IoU) of every validation.
    """
    finite = [(mean_iou, epoch) for epoch, mean_iou in scores if math.isfinite(mean_iou)]
    if not finite:
        return None
    mean_iou, epoch = max(finite)
    return int(epoch), mean_iou


class History:
    """Metrics by epoch, in the published layout.

    In the state of a run these are the entries `history` and `best`.

    Attributes:
        columns: "train" (epoch, loss, acc) and "val" (epoch, mean_iou, pixel_accuracy).
    """

    def __init__(self) -> None:
        self.columns: dict[str, dict[str, list[float]]] = {
            "train": {"epoch": [], "loss": [], "acc": []},
            "val": {"epoch": [], "mean_iou": [], "pixel_accuracy": []},
        }

    def add(self, part: str, *values: float) -> None:
        """Append a value to each column of "train" or "val"."""
        for column, value in zip(self.columns[part].values(), values, strict=True):
            column.append(float(value))

    def is_validated(self, epoch: int) -> bool:
        """Whether an epoch has been validated."""
        return epoch in self.columns["val"]["epoch"]

    def clear_validations(self) -> None:
        """Remove all validations."""
        for column in self.columns["val"].values():
            column.clear()

    @property
    def best(self) -> tuple[int, float] | None:
        """Epoch and mean IoU of the best validation."""
        val = self.columns["val"]
        return best_validation(zip(val["epoch"], val["mean_iou"]))

    @property
    def validations_since_best(self) -> int:
        """How many validations in a row were no better than an earlier one."""
        epochs, scores = self.columns["val"]["epoch"], self.columns["val"]["mean_iou"]
        best, count = -math.inf, 0
        for _, score in sorted(zip(epochs, scores)):
            best, count = (score, 0) if score > best else (best, count + 1)
        return count

    @property
    def best_mean_iou(self) -> float | None:
        """The mean IoU of the best validation."""
        return self.best[1] if self.best else None

    def state_dict(self) -> dict[str, Any]:
        """The columns and the best mean IoU."""
        return {"history": self.columns, "best": self.best_mean_iou}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the columns of an earlier run."""
        for part, columns in self.columns.items():
            for key, column in state["history"].get(part, {}).items():
                if key in columns:
                    columns[key] = [float(value) for value in column]


class MetricsLog:
    """`metrics.jsonl` and `curves.png` of a checkpoint folder, written by rank 0.

    Args:
        folder: the checkpoint folder.
        rank: of this process.
        loggers: which take the same records.
        pictures: of the last validation, for the loggers.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        loggers: Loggers | None = None,
        pictures: ValidationPictures | None = None,
    ) -> None:
        self.file, self.picture = folder / METRICS, folder / CURVES
        self.writes = rank == 0
        self.loggers, self.pictures = loggers, pictures
        self._drawn_at = time.monotonic()

    def record(self, **figures: Any) -> None:
        """Append a line to `metrics.jsonl`."""
        if self.writes:
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
            except OSError as error:
                raise OSError(
                    error.errno, f"{error.strerror}: cannot write", str(self.file)
                ) from error
        if self.loggers is not None:
            drawn = self.pictures.take() if self.pictures and figures["kind"] == "val" else {}
            self.loggers.add(figures, drawn)

    def open(self, step: int) -> None:
        """Start the loggers of a run that continues from a step."""
        if self.loggers is not None:
            self.loggers.open(step)

    def close(self) -> None:
        """End the loggers."""
        if self.loggers is not None:
            self.loggers.close()

    def best_epoch(self) -> int:
        """The epoch of the best validation; 0 without validations."""
        try:
            lines = read_metrics(self.file)
        except (FileNotFoundError, ValueError):
            return 0
        best = best_validation((x["epoch"], x["mean_iou"]) for x in lines if x.get("kind") == "val")
        return best[0] if best else 0

    def truncate(self, step: int, epoch: int) -> None:
        """Remove steps after `step`, validations after `epoch`, and an incomplete last line."""
        if not self.writes or not self.file.is_file():
            return
        try:
            kept = [x for x in read_metrics(self.file) if _is_before(x, step, epoch)]
        except ValueError as error:  # not a reason to stop the training
            os.replace(self.file, f"{self.file}.damaged")
            log.warning("%s; renamed to %s.damaged", error, self.file.name)
            return
        if not kept:
            self.file.unlink()
            return
        with replacing(self.file) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(x) + "\n" for x in kept)
            file.flush()
            os.fsync(file.fileno())

    def draw(self, every: float = 0.0) -> None:
        """Write `curves.png`, unless the last time was less than `every` seconds ago."""
        if self.writes and self.file.is_file() and time.monotonic() - self._drawn_at >= every:
            self._drawn_at = time.monotonic()
            curves(read_metrics(self.file), self.picture)


def _is_before(figures: dict[str, Any], step: int, epoch: int) -> bool:
    if figures.get("kind") == "train":
        return bool(figures["step"] <= step)
    return bool(figures["epoch"] <= epoch)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without an incomplete last line of a killed run.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    figures = []
    for number, line in enumerate(lines, 1):
        try:
            figures.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}:{number} is not JSON: fix or remove the file") from error
    return figures
