"""Data sets of a few pixels, in the layouts of the public ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from mit_semseg.dataset.loading import load_pair
from mit_semseg.dataset.split import Split


def config(name: str, root: Path, num_class: int, **changes: Any) -> SimpleNamespace:
    """`cfg.DATASET` of a data set that lies at `root`."""
    values: dict[str, Any] = {
        "format": name,
        "root_dataset": str(root),
        "list_train": "./data/training.odgt",
        "list_val": "./data/validation.odgt",
        "num_class": num_class,
        "classes": "",
        "label_offset": 1,
        "ignore_label": [],
    }
    return SimpleNamespace(**{**values, **changes})


def put(path: Path, pixels: Any) -> None:
    """A picture of these pixels, (H, W) or (H, W, 3), in the type of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels)).save(path)


def put_image(path: Path, width: int, height: int = 1) -> None:
    put(path, np.zeros((height, width, 3), np.uint8))


def row(*stored: int) -> np.ndarray:
    return np.array([stored], np.uint8)


def named(split: Split, index: int = 0) -> list[str]:
    """Class names of the first row of one sample, `-` where ignored."""
    _, ids = load_pair(split.records[index], "", split.label_map)
    return [split.classes.names[k] if k >= 0 else "-" for k in ids[0].tolist()]


def stems(split: Split) -> list[str]:
    return [Path(record["fpath_img"]).stem for record in split.records]
