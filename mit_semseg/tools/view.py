"""A page of a data set: overlays, classes, odd files first: `mit-semseg data view`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from mit_semseg.config import DataOptions, load_options
from mit_semseg.dataset.annotations import Choices, Tree
from mit_semseg.dataset.annotations.base import read_json
from mit_semseg.dataset.annotations.convert import class_ids, numbering
from mit_semseg.dataset.annotations.recognise import read
from mit_semseg.dataset.class_files import is_background
from mit_semseg.dataset.classes import ClassTable
from mit_semseg.dataset.loading import load_values, open_image, paths_of
from mit_semseg.dataset.rasters import RasterFile
from mit_semseg.dataset.records import Record
from mit_semseg.dataset.split import Split, build_split
from mit_semseg.dataset.transforms import resize_image
from mit_semseg.errors import counted, one_line
from mit_semseg.visualize.bands import picture
from mit_semseg.visualize.legend import percent
from mit_semseg.visualize.pages import embedded, embedded_labels, render_page

_SIDE = 400  # longest side of thumbnails, in pixels
_MOSTLY = 0.9  # share of ignored pixels, or of images of one size, from which others are odd
_RARE = 2  # images with a class that is called rare, in sets of at least _MANY
_MANY = 20


@dataclass(frozen=True)
class Source:
    """A sample that can be shown.

    Attributes:
        name: its name on the page.
        image: the image file.
        labels: returns its class ids, (H, W), -1 for ignored.
        options: what the image is read with.
    """

    name: str
    image: Path
    labels: Callable[[], np.ndarray]
    options: DataOptions = DataOptions()


@dataclass
class _Seen:
    """What is known of a sample; `odd` has what is unusual, most severe first."""

    source: Source
    size: tuple[int, int] = (0, 0)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ignored: float = 0.0
    odd: list[tuple[int, str]] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        return not self.counts.size

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts odd samples by severity, then by the number of oddities."""
        return (min(grade for grade, _ in self.odd), -len(self.odd)) if self.odd else (99, 0)


def view(place: str, out: str | Path, count: int = 60, progress: bool = True) -> Path:
    """Write a page of a data set as one self-contained HTML file.

    Args:
        place: a recipe, a folder with a `recipe.yaml`, or a folder of annotations.
        out: the file to write.
        count: number of samples with thumbnails: odd ones first, then others evenly.
        progress: show a progress bar.

    Returns:
        `out`.

    Raises:
        FileNotFoundError, ValueError: it does not exist, or has no samples.
    """
    sources, classes, title = _sources(place)
    seen = list(_look(sources, len(classes), progress))
    _judge(seen, classes)
    odd = sorted((one for one in seen if one.odd), key=lambda one: one.rank)
    plain = [one for one in seen if not one.odd]
    rest = max(0, count - len(odd))
    shown = odd[:count] + [plain[k] for k in _evenly(len(plain), rest)]
    pixels = sum((one.counts for one in seen if not one.broken), np.zeros(len(classes), np.int64))
    images = sum(
        ((one.counts > 0).astype(np.int64) for one in seen if not one.broken),
        np.zeros(len(classes), np.int64),
    )
    sizes = Counter(one.size for one in seen if not one.broken).most_common()
    total = sum(one.size[0] * one.size[1] for one in seen)
    labelled = int(pixels.sum())
    kinds = Counter(_kind(text) for one in seen for _, text in one.odd)
    return render_page(
        out,
        "data.html",
        title=title,
        lead=f"{place}: {counted(len(seen), 'sample')}"
        + (f", {counted(len(odd), 'odd one')} first" if odd else ""),
        figures=[
            ("samples", f"{len(seen)}"),
            ("classes", f"{len(classes)}"),
            ("most common size", "{}x{}".format(*sizes[0][0]) if sizes else "none"),
            ("sizes", f"{len(sizes)}"),
            ("ignored pixels", percent(1 - labelled / total) if total else "none"),
        ],
        findings=[
            *(f"{counted(n, 'sample')}: {kind}" for kind, n in kinds.most_common()),
            *(f"{name}: in no mask" for name, n in zip(classes.names, images.tolist()) if not n),
        ],
        classes=[
            (name, color, percent(n / labelled) if labelled else "", 100 * n / top, images_of)
            for name, color, n, images_of in zip(
                classes.names, classes.colors.tolist(), pixels.tolist(), images.tolist()
            )
            if (top := max(pixels.max(), 1))
        ],
        cards=[_card(one, classes) for one in shown],
        hidden=len(seen) - len(shown),
    )


# ------------------------------------------------------------------------------ sources
def _sources(place: str) -> tuple[list[Source], ClassTable, str]:
    """The samples of a recipe or folder, the class table, and a title."""
    path = Path(place)
    recipe = path / "recipe.yaml" if path.is_dir() else path
    if recipe.is_file():
        options = load_options(str(recipe), ()).DATASET
        return _of_recipe(options, recipe)
    if not path.is_dir():
        raise FileNotFoundError(f"{place}: no such recipe or folder")
    tree = Tree(path)
    _, found = read(tree, "auto", Choices())
    classes, numbers = numbering(found, Choices(), "background", ())
    sources = [
        Source(tree.inside(one.image), one.image, partial(class_ids, one, numbers, []))
        for one in found.items
    ]
    return [*sources, *_left_out(found.problems)], classes, f"{path.name}: {found.title}"


