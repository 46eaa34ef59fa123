"""Annotations as other tools write them, and their conversion to masks, lists and a class table."""

from mit_semseg.dataset.annotations.base import Annotations, Choices, Item, Numbers, Tree
from mit_semseg.dataset.annotations.convert import Imported, convert
from mit_semseg.dataset.annotations.recognise import READERS, recognise

__all__ = [
    "READERS",
    "Annotations",
    "Choices",
    "Imported",
    "Item",
    "Numbers",
    "Tree",
    "convert",
    "recognise",
]
