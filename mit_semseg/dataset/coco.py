"""COCO 2017: masks of its objects, rasterised from `instances_*.json`.

Paper: Lin et al. 2014, arXiv:1405.0312. Licence: annotations CC BY 4.0; images from flickr, subject
to its terms of use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from mit_semseg.config import DataOptions
from mit_semseg.dataset import coco_shapes
from mit_semseg.dataset.base import FORMATS, Archive, DataFormat, Source, not_here
from mit_semseg.dataset.classes import TABLES, ClassTable, distinct_colors
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.mask_cache import FOLDER, MaskJob, cached_facts, cached_masks
from mit_semseg.dataset.records import Record, two_places
from mit_semseg.errors import one_line

# COCO's category ids of classes 1, 2, ...: all 80, and the 20 of Pascal VOC in VOC's order.
_NEVER = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
ALL = tuple(k for k in range(1, 91) if k not in _NEVER)
VOC = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
BACKGROUND = "background"
IGNORED = 255
# Limit for masks; larger images are refused when they are read.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 30)

IMAGES = (
    Archive(("http://images.cocodataset.org/zips/train2017.zip",), into="images"),
    Archive(("http://images.cocodataset.org/zips/val2017.zip",), into="images"),
)


@FORMATS.register("coco")
class Coco(DataFormat):
    """`images/train2017` (or `train2017`) and `annotations/instances_train2017.json`.

    A list entry is a split (`train`), or `images_dir:FILE.json` for a custom annotation file, whose
    `categories` are compared with COCO's by name. With `DATASET.num_class` 81 the classes are
    those of COCO, with 21 those of VOC in VOC's order; other categories become classes in the order
    of their ids, with their names. Class 0 is background.

    Every image has a mask, even without objects. Of overlapping objects the smaller one is on top
    (a book on a table is a book). Crowd regions are ignored, except for objects in them. Masks are
    rasterised once, to `semantic_masks/coco<num_class>` beside the data.
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
        place = _AnnotationFiles.of(root, split)
        source = place.source
        if place.custom and not (root / place.images[0]).is_dir():
            raise FileNotFoundError(
                f"{root / place.images[0]}: no such folder of images; check DATASET.root_dataset "
                f"and the list entry {split!r}"
            )
        images = first_folder(root, place.images, "COCO images")
        masks = f"{FOLDER}/coco{options.num_class}/{place.name}"
        categories = _categories(root, place, options.num_class)
        _, values = _classes(categories, options.num_class, root / source)

        def jobs() -> list[MaskJob]:
            content = read_json(root, source, "COCO")
            records = coco_records(content, images, masks, root / source)
            objects = _objects(content, categories, values, root / source)
            return [
                MaskJob(
                    record,
                    partial(draw, image, objects.get(image["id"], []), values, root / source),
                )
                for image, record in records
            ]

        facts = {"categories": list(categories.items())}
        return cached_masks(root, f"{masks}.odgt", jobs, f"COCO {place.name}", source, facts)

    def classes(self, options: DataOptions) -> ClassTable:
        coco = ClassTable.load(TABLES / "coco.csv").names[1:]
        return _classes(dict(zip(ALL, coco, strict=True)), options.num_class, Path("COCO"))[0]

    def classes_for(self, root: Path, splits: Sequence[str], options: DataOptions) -> ClassTable:
        found: dict[str, ClassTable] = {}
        for split in splits:
            place = None if split.endswith(".odgt") else _AnnotationFiles.of(root, split)
            if place is None or not place.is_there(root, options.num_class):
                continue
            categories = _categories(root, place, options.num_class)
            table, _ = _classes(categories, options.num_class, root / place.source)
            first = next(iter(found), split)
            found[split] = table
            if table.names != found[first].names:
                raise ValueError(
                    f"{first} and {split} have different categories, {_listed(found[first].names)} "
                    f"and {_listed(table.names)}; give both files the same, with the same ids"
                )
        return next(iter(found.values())) if found else self.classes(options)

    def count_for(self, root: Path, split: str) -> int | None:
        place = None if split.endswith(".odgt") else _AnnotationFiles.of(root, split)
        if place is None or not (root / place.source).is_file():
            return self.num_class
        return len(_own(_categories_in(root, place.source)))

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        values = {k: k for k in range(options.num_class)} | {IGNORED: -1}
        return LabelMap(values, options.num_class, " (COCO: 0 is background, 255 ignored)")


