"""COCO 2017 panoptic: 80 things and 53 stuff classes, from its coloured PNGs and JSON files.

Paper: Kirillov et al. 2019, arXiv:1801.00868. Licence: annotations CC BY 4.0; images from flickr,
subject to its terms of use.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mit_semseg.config import DataOptions
from mit_semseg.dataset import coco
from mit_semseg.dataset.base import FORMATS, Archive, DataFormat, Source
from mit_semseg.dataset.classes import TABLES, ClassTable
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.mask_cache import FOLDER, MaskJob, cached_masks
from mit_semseg.dataset.records import Record
from mit_semseg.errors import one_line

# Category ids in class order: things, then stuff, some of which COCO has merged.
STUFF = (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148,
    149, 151, 154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, 184, 185, 186,
    187, 188, 189, 190, 191, 192, 193, 194, 195, 196, 197, 198, 199, 200,
)  # fmt: skip
CLASSES = {category: k for k, category in enumerate((*coco.ALL, *STUFF))}
VOID = 255


@FORMATS.register("coco_panoptic")
class CocoPanoptic(DataFormat):
    """`images/train2017`, `annotations/panoptic_train2017.json` and a folder or zip of that name.

    The PNGs store segment ids, red + 256 green + 65536 blue, and the JSON file their categories.
    Crowds have their class; 0 is void. Masks are created once, in `semantic_masks/coco_panoptic`
    beside the data.
    """

    title = "COCO panoptic"
    table = "coco_panoptic"
    source = Source(
        title="COCO 2017 panoptic (21 GB)",
        licence="annotations: CC BY 4.0; images: flickr terms of use",
        home="https://cocodataset.org/#download",
        layout="images/{train,val}2017/*.jpg, annotations/panoptic_{train,val}2017.json and "
        "annotations/panoptic_{train,val}2017/*.png (or that folder as .zip)",
        folder="coco",
        archives=(
            *coco.IMAGES,
            Archive(
                (
                    "http://images.cocodataset.org/annotations/"
                    "panoptic_annotations_trainval2017.zip",
                ),
            ),
        ),
    )
    num_class = len(CLASSES)

    def records(self, root: Path, split: str) -> list[Record]:
        year = coco.year_of(split)
        images = coco.first_folder(root, [*coco.image_places(year), "input_images"], "COCO images")
        masks = f"{FOLDER}/coco_panoptic/{year}"

        beside = "" if (root / f"panoptic_{year}.json").is_file() else "annotations/"
        source = f"{beside}panoptic_{year}.json"

        def jobs() -> list[MaskJob]:
            content = coco.read_json(root, source, "COCO panoptic")
            pngs = _PngReader(root / f"{beside}panoptic_{year}")
            _check_categories(content, root / source)
            segments: dict[Any, dict[str, Any]] = {}
            for number, one in enumerate(content["annotations"]):
                fault = _fault(one)
                if fault:
                    name = one.get("file_name") or f"annotation {number}"
                    raise ValueError(f"{root / source}: {name}: {fault}; damaged")
                segments[one["image_id"]] = one
            return [
                MaskJob(record, partial(draw, pngs, segments[image["id"]]))
                for image, record in coco.coco_records(content, images, masks, root / source)
                if image["id"] in segments
            ]

        return cached_masks(root, f"{masks}.odgt", jobs, f"COCO panoptic {year}", source, {})

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        return LabelMap.identity(options.num_class, VOID, " (COCO panoptic: 255 is void)")


class _PngReader:
    """Reads coloured PNGs from a folder, or from the zip file of the same name.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: neither exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.archive: zipfile.ZipFile | None = None  # shared by threads
        if folder.is_dir():
            return
        file = folder.with_name(f"{folder.name}.zip")
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder}: no such folder, nor {file.name}; check DATASET.root_dataset"
            )
        try:
            self.archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{file}: a damaged archive ({error}); download it again") from error

    def read(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8."""
        where: Path | io.BytesIO = self.folder / name
        try:
            if self.archive is not None:
                where = io.BytesIO(self.archive.read(f"{self.folder.name}/{name}"))
            with Image.open(where) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            reason = one_line(error)
            raise ValueError(f"{self.folder / name}: cannot be read ({reason})") from error


def _check_categories(content: dict[str, Any], path: Path) -> None:
    """ValueError if category ids have other names than in COCO."""
    names = ClassTable.load(TABLES / "coco_panoptic.csv").names
    for key, name in coco.category_names(content, path).items():
        known = names[CLASSES[key]] if key in CLASSES else "unused"
        if name != known:
            raise ValueError(
                f"{path}: its category {key!r} is {name!r}, in COCO {known!r}; for custom "
                "categories save masks with one channel and set DATASET.format folder"
            )


def _fault(annotation: dict[str, Any]) -> str:
    """The problem of an entry in `annotations`; "" if there is none."""
    name, segments = annotation.get("file_name"), annotation.get("segments_info")
    if not isinstance(name, str) or not name:
        return f"'file_name' is {name!r:.60}"
    if not coco.is_key(annotation.get("image_id")):
        return f"'image_id' is {annotation.get('image_id')!r:.60}"
    if not isinstance(segments, list):
        return f"'segments_info' is {segments!r:.60}"
    for one in segments:
        if not isinstance(one, dict) or not all(
            type(one.get(key)) is int for key in ("id", "category_id")
        ):
            return f"a segment without id or category_id ({one!r:.60})"
    return ""


def draw(pngs: _PngReader, annotation: dict[str, Any]) -> np.ndarray:
    """Class ids of one image, (H, W) uint8, 255 where nothing is annotated.

    Args:
        pngs: reader of its PNG.
        annotation: its entry in the JSON file: `file_name`, and `segments_info` with `id` and
            `category_id` of each segment.

    Raises:
        ValueError: the PNG cannot be read, or has an unknown segment or category.
    """
    name = annotation["file_name"]
    parts = pngs.read(name).astype(np.int64)
    ids, inverse = np.unique(parts @ np.array([1, 256, 65536]), return_inverse=True)
    known = {one["id"]: one["category_id"] for one in annotation["segments_info"]}
    values = np.full(len(ids), VOID, dtype=np.uint8)
    for k, number in enumerate(ids.tolist()):
        if number == 0:
            continue
        if known.get(number) not in CLASSES:
            problem = (
                f"category {known[number]}" if number in known else "no entry in the JSON file"
            )
            raise ValueError(
                f"{pngs.folder / name}: segment {number} has {problem}; PNG and JSON file do "
                "not belong together"
            )
        values[k] = CLASSES[known[number]]
    return values[inverse.reshape(parts.shape[:2])]
