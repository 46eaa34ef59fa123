"""LIP (Look into Person), single person: 19 parts of people and clothes, and background.

Paper: Gong et al. 2017, arXiv:1703.05446. Licence: for non-commercial research and education, which
must be accepted on its page, so the archives are downloaded manually.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, Archive, PairedFolders, Source
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record

UNLABELLED = 255


@FORMATS.register("lip")
class Lip(PairedFolders):
    """`train_images` beside `train_segmentations`; stored 0..19 are the classes.

    They can also be in the folders of the archives, `TrainVal_images` and
    `TrainVal_parsing_annotations`.
    """

    title = "LIP"
    table = "lip"
    source = Source(
        title="LIP, Look into Person (single person)",
        licence="non-commercial research and education only",
        home="http://sysu-hcp.net/lip/overview.php",
        layout="{train,val}_images/*.jpg and {train,val}_segmentations/*.png "
        "(TrainVal_images.zip and TrainVal_parsing_annotations.zip)",
        folder="LIP",
        archives=tuple(
            Archive((), name=f"TrainVal_{kind}.zip") for kind in ("images", "parsing_annotations")
        ),
    )
    num_class = 20
    mirror_pairs = ((14, 15), (16, 17), (18, 19))  # arms, legs, shoes

    def layouts(self, split: str) -> list[tuple[str, str]]:
        kinds = (f"{split}_images", f"{split}_segmentations")
        archives = ("TrainVal_images", "TrainVal_parsing_annotations")
        images, labels = (
            (kind, f"{archive}/{kind}", f"{archive}/{archive}/{kind}")
            for kind, archive in zip(kinds, archives)
        )
        return list(itertools.product(images, labels))

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        return LabelMap.identity(options.num_class, UNLABELLED, " (LIP: 0..19 are classes)")
