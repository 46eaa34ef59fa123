"""Small images to train on, and data sets of a few pixels in the layouts of the public ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.loading import load_pair
from mit_semseg.dataset.split import Split

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------ to train on
def options(**changes: Any) -> SimpleNamespace:
    """`cfg.DATASET` for small images, with overrides."""
    base: dict[str, Any] = {
        "num_class": 3, "imgSizes": [24, 32], "imgMaxSize": 64, "padding_constant": 8,
        "segm_downsampling_rate": 4, "random_flip": True,
    }  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


class Samples:
    """Images of noise in a folder, with masks of the classes 1..3 (0 is ignored).

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, name: str, size: tuple[int, int] = (40, 30), **fields: Any) -> dict[str, Any]:
        """Writes `images/name.png` and `masks/name.png`; their record, with these fields in it."""
        width, height = size
        rng = np.random.default_rng(sum(map(ord, name)))
        record = {"fpath_img": f"images/{name}.png", "fpath_segm": f"masks/{name}.png"}
        put(self.root / record["fpath_img"], rng.integers(0, 256, (height, width, 3), np.uint8))
        put(self.root / record["fpath_segm"], rng.integers(0, 4, (height, width), np.uint8))
        return {**record, "width": width, "height": height, **fields}

    def mixed(self) -> list[dict[str, Any]]:
        """Five wide images, a square and three upright ones."""
        sizes = [(40, 30)] * 5 + [(30, 30)] + [(30, 40)] * 3
        return [self.write(f"s{k}", size) for k, size in enumerate(sizes)]

    def cut(self, record: dict[str, Any]) -> str:
        """Cuts the file of an image in half; its path as listed."""
        file = self.root / record["fpath_img"]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return str(record["fpath_img"])

    def read(self, record: dict[str, Any], key: str = "fpath_img") -> Image.Image:
        """The image of a record, or its mask, as Pillow reads it."""
        with Image.open(self.root / record[key]) as file:
            file.load()
        return file

    def train(
        self, records: Sequence[dict[str, Any]], batch: int = 1, opt: Any = None, **settings: Any
    ) -> TrainDataset:
        """Training batches; `settings` are those of `TrainDataset`, others of `cfg.DATASET`."""
        own = {k: settings.pop(k) for k in ("seed", "normalized", "pad_to") if k in settings}
        return TrainDataset(self.root, list(records), opt or options(**settings), batch, **own)

    def val(self, *records: dict[str, Any], **changes: Any) -> ValDataset:
        return ValDataset(self.root, list(records), options(**changes))


# ------------------------------------------------------------------------------ public ones
def config(name: str, root: Path | str, num_class: int, **changes: Any) -> SimpleNamespace:
    """`cfg.DATASET` of a data set that lies at `root`."""
    values: dict[str, Any] = {
        "format": name, "root_dataset": str(root), "num_class": num_class,
        "list_train": "./data/training.odgt", "list_val": "./data/validation.odgt",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def put(path: Path, pixels: Any, palette: Sequence[int] = ()) -> None:
    """A picture of these pixels, (H, W) or (H, W, 3), in the type of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(pixels))
    if palette:
        image.putpalette(palette)
    image.save(path)


def put_image(path: Path, width: int, height: int = 1) -> None:
    put(path, np.zeros((height, width, 3), np.uint8))


def put_pair(root: Path, image: str, mask: str, *stored: int, palette: Sequence[int] = ()) -> None:
    """An image, and a mask of one row that stores these values."""
    put_image(root / image, len(stored))
    put(root / mask, row(*stored), palette)


def row(*stored: int) -> np.ndarray:
    return np.array([stored], np.uint8)


def ids(split: Split, index: int = 0) -> list[int]:
    """Class ids of the first row of one sample."""
    return load_pair(split.records[index], "", split.label_map)[1][0].tolist()


def named(split: Split, index: int = 0) -> list[str]:
    """Class names of the first row of one sample, `-` where ignored."""
    return [split.classes.names[k] if k >= 0 else "-" for k in ids(split, index)]


def stems(split: Split) -> list[str]:
    return [Path(record["fpath_img"]).stem for record in split.records]
