"""Data set of validation samples: an image at all scales, and its full-size label."""

from __future__ import annotations

import os
from typing import Any

import torch

from mit_semseg.dataset.base_dataset import BaseDataset
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.loading import load_depth_of, load_pair
from mit_semseg.dataset.transforms import scaled_inputs


class ValDataset(BaseDataset):
    """Images with labels, unpadded, at all evaluation scales.

    Args:
        root_dataset: folder that relative paths are relative to.
        odgt: list file, list files, or records.
        opt: `cfg.DATASET`, or any object with some of its attributes.
        label_map: stored value -> class; None: from `label_offset` and `ignore_label`.
        normalized: False: return uint8 images, for `Normalize`.
        part: part of the list: `max_sample`, `start_idx`, `end_idx`, see `BaseDataset`.

    Raises:
        FileNotFoundError, ValueError: a list, an option or (when read) a sample cannot be used.
    """

    def __init__(
        self,
        root_dataset: str | os.PathLike[str],
        odgt: Any,
        opt: Any,
        *,
        label_map: LabelMap | None = None,
        normalized: bool = True,
        **part: int,
    ) -> None:
        self.root_dataset = os.fspath(root_dataset)
        self.normalized = normalized
        super().__init__(odgt, opt, label_map=label_map, **part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample number `index`.

        Returns:
            `img_ori` (H, W, 3) uint8 RGB array; `img_data`, a list with one (1, 3, h, w) tensor per
            scale, float32 or, with `normalized` False, uint8 RGB in channels_last; `seg_label`
            (1, H, W) int64 with -1 ignored; `info`, the image path as listed. With `depth` the
            tensors are (1, 4, h, w) float32; with `bands` they are (1, C, h, w) float32, and
            `img_ori` is (H, W, C) float32, normalised, NaN where there is no value.
        """
        record, root = self.list_sample[index], self.root_dataset
        image, labels = load_pair(record, root, self.label_map, self.options)
        depth = load_depth_of(record, root, self.options, (image.shape[1], image.shape[0]))
        return {
            "img_ori": image,
            "img_data": scaled_inputs(image, self.options, self.normalized, depth),
            "seg_label": torch.from_numpy(labels)[None],
            "info": record["fpath_img"],
        }
