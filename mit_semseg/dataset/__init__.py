"""Data: from files to batches. Importing this package registers every format by its name."""

from mit_semseg.dataset import camvid, folder
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
    "build_split",
    "camvid",
    "check_sample",
    "class_table",
    "folder",
    "read_odgt",
]
