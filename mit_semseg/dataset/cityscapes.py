"""Cityscapes with its 19 evaluated classes, in the native layout.

Paper: Cordts et al. 2016, arXiv:1604.01685.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mit_semseg.config import DataOptions
from mit_semseg.dataset.base import FORMATS, Archive, DataFormat, Source, not_here
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record, list_images, match_by_stem

# Stored values in *_labelIds.png, in class order; all others of 0..33 are void.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_IMAGE, _LABEL, _TRAIN = "_leftImg8bit", "_gtFine_labelIds", "_gtFine_labelTrainIds"


@FORMATS.register("cityscapes")
class Cityscapes(DataFormat):
    """`leftImg8bit/<split>/<city>` beside `gtFine/<split>/<city>`.

    The masks are `*_labelIds.png`, which the data set includes, if every image has one, otherwise
    `*_labelTrainIds.png`.
    """

    title = "Cityscapes"
    table = "cityscapes"
    source = Source(
        title="Cityscapes (11 GB)",
        licence="non-commercial use after registration; see https://www.cityscapes-dataset.com/license",
        home="https://www.cityscapes-dataset.com/downloads/",
        layout="leftImg8bit/{train,val}/<city>/ and gtFine/{train,val}/<city>/ "
        "(leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip)",
        folder="cityscapes",
        archives=tuple(
            Archive((), name=f"{kind}_trainvaltest.zip") for kind in ("leftImg8bit", "gtFine")
        ),
    )
    num_class = 19

    def records(self, root: Path, split: str) -> list[Record]:
        images, labels = f"leftImg8bit/{split}", f"gtFine/{split}"
        for folder in (images, labels):
            if not (root / folder).is_dir():
                raise not_here(root, self.title, f"the folder {folder}", "cityscapes")
        photos, masks = list_images(root / images), list_images(root / labels)
        unmatched: list[str] = []
        for end in (_LABEL, _TRAIN):
            pairs, missing, _ = match_by_stem(photos, masks, _IMAGE, end)
            if pairs and not missing:
                return [
                    Record(fpath_img=f"{images}/{photo}", fpath_segm=f"{labels}/{mask}")
                    for photo, mask in pairs
                ]
            unmatched = unmatched or missing
        raise ValueError(
            f"{root / labels}: not every image of {images} has a mask *{_LABEL}.png or "
            f"*{_TRAIN}.png{f'; the first without is {unmatched[0]}' if unmatched else ''}"
        )

    def label_map(self, records: Sequence[Record], options: DataOptions) -> LabelMap:
        by_train_id = {record["fpath_segm"].endswith(f"{_TRAIN}.png") for record in records}
        if len(by_train_id) > 1:
            raise ValueError(
                f"the list mixes *{_LABEL}.png and *{_TRAIN}.png masks, whose values have "
                "different meanings; use one kind"
            )
        if by_train_id == {True}:
            return LabelMap.identity(options.num_class, 255, " (Cityscapes labelTrainIds)")
        values = dict.fromkeys(range(34), -1)
        values |= {stored: k for k, stored in enumerate(LABEL_IDS)}
        return LabelMap(values, options.num_class, " (Cityscapes labelIds)")
