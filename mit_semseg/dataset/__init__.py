"""Data sets: from files to batches. Importing this package registers all data formats."""

from mit_semseg.dataset import (
    ade20k,
    camvid,
    cityscapes,
    coco,
    coco_panoptic,
    cocostuff,
    color_masks,
    folder,
    lip,
    sbu,
    sunrgbd,
    voc2012,
    voc_aug,
)
from mit_semseg.dataset.base import FORMATS, DataFormat
from mit_semseg.dataset.base_dataset import BaseDataset, imresize
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.images import load_image, load_mask
from mit_semseg.dataset.label_map import LabelMap
from mit_semseg.dataset.records import Record, read_odgt
from mit_semseg.dataset.split import Split, build_split, check_sample, class_table
from mit_semseg.dataset.test import TestDataset
from mit_semseg.dataset.train import TrainDataset
from mit_semseg.dataset.transforms import scaled_inputs
from mit_semseg.dataset.val import ValDataset

__all__ = [
    "FORMATS",
    "BaseDataset",
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
    "coco",
    "coco_panoptic",
    "cocostuff",
    "color_masks",
    "folder",
    "imresize",
    "lip",
    "load_image",
    "load_mask",
    "read_odgt",
    "sbu",
    "scaled_inputs",
    "sunrgbd",
    "voc2012",
    "voc_aug",
]
