"""Data: from files to batches. Importing this package registers every format by its name."""

from mit_semseg.dataset import ade20k, camvid, cityscapes, cocostuff, folder, voc2012
from mit_semseg.dataset.base import (
    FORMATS,
    ClassTable,
    DataFormat,
    LabelMap,
    Split,
    build_split,
    check_sample,
    class_table,
)
from mit_semseg.dataset.records import Record, read_odgt
from mit_semseg.dataset.test import TestDataset
from mit_semseg.dataset.train import TrainDataset
from mit_semseg.dataset.transforms import load_image, load_mask, scaled_inputs
from mit_semseg.dataset.val import ValDataset

__all__ = [
    "FORMATS",
    "ClassTable",
    "DataFormat",
    "LabelMap",
    "Record",
    "Split",
    "TestDataset",
    "TrainDataset",
    "ValDataset",
    "ade20k",
    "build_split",
    "camvid",
    "check_sample",
    "cityscapes",
    "class_table",
    "cocostuff",
    "folder",
    "load_image",
    "load_mask",
    "read_odgt",
    "scaled_inputs",
    "voc2012",
]