@dataclass(frozen=True)
class _AnnotationFiles:
    """The files of a list entry, below the root or absolute.

    Attributes:
        images: possible folders of the images.
        source: the annotation file.
        name: name of the masks' folder.
        custom: whether the entry names the annotation file, which must then exist.
    """

    images: tuple[str, ...]
    source: str
    name: str
    custom: bool

    @classmethod
    def of(cls, root: Path, entry: str) -> _AnnotationFiles:
        """The files of a split, or of `images_dir:FILE.json`."""
        pairs = [pair for pair in two_places(entry) if pair[1].lower().endswith(".json")]
        if not pairs:
            if entry.lower().endswith(".json") or ":" in entry:
                raise ValueError(
                    f"DATASET.list_train / list_val is {entry!r}; for DATASET.format coco give "
                    "'images_dir:FILE.json', or a split of COCO such as 'train'"
                )
            year = year_of(entry)
            return cls(image_places(year), f"annotations/instances_{year}.json", year, False)
        images, source = next((p for p in pairs if (root / p[1]).is_file()), pairs[0])
        # Entries do not share masks, as their images or classes may differ.
        mark = hashlib.sha256(entry.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        return cls((images,), source, f"{Path(source).stem}-{mark}", True)

    def is_there(self, root: Path, num_class: int) -> bool:
        """Whether the categories can be read; if not, a split has those of COCO."""
        listing = f"{FOLDER}/coco{num_class}/{self.name}.odgt"
        kept = cached_facts(root, listing, self.source) is not None
        return self.custom or kept or (root / self.source).is_file()


def _categories(root: Path, place: _AnnotationFiles, num_class: int) -> dict[Any, str]:
    """Category id -> name, from the annotation file or from the cache of its masks."""
    listing = f"{FOLDER}/coco{num_class}/{place.name}.odgt"
    kept = cached_facts(root, listing, place.source)
    if kept is not None:
        return dict(kept["categories"])
    if not place.custom and not (root / place.source).is_file() and (root / listing).is_file():
        # Masks of an earlier version, which supported COCO's categories only.
        return dict(zip(ALL, ClassTable.load(TABLES / "coco.csv").names[1:], strict=True))
    if place.custom and not (root / place.source).is_file():
        raise FileNotFoundError(
            f"{root / place.source}: no such annotation file; check DATASET.root_dataset and the "
            f"list entry '{place.images[0]}:{place.source}'"
        )
    return _categories_in(root, place.source)


def _categories_in(root: Path, source: str) -> dict[Any, str]:
    """Category id -> name, of an annotation file."""
    path = root / source
    return _categories_since(root, source, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=16)  # the files can have hundreds of MB
def _categories_since(root: Path, source: str, changed: int) -> dict[Any, str]:
    return category_names(read_json(root, source, "COCO"), root / source)


def _own(categories: Mapping[Any, str]) -> list[str]:
    """Class names of custom categories: background, then the categories in the order of ids."""
    ids = sorted(categories, key=lambda key: (isinstance(key, str), key))
    names = [categories[key] for key in ids]
    return [BACKGROUND, *(name for name in names if not _is_background(name))]


def _is_background(name: str) -> bool:
    """Whether a category is the background, class 0."""
    return name.casefold() == BACKGROUND


def _classes(
    categories: Mapping[Any, str], num_class: int, path: Path
) -> tuple[ClassTable, dict[Any, int]]:
    """The class table for `num_class` and the categories of a file, and category id -> class.

    Raises:
        ValueError: `num_class` does not match the categories.
    """
    coco = ClassTable.load(TABLES / "coco.csv")
    voc = {coco.names[1 + ALL.index(category)]: k for k, category in enumerate(VOC, 1)}
    names = set(categories.values())
    of_coco = names <= set(coco.names[1:])
    own = _own(categories)
    if of_coco and num_class == len(coco):
        numbers, table = {name: k for k, name in enumerate(coco.names)}, coco
    elif of_coco and num_class == 1 + len(VOC) and set(voc) <= names:
        numbers, table = voc, ClassTable.load(TABLES / "voc2012.csv")
    elif num_class == len(own):
        colors = np.concatenate([np.zeros((1, 3), np.uint8), distinct_colors(len(own) - 1)])
        numbers, table = {name: k for k, name in enumerate(own)}, ClassTable(tuple(own), colors)
        if len(own) > IGNORED:
            raise ValueError(
                f"{path} has {len(own) - 1} categories, masks at most {IGNORED - 1}; merge some"
            )
    else:
        or_voc = ", or 21 for the classes of Pascal VOC" if of_coco and set(voc) <= names else ""
        raise ValueError(
            f"DATASET.num_class is {num_class}, but {path} has {len(own) - 1} categories "
            f"({_listed(own[1:])}), {len(own)} classes with background; set DATASET.num_class "
            f"{len(own)}{or_voc}"
        )
    numbers = {**numbers, **{name: 0 for name in names if _is_background(name)}}
    return table, {key: numbers[name] for key, name in categories.items() if name in numbers}


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _objects(
    content: Mapping[str, Any], categories: Mapping[Any, str], values: Mapping[Any, int], path: Path
) -> dict[Any, list[dict[str, Any]]]:
    """Image id -> its annotations of the categories in `values`.

    Raises:
        ValueError: an annotation has an unknown category or no shape, or all of them are of unknown
            images; otherwise objects would become background.
    """
    images = {image["id"] for image in content["images"]}
    if not images or not content["annotations"]:
        what = "annotations" if images else "images"
        raise ValueError(f"{path}: its list of {what} is empty; it cannot be used for training")
    if all(map(is_scaled, content["annotations"])):
        raise ValueError(
            f"{path}: all its polygons lie within one pixel, as if relative to the image size; "
            "give their corners in pixels"
        )
    objects: dict[Any, list[dict[str, Any]]] = {}
    others: list[Any] = []
    for number, one in enumerate(content["annotations"]):
        category, name = one.get("category_id"), one.get("id", number)
        if not is_key(category) or category not in categories:
            raise ValueError(
                f"{path}: annotation {name!r:.60} has category_id {category!r:.60}, not one of "
                f"its categories {_listed([repr(key) for key in categories])}"
            )
        if one.get("segmentation") == []:
            raise ValueError(
                f"{path}: annotation {name!r:.60} has an empty segmentation, as bounding boxes "
                "without shapes have; add its shape, or remove it"
            )
        key = one.get("image_id")
        if not is_key(key) or key not in images:
            others.append(key)
        elif category in values:
            objects.setdefault(key, []).append(one)
    if len(others) == len(content["annotations"]):
        raise ValueError(
            f"{path}: none of its annotations belongs to its images: the first has image_id "
            f"{others[0]!r:.60}, the first image the id {content['images'][0]['id']!r:.60}"
        )
    return objects


def is_scaled(annotation: dict[str, Any]) -> bool:
    """Whether an annotation has polygons whose corners are all in [0, 1]."""
    polygons = annotation.get("segmentation")
    if not isinstance(polygons, list) or not polygons:
        return False
    return all(
        isinstance(polygon, list)
        and all(isinstance(number, (int, float)) and 0 <= number <= 1 for number in polygon)
        for polygon in polygons
    )


def draw(
    image: dict[str, Any],
    objects: Sequence[dict[str, Any]],
    categories: Mapping[Any, int],
    source: Path,
) -> np.ndarray:
    """The mask of one image.

    Args:
        image: its entry in the JSON file, with `height` and `width`.
        objects: its annotations, as polygons or run-length encodings.
        categories: category id -> stored value.
        source: the JSON file, for errors.

    Returns:
        (height, width) uint8: stored values, 0 for background, 255 in crowds.

    Raises:
        ValueError: the shape of an object cannot be rasterised.
    """
    mask = np.zeros((image["height"], image["width"]), dtype=np.uint8)
    try:
        shapes = [
            (one, coco_shapes.decode(one.get("segmentation"), *mask.shape)) for one in objects
        ]
    except ValueError as error:
        raise ValueError(f"{source}: {image['file_name']}: damaged annotation: {error}") from error
    # Crowds first, then by decreasing size: later shapes are on top.
    shapes.sort(key=lambda pair: (not pair[0].get("iscrowd"), -int(pair[1].sum())))
    for one, shape in shapes:
        mask[shape] = IGNORED if one.get("iscrowd") else categories[one["category_id"]]
    return mask


# ------------------------------------------------------------------------------ shared
def year_of(split: str) -> str:
    """`train` -> `train2017`, `val` -> `val2017`; other splits are unchanged."""
    return f"{split}2017" if split in ("train", "val") else split


def image_places(year: str) -> tuple[str, ...]:
    """Possible folders of the images, below the root."""
    return f"images/{year}", year


def first_folder(root: Path, places: Sequence[str], title: str) -> str:
    """The first of `places` that is a folder below `root`."""
    for place in places:
        if (root / place).is_dir():
            return place
    raise not_here(root, title, f"the folder {places[0]}", "coco")


def read_json(root: Path, name: str, title: str) -> dict[str, Any]:
    """Reads an annotation file below `root`, and checks its images.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not JSON, has no images or annotations, or an entry is invalid.
    """
    path = root / name
    if not path.is_file():
        raise not_here(root, f"{title} annotations", name, title.lower().replace(" ", "_"))
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({one_line(error)})") from error
    return check_content(content, path, title)


def check_content(content: Any, path: Path, title: str) -> dict[str, Any]:
    """The content of an annotation file whose images are valid; ValueError if they are not."""
    for key in ("images", "annotations"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: has no {key!r}; it is not an annotation file of {title}")
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: entry {number} of {key!r} is {entry!r:.60}; damaged")
    for number, image in enumerate(content["images"]):
        fault = _fault(image)
        if fault:
            raise ValueError(f"{path}: image {image.get('file_name') or number}: {fault}; damaged")
    return content  # type: ignore[no-any-return]


def is_key(value: Any) -> bool:
    """Whether a JSON value can be an id."""
    return isinstance(value, (int, str))


def category_names(content: Mapping[str, Any], path: Path) -> dict[Any, str]:
    """Category id -> name, from `categories` of an annotation file.

    Raises:
        ValueError: there are none, an id or name is missing, or two are equal.
    """
    entries = content.get("categories")
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path}: has no 'categories', a list with the id and name of each, so the classes of "
            "its annotations are unknown"
        )
    found: dict[Any, str] = {}
    for number, entry in enumerate(entries):
        key, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, "")
        if not is_key(key) or not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: entry {number} of 'categories' is {entry!r:.80}; damaged")
        name = name.strip()
        if key in found or name in found.values():
            what = f"the id {key!r}" if key in found else f"the name {name!r}"
            raise ValueError(f"{path}: two of its categories have {what}; rename or merge them")
        found[key] = name
    return found


