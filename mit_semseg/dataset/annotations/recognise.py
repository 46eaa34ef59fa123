"""Which tool wrote a folder of annotations."""

from __future__ import annotations

from mit_semseg.dataset.annotations.base import Annotations, Choices, Reader, Tree
from mit_semseg.dataset.annotations.coco import CocoReader
from mit_semseg.dataset.annotations.label_studio import LabelStudioReader
from mit_semseg.dataset.annotations.labelme import LabelmeReader
from mit_semseg.dataset.annotations.masks import MaskReader
from mit_semseg.dataset.annotations.supervisely import SuperviselyReader
from mit_semseg.dataset.annotations.yolo import YoloReader
from mit_semseg.errors import counted
from mit_semseg.registry import closest

# In the order of recognition. Masks come last: exports of other formats may contain some, too.
READERS: dict[str, Reader] = {
    "supervisely": SuperviselyReader(),
    "label-studio": LabelStudioReader(),
    "coco": CocoReader(),
    "labelme": LabelmeReader(),
    "yolo": YoloReader(),
    "masks": MaskReader(),
}


def recognise(tree: Tree) -> str:
    """The name of the format of a folder.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [name for name, reader in READERS.items() if reader.finds(tree)]
    if found[-1:] == ["masks"] and len(found) == 2:
        found.pop()
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{tree.root} has annotations of several formats, {' and '.join(found)}; choose one "
            f"with --from {found[0]}"
        )
    formats = "; ".join(f"{name}: {reader.recognised_by}" for name, reader in READERS.items())
    raise ValueError(
        f"{tree.root}: no known annotations in its {counted(len(tree.files), 'file')} ({formats})"
    )


def read(tree: Tree, name: str, choices: Choices) -> tuple[str, Annotations]:
    """The format, `auto` recognised, and the annotations of a folder.

    Raises:
        FileNotFoundError, ValueError: the format is unknown, or nothing can be used.
    """
    if name != "auto" and name not in READERS:
        known = ["auto", *READERS]
        raise ValueError(
            f"--from is {name!r}{closest(name, known)}; it is one of {', '.join(known)}"
        )
    if name == "auto":
        name = "masks" if choices.binary else recognise(tree)
    annotations = READERS[name].read(tree, choices)
    if not annotations.items:
        first = f": {annotations.problems[0]}" if annotations.problems else ""
        raise ValueError(f"{tree.root}: no image of its {annotations.title} can be used{first}")
    return name, annotations
