"""COCO's JSON: polygons and run-length encodings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mit_semseg.dataset import coco_shapes
from mit_semseg.dataset.annotations.base import (
    Annotations,
    Choices,
    Item,
    Shape,
    Tree,
    draw_shapes,
    split_of,
)
from mit_semseg.dataset.coco import category_names, check_content, is_key, is_scaled


class CocoReader:
    """Files with `images`, `annotations` and `categories`; several are several splits."""

    title = "COCO"
    recognised_by = "a .json file with 'images', 'annotations' and 'categories'"

    def finds(self, tree: Tree) -> bool:
        return any(_is_coco(content) for _, content in tree.json_sample())

    def read(self, tree: Tree, choices: Choices) -> Annotations:
        found = Annotations(
            self.title,
            [],
            [],
            rules=[
                "of overlapping objects the smaller one is on top; crowds are ignored",
                "images without annotations are background",
            ],
        )
        for file in tree.of_type(".json"):
            try:
                content = tree.content(file)
                if not _is_coco(content):
                    found.problems.append(f"{file}: not COCO's objects; left out")
                    continue
            except ValueError as error:
                found.problems.append(str(error))
                continue
            self._add(tree, file, check_content(content, file, self.title), found)
        return found

    def _add(self, tree: Tree, file: Path, content: dict[str, Any], found: Annotations) -> None:
        categories = category_names(content, file)
        if content["annotations"] and all(map(is_scaled, content["annotations"])):
            raise ValueError(
                f"{file}: all its polygons lie within one pixel, as if relative to the image size; "
                "give their corners in pixels"
            )
        found.names += [name for name in categories.values() if name not in found.names]
        objects: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for number, one in enumerate(content["annotations"]):
            key = one.get("image_id")
            if not is_key(key) or key not in objects:
                name = one.get("id", number)
                found.problems.append(
                    f"{file}: annotation {name!r:.60} is of image {key!r:.60}, which is not in "
                    "'images'; left out"
                )
                continue
            objects[key].append(one)
        split = split_of(tree.inside(file))
        for image in content["images"]:
            name = image["file_name"]
            where = f"{file}: {name}"
            try:
                shapes = [_shape(one, categories) for one in objects[image["id"]]]
                path = tree.image(name, file.parent)
            except (ValueError, FileNotFoundError) as error:
                found.problems.append(f"{where}: {error}")
                continue
            stated = (image["width"], image["height"])
            draw = partial(draw_shapes, shapes, stated, True, where)
            found.items.append(Item(path, where, draw, split or split_of(tree.inside(path))))


def _is_coco(content: Any) -> bool:
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        return False
    first = content["annotations"][:1] if isinstance(content["annotations"], list) else []
    return not any(isinstance(one, dict) and "segments_info" in one for one in first)  # panoptic


def _shape(one: dict[str, Any], categories: dict[Any, str]) -> Shape:
    """The shape of an annotation; ValueError if it has none, or an unknown category."""
    name, category = one.get("id"), one.get("category_id")
    if not is_key(category) or category not in categories:
        raise ValueError(
            f"annotation {name!r:.60} has category_id {category!r:.60}, not one of 'categories'"
        )
    segmentation = one.get("segmentation")
    if not segmentation:
        raise ValueError(
            f"annotation {name!r:.60} has no segmentation, as bounding boxes have; add its shape, "
            "or remove it"
        )
    corners = None
    if isinstance(segmentation, list):
        rings = [coco_shapes.corners_of(polygon) for polygon in segmentation]
        corners = np.concatenate(rings)
    return Shape(
        categories[category],
        partial(coco_shapes.decode, segmentation),
        corners,
        ignored=bool(one.get("iscrowd")),
    )
