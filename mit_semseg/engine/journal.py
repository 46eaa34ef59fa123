"""The figures of a run: one JSON line each in `metrics.jsonl`, and the curves drawn from them."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from mit_semseg.visualize import curves

log = logging.getLogger("mit_semseg")

METRICS = "metrics.jsonl"
CURVES = "curves.png"


class Journal:
    """`metrics.jsonl` and `curves.png` of a checkpoint folder; ranks above 0 write nothing."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file, self.picture = folder / METRICS, folder / CURVES
        self.writes = rank == 0

    def record(self, **figures: Any) -> None:
        """Append one line."""
        if self.writes:
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
            except OSError as error:
                raise OSError(
                    error.errno, f"{error.strerror}: cannot write", str(self.file)
                ) from error

    def best_epoch(self) -> int:
        """The epoch with the highest validated mean IoU, the last of equals; 0 without any."""
        try:
            lines = read_metrics(self.file)
        except (FileNotFoundError, ValueError):
            return 0
        scores = [(x["mean_iou"], x["epoch"]) for x in lines if x.get("kind") == "val"]
        return int(max((s for s in scores if math.isfinite(s[0])), default=(0.0, 0))[1])

    def forget(self, step: int, epoch: int) -> None:
        """Drop figures of what a resumed run does again: steps after `step`, validations after
        `epoch`, and what a kill left half written."""
        if not self.writes or not self.file.is_file():
            return
        try:
            kept = [x for x in read_metrics(self.file) if _is_before(x, step, epoch)]
        except ValueError as error:  # figures are no reason not to go on
            os.replace(self.file, f"{self.file}.damaged")
            log.warning("%s; it is now %s.damaged", error, self.file.name)
            return
        part = self.file.with_name(f".{self.file.name}.part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(x) + "\n" for x in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.file)

    def draw(self) -> None:
        """Write the curves."""
        if self.writes and self.file.is_file():
            curves(read_metrics(self.file), self.picture)


def _is_before(figures: dict[str, Any], step: int, epoch: int) -> bool:
    if figures.get("kind") == "train":
        return bool(figures["step"] <= step)
    return bool(figures["epoch"] <= epoch)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last one that a killed run left half written is dropped."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    figures = []
    for number, line in enumerate(lines, 1):
        try:
            figures.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}:{number} is no JSON; mend or remove the file") from error
    return figures
