"""ADE20K scene parsing (SceneParse150), in the layout of ADEChallengeData2016.

Paper: Zhou et al. 2017, "Scene Parsing through ADE20K Dataset".
"""

from __future__ import annotations

from collections.abc import Sequence

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, Archive, PairedFolders, Source
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record

_FOLDERS = {"train": "training", "val": "validation"}


@FORMATS.register("ade20k")
class Ade20k(PairedFolders):
    """`images/training` beside `annotations/training`; stored 0 is other, 1..150 the classes."""

    title = "ADE20K"
    table = "ade20k"
    source = Source(
        title="ADE20K, ADEChallengeData2016 (0.9 GB)",
        licence="images: non-commercial research and education only; annotations: BSD-3-Clause",
        home="http://sceneparsing.csail.mit.edu/",
        layout="images/training images/validation annotations/training annotations/validation",
        folder="ADEChallengeData2016",
        archives=(
            Archive(
                ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",),
                member="ADEChallengeData2016",
            ),
        ),
        # Where the published recipes expect them, with paths relative to the folder above.
        lists={"train": "training.odgt", "val": "validation.odgt"},
    )
    num_class = 150

    def layouts(self, split: str) -> list[tuple[str, str]]:
        folder = _FOLDERS.get(split, split)
        bases = ("", "ADEChallengeData2016/")
        return [(f"{base}images/{folder}", f"{base}annotations/{folder}") for base in bases]

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        return LabelMap.shifted(options.num_class, label_offset=1)
