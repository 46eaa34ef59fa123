"""SBU-shadow: shadow detection, 4085 training images and 638 test images.

Paper: Vicente et al. 2016, "Large-scale training of shadow detectors with noisily-annotated shadow
examples". Licence: for non-commercial research, according to the README in the archive.
"""

from __future__ import annotations

from collections.abc import Sequence

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, Archive, PairedFolders, Source
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record

SHADOW = 255
_FOLDERS = {"train": "SBUTrain4KRecoveredSmall", "val": "SBU-Test", "test": "SBU-Test"}


@FORMATS.register("sbu")
class Sbu(PairedFolders):
    """`<split>/ShadowImages` beside `<split>/ShadowMasks`; stored 0 is lit, 255 shadow."""

    title = "SBU-shadow"
    table = "sbu"
    source = Source(
        title="SBU-shadow (2.2 GB)",
        licence="non-commercial research only",
        home="https://www3.cs.stonybrook.edu/~cvl/projects/shadow_noisy_label/index.html",
        layout="SBUTrain4KRecoveredSmall/{ShadowImages,ShadowMasks}/ and "
        "SBU-Test/{ShadowImages,ShadowMasks}/",
        folder="SBU-shadow",
        archives=(
            Archive(
                ("https://www3.cs.stonybrook.edu/~cvl/content/datasets/shadow_db/SBU-shadow.zip",),
                member="SBU-shadow",
            ),
        ),
    )
    num_class = 2

    def layouts(self, split: str) -> list[tuple[str, str]]:
        folder = _FOLDERS.get(split, split)
        bases = (folder, f"SBU-shadow/{folder}")
        return [(f"{base}/ShadowImages", f"{base}/ShadowMasks") for base in bases]

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        return LabelMap({0: 0, SHADOW: 1}, options.num_class, " (SBU-shadow: 0 lit, 255 shadow)")
