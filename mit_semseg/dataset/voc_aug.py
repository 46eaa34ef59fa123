"""Pascal VOC 2012 with the Semantic Boundaries Dataset (SBD): 10582 training images.

Papers: Everingham et al. 2015, "The Pascal Visual Object Classes Challenge: A Retrospective";
Hariharan et al. 2011, "Semantic contours from inverse detectors". Licence: the images are from
flickr, subject to its terms of use; none is stated for the annotations.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mit_semseg.dataset.base import FORMATS, Archive, Source, not_here
from mit_semseg.dataset.records import Record
from mit_semseg.dataset.voc2012 import ARCHIVE, Voc2012

_PLACES = ("benchmark_RELEASE/dataset", "SBD", "sbd")


@FORMATS.register("vocaug")
class VocAug(Voc2012):
    """VOC2012 in the layout of `voc2012`, beside SBD's `benchmark_RELEASE/dataset`.

    `train` has the images of SBD's `train.txt` and `val.txt` and of VOC's `train.txt`, without
    those of VOC's `val.txt`. Masks are VOC's palette PNGs, with 255 on object borders, for the
    images of VOC's `train.txt`, and SBD's `cls/*.mat`, without borders, for all others. All other
    splits, such as `val`, are VOC's.
    """

    source = Source(
        title="Pascal VOC 2012 with SBD (3.4 GB)",
        licence="images from flickr, subject to the flickr terms of use",
        home="http://home.bharathh.info/pubs/codes/SBD/download.html",
        layout="VOC2012/{ImageSets,JPEGImages,SegmentationClass}/ and "
        "benchmark_RELEASE/dataset/{img,cls,train.txt,val.txt}",
        folder="VOCaug",
        archives=(
            replace(ARCHIVE, into="VOC2012"),
            Archive(
                (
                    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
                    "semantic_contours/benchmark.tgz",
                ),
                sha256="6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
                member="benchmark_RELEASE",
                into="benchmark_RELEASE",
            ),
        ),
    )

    name = "vocaug"

    def records(self, root: Path, split: str) -> list[Record]:
        if split not in ("train", "trainaug"):
            return super().records(root, split)
        held_out = {_stem(record) for record in super().records(root, "val")}
        place = _place(root)
        chosen: dict[str, Record] = {}
        for listing in ("train.txt", "val.txt"):
            for name in (root / place / listing).read_text(encoding="utf-8").split():
                chosen[name] = Record(
                    fpath_img=f"{place}/img/{name}.jpg", fpath_segm=f"{place}/cls/{name}.mat"
                )
        chosen |= {_stem(record): record for record in super().records(root, "train")}
        return [chosen[name] for name in sorted(chosen) if name not in held_out]


def _stem(record: Record) -> str:
    return Path(record["fpath_img"]).stem


def _place(root: Path) -> str:
    """The folder of SBD, below `root`; FileNotFoundError if it is incomplete."""
    present = [place for place in _PLACES if (root / place).is_dir()]
    place = present[0] if present else _PLACES[0]
    for part in ("img", "cls", "train.txt", "val.txt"):
        if not (root / place / part).exists():
            raise not_here(root, "SBD", f"{place}/{part}", "vocaug")
    return place
