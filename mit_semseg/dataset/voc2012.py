"""Pascal VOC 2012 segmentation, in the layout of VOCdevkit.

Paper: Everingham et al. 2015, "The Pascal Visual Object Classes Challenge: A Retrospective".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, Archive, DataFormat, Source, not_here
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record

BORDER = 255
ARCHIVE = Archive(
    (
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    ),
    sha256="e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
    member="VOCdevkit/VOC2012",
)


@FORMATS.register("voc2012")
class Voc2012(DataFormat):
    """Names in `ImageSets/Segmentation/<split>.txt`; palette masks, 255 on object borders.

    For names without a mask in `SegmentationClass` (`trainaug`), that in `SegmentationClassAug` is
    used, if it exists.
    """

    title = "Pascal VOC 2012"
    table = "voc2012"
    source = Source(
        title="Pascal VOC 2012 (2.0 GB)",
        licence="images from flickr, subject to the flickr terms of use",
        home="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        layout="ImageSets/Segmentation/*.txt JPEGImages/ SegmentationClass/",
        folder="VOC2012",
        archives=(ARCHIVE,),
    )
    num_class = 21
    name: ClassVar[str] = "voc2012"

    def records(self, root: Path, split: str) -> list[Record]:
        for base in ("", "VOC2012/", "VOCdevkit/VOC2012/"):
            listing = root / f"{base}ImageSets/Segmentation/{split}.txt"
            if listing.is_file():
                break
        else:
            expected = f"ImageSets/Segmentation/{split}.txt"
            raise not_here(root, self.title, expected, self.name)
        records = []
        for name in listing.read_text(encoding="utf-8").split():
            mask = f"{base}SegmentationClass/{name}.png"
            if not (root / mask).is_file():
                augmented = f"{base}SegmentationClassAug/{name}.png"
                mask = augmented if (root / augmented).is_file() else mask
            records.append(Record(fpath_img=f"{base}JPEGImages/{name}.jpg", fpath_segm=mask))
        return records

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        hint = " (VOC: 0..20 are classes, 255 is border)"
        return LabelMap.identity(options.num_class, BORDER, hint)
