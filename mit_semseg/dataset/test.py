"""Data set of images without labels, for prediction."""

from __future__ import annotations

from typing import Any

from mit_semseg.dataset.base_dataset import BaseDataset
from mit_semseg.dataset.loading import load_depth_of, load_input
from mit_semseg.dataset.transforms import scaled_inputs


class TestDataset(BaseDataset):
    """Images at all evaluation scales.

    Args:
        odgt: list file, list files, or records (with `fpath_img` only); paths are relative to the
            working folder.
        opt: `cfg.DATASET`, or any object with some of its attributes.
        normalized: False: return uint8 images, for `Normalize`.
        part: part of the list: `max_sample`, `start_idx`, `end_idx`, see `BaseDataset`.
    """

    __test__ = False  # not a pytest class; the name is published

    def __init__(self, odgt: Any, opt: Any, *, normalized: bool = True, **part: int) -> None:
        self.normalized = normalized
        super().__init__(odgt, opt, label_map=None, **part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`: `img_ori`, `img_data` and `info` as in `ValDataset`."""
        record = self.list_sample[index]
        image = load_input(record["fpath_img"], self.options)
        depth = load_depth_of(record, "", self.options, (image.shape[1], image.shape[0]))
        return {
            "img_ori": image,
            "img_data": scaled_inputs(image, self.options, self.normalized, depth),
            "info": record["fpath_img"],
        }