def _fault(image: dict[str, Any]) -> str:
    """The problem of an entry in `images`; "" if there is none."""
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
        return f"{image['width']} x {image['height']} pixels are more than images may have"
    return ""


def coco_records(
    content: Mapping[str, Any], images: str, masks: str, path: Path
) -> list[tuple[dict[str, Any], Record]]:
    """The entries in `images` of the JSON file, each with its record.

    Raises:
        ValueError: two of them have the same id, or would have the same mask file.
    """
    found: list[tuple[dict[str, Any], Record]] = []
    seen: dict[Any, str] = {}
    for image in content["images"]:
        name = image["file_name"]
        # Without "/" and "..", so that masks stay in their folder.
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", "//", "..")]
        mask = str(PurePosixPath(masks, *parts).with_suffix(".png"))
        for key, what in (
            (image["id"], f"both have the id {image['id']!r}"),
            (("mask", mask), "would share one mask"),
        ):
            if key in seen:
                raise ValueError(
                    f"{path}: images {seen[key]} and {name} {what}; rename one of them"
                )
            seen[key] = name
        found.append(
            (
                image,
                Record(
                    fpath_img=str(PurePosixPath(images, name)),
                    fpath_segm=mask,
                    width=image["width"],
                    height=image["height"],
                ),
            )
        )
    return found
