"""ADE20K scene parsing (SceneParse150), in the layout of ADEChallengeData2016.

Paper: Zhou et al. 2017, "Scene Parsing through ADE20K Dataset".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mit_semseg.dataset.base import FORMATS, Archive, DataFormat, Source, first_layout
from mit_semseg.dataset.classes import ClassTable, table_of
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.records import Record, pair_folders

_FOLDERS = {"train": "training", "val": "validation"}


@FORMATS.register("ade20k")
class Ade20k(DataFormat):
    """`images/training` beside `annotations/training`; stored 0 is other, 1..150 the classes."""

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
        # Where the published recipes look for them, with paths from the folder above.
        lists={"train": "training.odgt", "val": "validation.odgt"},
    )
    num_class = 150

    def records(self, root: Path, split: str) -> list[Record]:
        folder = _FOLDERS.get(split, split)
        candidates = [
            (f"{base}images/{folder}", f"{base}annotations/{folder}")
            for base in ("", "ADEChallengeData2016/")
        ]
        return pair_folders(root, *first_layout(root, candidates, "ADE20K"))

    def classes(self, options: DataOptions) -> ClassTable:
        return table_of("ade20k", options.num_class, "ADE20K")

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        return LabelMap.shifted(options.num_class, label_offset=1)
