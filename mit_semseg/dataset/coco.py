"""COCO 2017: masks of its objects, drawn from `instances_*.json`.

Paper: Lin et al. 2014, arXiv:1405.0312. Licence: annotations CC BY 4.0; images from flickr, subject
to its terms of use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mit_semseg.dataset import coco_shapes
from mit_semseg.dataset.base import (
    FORMATS,
    Archive,
    ClassTable,
    DataFormat,
    LabelMap,
    Source,
    table_of,
)
from mit_semseg.dataset.drawn import FOLDER, Drawing, drawn_once
from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.records import Record

# COCO's category ids of classes 1, 2, ...: all 80, and the 20 of Pascal VOC in VOC's order.
_NEVER = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
ALL = tuple(k for k in range(1, 91) if k not in _NEVER)
VOC = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
IGNORED = 255
# A mask is as large as its image, of which more pixels are refused when it is read.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 30)

IMAGES = (
    Archive(("http://images.cocodataset.org/zips/train2017.zip",), into="images"),
    Archive(("http://images.cocodataset.org/zips/val2017.zip",), into="images"),
)


@FORMATS.register("coco")
class Coco(DataFormat):
    """`images/train2017` (or `train2017`) and `annotations/instances_train2017.json`.

    `DATASET.num_class` 21 has VOC's classes in VOC's order, 81 all of COCO's; 0 is background.
    Every image has a mask, also one without objects. Where objects overlap the smaller one is on
    top (a book on a table is a book); regions marked as crowds are ignored, but for objects in
    them. Masks are drawn once, to `semantic_masks/coco<num_class>` beside the data.
    """

    source = Source(
        title="COCO 2017 (20 GB)",
        licence="annotations: CC BY 4.0; images: flickr terms of use",
        home="https://cocodataset.org/#download",
        layout="images/{train,val}2017/*.jpg and annotations/instances_{train,val}2017.json",
        folder="coco",
        archives=(
            *IMAGES,
            Archive(
                ("http://images.cocodataset.org/annotations/annotations_trainval2017.zip",),
            ),
        ),
    )
    num_class = 81

    def records(self, root: Path, split: str) -> list[Record]:
        return self.records_for(root, split, DataOptions(num_class=81))

    def records_for(self, root: Path, split: str, options: DataOptions) -> list[Record]:
        categories = _categories(options.num_class)
        year = year_of(split)
        images = first_folder(root, image_places(year), "COCO images")
        masks = f"{FOLDER}/coco{options.num_class}/{year}"
        source = f"annotations/instances_{year}.json"

        def drawings() -> list[Drawing]:
            content = read_json(root, source, "COCO")
            objects: dict[Any, list[dict[str, Any]]] = {}
            for one in content["annotations"]:
                if is_key(one.get("category_id")) and one["category_id"] in categories:
                    key = one.get("image_id")
                    objects.setdefault(key if is_key(key) else None, []).append(one)
            return [
                Drawing(
                    coco_record(image, images, masks),
                    partial(draw, image, objects.get(image["id"], []), categories, root / source),
                )
                for image in content["images"]
            ]

        return drawn_once(root, f"{masks}.odgt", drawings, f"COCO {year}", source)

    def classes(self, options: DataOptions) -> ClassTable:
        _categories(options.num_class)
        if options.num_class == 21:
            return table_of("voc2012", 21, "COCO with the classes of Pascal VOC")
        return table_of("coco", options.num_class, "COCO")

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        values = {k: k for k in range(options.num_class)} | {IGNORED: -1}
        return LabelMap(values, options.num_class, " (COCO: 0 is background, 255 ignored)")


def _categories(num_class: int) -> dict[int, int]:
    """COCO's category id -> class."""
    chosen = {21: VOC, 81: ALL}.get(num_class)
    if chosen is None:
        raise ValueError(
            f"DATASET.num_class is {num_class}, but COCO has 81 classes with background, or the 21 "
            "of Pascal VOC; set DATASET.num_class 81 or 21"
        )
    return {category: k for k, category in enumerate(chosen, 1)}


