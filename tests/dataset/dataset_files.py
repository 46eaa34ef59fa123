"""Small images to train on, and data sets of a few pixels in the layouts of the public ones."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from mit_semseg.dataset import TrainDataset, ValDataset
from mit_semseg.dataset.loading import load_pair

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------ to train on
def options(**changes):
    """`cfg.DATASET` for small images, with overrides."""
    base = {
        "num_class": 3, "imgSizes": [24, 32], "imgMaxSize": 64, "padding_constant": 8,
        "segm_downsampling_rate": 4, "random_flip": True,
    }  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


class Samples:
    """Images of noise in a folder, with masks of the classes 1..3 (0 is ignored).

    Attributes:
        root: the folder.
    """

    def __init__(self, root):
        self.root = root

    def write(self, name, size=(40, 30), **fields):
        """Writes `images/name.png` and `masks/name.png`; their record, with these fields in it."""
        width, height = size
        rng = np.random.default_rng(sum(map(ord, name)))
        record = {"fpath_img": f"images/{name}.png", "fpath_segm": f"masks/{name}.png"}
        put(self.root / record["fpath_img"], rng.integers(0, 256, (height, width, 3), np.uint8))
        put(self.root / record["fpath_segm"], rng.integers(0, 4, (height, width), np.uint8))
        return {**record, "width": width, "height": height, **fields}

    def mixed(self):
        """Five wide images, a square and three upright ones."""
        sizes = [(40, 30)] * 5 + [(30, 30)] + [(30, 40)] * 3
        return [self.write(f"s{k}", size) for k, size in enumerate(sizes)]

    def cut(self, record):
        """Cuts the file of an image in half; its path as listed."""
        file = self.root / record["fpath_img"]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return str(record["fpath_img"])

    def read(self, record, key="fpath_img"):
        """The image of a record, or its mask, as Pillow reads it."""
        with Image.open(self.root / record[key]) as file:
            file.load()
        return file

    def train(self, records, batch=1, opt=None, **settings):
        """Training batches; `settings` are those of `TrainDataset`, others of `cfg.DATASET`."""
        own = {k: settings.pop(k) for k in ("seed", "normalized", "pad_to") if k in settings}
        return TrainDataset(self.root, list(records), opt or options(**settings), batch, **own)

    def val(self, *records, **changes):
        return ValDataset(self.root, list(records), options(**changes))


# ------------------------------------------------------------------------------ public ones
def config(name, root, num_class, **changes):
    """`cfg.DATASET` of a data set that lies at `root`."""
    values = {
        "format": name, "root_dataset": str(root), "num_class": num_class,
        "list_train": "./data/training.odgt", "list_val": "./data/validation.odgt",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def put(path, pixels, palette=()):
    """A picture of these pixels, (H, W) or (H, W, 3), in the type of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(pixels))
    if palette:
        image.putpalette(palette)
    image.save(path)


def put_image(path, width, height=1):
    put(path, np.zeros((height, width, 3), np.uint8))


def put_pair(root, image, mask, *stored, palette=()):
    """An image, and a mask of one row that stores these values."""
    put_image(root / image, len(stored))
    put(root / mask, row(*stored), palette)


def row(*stored):
    return np.array([stored], np.uint8)


def ids(split, index=0):
    """Class ids of the first row of one sample."""
    return load_pair(split.records[index], "", split.label_map)[1][0].tolist()


def named(split, index=0):
    """Class names of the first row of one sample, `-` where ignored."""
    return [split.classes.names[k] if k >= 0 else "-" for k in ids(split, index)]


def stems(split):
    return [Path(record["fpath_img"]).stem for record in split.records]
