"""COCO-Stuff (164k): things and stuff of COCO 2017, from its PNG label maps.

Paper: Caesar et al. 2018, arXiv:1612.03716.
"""

from __future__ import annotations

from collections.abc import Sequence

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, Archive, PairedFolders, Source
from mit_semseg.dataset.classes import ClassTable, table_of
from mit_semseg.dataset.coco import IMAGES
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record

# Stored values 0..181 are COCO ids minus 1. These eleven are not annotated.
UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
USED = tuple(value for value in range(182) if value not in UNUSED)
UNLABELLED = 255


@FORMATS.register("cocostuff")
class CocoStuff(PairedFolders):
    """`images/train2017` beside `annotations/train2017` or `stuffthingmaps/train2017`.

    171 classes without gaps, or, with `DATASET.num_class 182`, the stored values.
    """

    title = "COCO-Stuff"
    table = "cocostuff"
    source = Source(
        title="COCO-Stuff 164k (20 GB)",
        licence="annotations: CC BY 4.0; images: flickr terms of use",
        home="https://github.com/nightrome/cocostuff",
        layout="images/{train,val}2017/*.jpg and annotations/{train,val}2017/*.png",
        folder="cocostuff",
        archives=(
            *IMAGES,
            Archive(
                (
                    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
                    "stuffthingmaps_trainval2017.zip",
                ),
                into="annotations",
            ),
        ),
    )
    num_class = 171

    def layouts(self, split: str) -> list[tuple[str, str]]:
        year = split if split.endswith("2017") else f"{split}2017"
        return [
            (f"images/{year}", f"annotations/{year}"),
            (f"images/{year}", f"stuffthingmaps/{year}"),
            (year, f"stuffthingmaps/{year}"),
            (year, f"annotations/{year}"),
            (f"{split}_img", f"{split}_label"),
        ]

    def classes(self, options: DataOptions) -> ClassTable:
        table = table_of("cocostuff", 182, "COCO-Stuff")
        if options.num_class == 182:
            return table
        if options.num_class != len(USED):
            raise ValueError(
                f"DATASET.num_class is {options.num_class}, but COCO-Stuff has 171 classes "
                "(182 with the unused ids); set DATASET.num_class 171"
            )
        return ClassTable(tuple(table.names[v] for v in USED), table.colors[list(USED)])

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        used = range(182) if options.num_class == 182 else USED
        values = {stored: k for k, stored in enumerate(used)} | {UNLABELLED: -1}
        return LabelMap(
            values, options.num_class, " (COCO-Stuff: COCO ids minus 1, 255 unlabelled)"
        )