def draw(
    image: dict[str, Any],
    objects: Sequence[dict[str, Any]],
    categories: dict[int, int],
    source: Path,
) -> np.ndarray:
    """The mask of one image.

    Args:
        image: its entry in the json, with `height` and `width`.
        objects: its annotations, each a crowd or an object, as polygons or run lengths.
        categories: category id -> stored value.
        source: the json, named in errors.

    Returns:
        (height, width) uint8: stored values, 0 where nothing is, 255 in crowds.

    Raises:
        ValueError: an object's shape cannot be drawn; json and image are named.
    """
    mask = np.zeros((image["height"], image["width"]), dtype=np.uint8)
    try:
        shapes = [
            (one, coco_shapes.decode(one.get("segmentation"), *mask.shape)) for one in objects
        ]
    except ValueError as error:
        raise ValueError(f"{source}: {image['file_name']}: damaged annotation: {error}") from error
    # Crowds first, then the largest: what comes later is on top.
    shapes.sort(key=lambda pair: (not pair[0].get("iscrowd"), -int(pair[1].sum())))
    for one, shape in shapes:
        mask[shape] = IGNORED if one.get("iscrowd") else categories[one["category_id"]]
    return mask


# ------------------------------------------------------------------------------ shared
def year_of(split: str) -> str:
    """`train` as `train2017`; other splits have their own names."""
    return f"{split}2017" if split in ("train", "val") else split


def image_places(year: str) -> list[str]:
    """Folders below the root that the images may be in."""
    return [f"images/{year}", year]


def first_folder(root: Path, places: Sequence[str], title: str) -> str:
    """The first of some folders that exists below `root`; the error names the first."""
    for place in places:
        if (root / place).is_dir():
            return place
    raise FileNotFoundError(
        f"{root}: no {title} here, expected the folder {places[0]}; check DATASET.root_dataset, "
        "or run mit-semseg data download coco"
    )


def read_json(root: Path, name: str, title: str) -> dict[str, Any]:
    """An annotation file below `root`, its images checked to have what is read of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, lacks images or annotations, or one of them is none.
    """
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{root}: no {title} annotations here, expected {name}; check DATASET.root_dataset, "
            f"or run mit-semseg data download {title.lower().replace(' ', '_')}"
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]})") from error
    for key in ("images", "annotations"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: has no {key!r}; it is no annotation file of {title}")
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: entry {number} of {key!r} is {entry!r:.60}; damaged")
    for number, image in enumerate(content["images"]):
        fault = _fault(image)
        if fault:
            raise ValueError(f"{path}: image {image.get('file_name') or number}: {fault}; damaged")
    return content  # type: ignore[no-any-return]


def is_key(value: Any) -> bool:
    """Whether a value of a json may be an id."""
    return isinstance(value, (int, str))


def _fault(image: dict[str, Any]) -> str:
    """What is wrong with an entry in `images`; "" where nothing is."""
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        return f"'file_name' is {name!r:.60}"
    if not is_key(image.get("id")):
        return f"'id' is {image.get('id')!r:.60}"
    for key in ("width", "height"):
        value = image.get(key)
        if type(value) is not int or value < 1:
            return f"{key!r} is {value!r:.60}, not a number of pixels"
    if image["width"] * image["height"] > MOST_PIXELS:
        return f"{image['width']} x {image['height']} pixels are more than an image has"
    return ""


def coco_record(image: dict[str, Any], images: str, masks: str) -> Record:
    """The record of an entry in `images` of the json."""
    return Record(
        fpath_img=f"{images}/{image['file_name']}",
        fpath_segm=f"{masks}/{Path(image['file_name']).stem}.png",
        width=image["width"],
        height=image["height"],
    )