def _left_out(problems: Sequence[str]) -> list[Source]:
    """Samples that an import could not use."""

    def fail(text: str) -> np.ndarray:
        raise ValueError(text)

    return [Source("left out", Path(), partial(fail, text)) for text in problems]


def _of_recipe(options: DataOptions, recipe: Path) -> tuple[list[Source], ClassTable, str]:
    sources: list[Source] = []
    splits: dict[str, Split] = {"train": build_split(options, "train")}
    if options.list_val != options.list_train:
        splits["val"] = build_split(options, "val")

    def labels(record: Record, split: Split) -> np.ndarray:
        with open_image(paths_of(record)[0], options) as file:
            stored = load_values(record, "", file.size)
        return split.label_map(stored, paths_of(record)[1])

    for which, split in splits.items():
        for record in split.records:
            image = Path(record["fpath_img"])
            name = f"{which}: {image.parent.name}/{image.name}"
            sources.append(Source(name, image, partial(labels, record, split), options))
    report = recipe.with_name("import.json")
    if recipe.name == "recipe.yaml" and report.is_file():
        content = read_json(report)
        problems = content.get("left_out") if isinstance(content, dict) else None
        if not isinstance(problems, list):
            raise ValueError(f"{report}: has no list 'left_out'; import again, or remove it")
        sources += _left_out([str(problem) for problem in problems])
    title = recipe.parent.name if recipe.name == "recipe.yaml" else recipe.stem
    return sources, splits["train"].classes, title


def _look(sources: Sequence[Source], num_class: int, progress: bool) -> Iterator[_Seen]:
    def look(source: Source) -> _Seen:
        try:
            labels = source.labels()
        except (OSError, ValueError) as error:
            return _Seen(source, odd=[(0, one_line(error))])
        known = labels[labels >= 0]
        return _Seen(
            source,
            (labels.shape[1], labels.shape[0]),
            np.bincount(known, minlength=num_class),
            1 - known.size / labels.size,
        )

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from tqdm(
            pool.map(look, sources),
            total=len(sources),
            desc="reading masks",
            disable=None if progress else True,
            leave=False,
        )


# ------------------------------------------------------------------------------ odd ones
def _judge(seen: Sequence[_Seen], classes: ClassTable) -> None:
    """Adds what is unusual to the samples."""
    usable = [one for one in seen if not one.broken]
    sizes = Counter(one.size for one in usable)
    usual, often = sizes.most_common(1)[0] if sizes else ((0, 0), 0)
    images = sum(
        ((one.counts > 0).astype(np.int64) for one in usable), np.zeros(len(classes), np.int64)
    )
    kinds = float(np.median([np.count_nonzero(one.counts) for one in usable])) if usable else 0.0
    for one in usable:
        present = np.flatnonzero(one.counts).tolist()
        if not present:
            one.odd.append((1, "nothing is labelled"))
        elif len(present) == 1 and is_background(classes.names[present[0]]):
            one.odd.append((1, "only background"))
        elif len(present) == 1 and kinds >= 3:
            one.odd.append((3, f"only one class: {classes.names[present[0]]}"))
        if one.size != usual and often >= _MOSTLY * len(usable):
            one.odd.append((2, "another size: {}x{}, usually {}x{}".format(*one.size, *usual)))
        if one.ignored > _MOSTLY and present:
            one.odd.append((3, f"mostly ignored: {percent(one.ignored)}"))
        if len(usable) >= _MANY:
            one.odd += [
                (4, f"rare class: {classes.names[k]}, in {counted(int(images[k]), 'image')}")
                for k in present
                if images[k] <= _RARE
            ]


def _kind(text: str) -> str:
    """What several samples have in common, of `rare class: bicycle, in 1 image`."""
    known = ("nothing is", "only ", "another size", "mostly ignored", "rare class")
    return text.split(":")[0] if text.startswith(known) else "cannot be used"


def _evenly(total: int, count: int) -> list[int]:
    """At most `count` of `total` numbers, evenly spread."""
    return sorted({(2 * k + 1) * total // (2 * count) for k in range(count)}) if count else []


def _card(one: _Seen, classes: ClassTable) -> dict[str, Any]:
    card: dict[str, Any] = {
        "name": one.source.name,
        "odd": [text for _, text in one.odd],
        "size": "" if one.broken else "{}x{}".format(*one.size),
        "classes": [],
        "image": "",
        "mask": "",
    }
    if one.broken:
        return card
    order = [int(k) for k in np.argsort(-one.counts, kind="stable") if one.counts[k]]
    card["classes"] = [
        (classes.names[k], classes.colors[k].tolist(), percent(one.counts[k] / one.counts.sum()))
        for k in order[:8]
    ]
    share = min(1.0, _SIDE / max(one.size))
    size = (max(1, round(share * one.size[0])), max(1, round(share * one.size[1])))
    options = one.source.options
    with open_image(one.source.image, options) as file:
        if isinstance(file, RasterFile):
            pixels = resize_image(picture(file.values(), options.bands), size)
        else:
            pixels = file.pixels(size)
        card["image"] = embedded(pixels)
    labels = cv2.resize(
        one.source.labels().astype(np.int16), size, interpolation=cv2.INTER_NEAREST_EXACT
    )
    hidden = [k for k, name in enumerate(classes.names) if is_background(name)]
    card["mask"] = embedded_labels(labels, classes.colors, hidden)
    return card
