"""Images without labels, for prediction."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from mit_semseg.dataset.base import load_depth_of
from mit_semseg.dataset.options import DataOptions
from mit_semseg.dataset.records import Record, read_records
from mit_semseg.dataset.transforms import load_image, scaled_inputs


class TestDataset(Dataset[dict[str, Any]]):
    """Images at all evaluation scales.

    Args:
        odgt: list file, list files, or records (`fpath_img` is enough); paths are taken as they
            are, relative to the working folder.
        opt: `cfg.DATASET`, or any object with some of its attributes.
        normalized: False leaves the pixels to `Normalize`.
    """

    __test__ = False  # the name is published; it is no test case

    def __init__(self, odgt: Any, opt: Any, *, normalized: bool = True) -> None:
        self.options = DataOptions.read(opt)
        self.normalized = normalized
        self.records: list[Record] = read_records(odgt)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`: `img_ori`, `img_data` and `info` as in `ValDataset`."""
        record = self.records[index]
        image = load_image(record["fpath_img"])
        depth = load_depth_of(record, "", self.options, (image.shape[1], image.shape[0]))
        return {
            "img_ori": image,
            "img_data": scaled_inputs(image, self.options, self.normalized, depth),
            "info": record["fpath_img"],
        }
