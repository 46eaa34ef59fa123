"""`Result`: what a segmentation found in an image, as pictures, masks, polygons and numbers."""

from __future__ import annotations

import difflib
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mit_semseg import scores
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.outlines import coco_annotations, regions
from mit_semseg.dataset.rasters import to_lon_lat
from mit_semseg.dataset.sources import as_image, as_images, is_one, is_url
from mit_semseg.visualize import color_encode, overlay, prediction_sheet
from mit_semseg.visualize.results import area_legend, areas, class_counts, framed, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Lossless formats that keep palette indices; GIF renumbers them.
EXACT = (".png", ".tif", ".tiff", ".bmp")
# Suffixes of files that are no images, and their kinds.
_DATA = {".npy": "index", ".json": "coco", ".geojson": "geojson"}
_SHOWN = 960  # most pixels of a side of a picture in a notebook


@dataclass(frozen=True, eq=False)
class Result:
    """The segmentation of an image. Notebooks show it as an overlay with a legend.

    Attributes:
        image: (H, W, 3) uint8 RGB; of an image of other bands `visualize.bands.picture`.
        labels: (H, W) int64 class ids, indices into `names`; -1 where bands have no value.
        classes: names and colours.
        source: file or url of the image; None for an image in memory.
        label_offset: value of class 0 in `index` files, `DATASET.label_offset`.
        logits: scores at the network's resolution, one (1, K, h, w) tensor on the CPU for each
            scale and flip; empty unless the segmenter was asked for probabilities.
    """

    image: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    classes: ClassTable = field(repr=False)
    source: Path | str | None = None
    label_offset: int = 0
    logits: Sequence[Tensor] = field(default=(), repr=False)

    @classmethod
    def of(
        cls, images: Any, output: np.ndarray | Tensor, classes: ClassTable | Sequence[str]
    ) -> Result | list[Result]:
        """The result of any model, such as in a training loop.

        Args:
            images: an image as `Segmenter.__call__` takes, or a batch of N: an array
                (N, H, W, C) or a tensor (N, C, H, W).
            output: class ids, integers (H, W) or (N, H, W), negative for none; or logits, floats
                (K, h, w) or (N, K, h, w) of any resolution.
            classes: names and colours of the K classes, or names.

        Returns:
            A Result, or a list of N for a batch.

        Raises:
            ValueError: shapes, types or numbers of classes do not fit.
        """
        table = classes if isinstance(classes, ClassTable) else ClassTable.of(classes)
        scored = torch.as_tensor(output).detach().cpu()
        if is_one(images):
            return cls._of(images, scored, table)
        stack = as_images(images) if isinstance(images, (np.ndarray, Tensor)) else list(images)
        if len(stack) != len(scored):
            raise ValueError(f"there are {len(stack)} images and {len(scored)} outputs")
        return [cls._of(one, of_one, table) for one, of_one in zip(stack, scored)]

    @classmethod
    def _of(cls, source: Any, output: Tensor, classes: ClassTable) -> Result:
        image = as_image(source)
        size = (image.shape[0], image.shape[1])
        logits: tuple[Tensor, ...] = ()
        if output.is_floating_point():
            if output.ndim != 3 or len(output) != len(classes):
                raise ValueError(
                    f"logits of shape {tuple(output.shape)}; give (K, h, w) of K = {len(classes)} "
                    "classes, or class ids as integers"
                )
            logits = (output[None],)
            output = scores.class_map(logits, size)[0]
        labels = output.numpy().astype(np.int64)
        if labels.shape != size:
            raise ValueError(f"class ids of shape {labels.shape} for an image of shape {size}")
        if labels.size and labels.max() >= len(classes):
            raise ValueError(f"class id {labels.max()}, but there are {len(classes)} classes")
        return cls(image, labels, classes, logits=logits)

    @property
    def names(self) -> tuple[str, ...]:
        """The class names, in class order."""
        return self.classes.names

    @cached_property
    def areas(self) -> dict[str, float]:
        """Class name -> share of the image in [0, 1], largest first, without absent classes."""
        return areas(self.labels, self.names)

    def mask(self, name: str | int) -> np.ndarray:
        """Where a class is.

        Args:
            name: of the class, or its id.

        Returns:
            (H, W) bool.

        Raises:
            ValueError: there is no such class.
        """
        if isinstance(name, str):
            ids = [k for k, own in enumerate(self.names) if own == name]
        else:
            ids = [int(name)] if 0 <= name < len(self.names) else []
        if not ids:
            near = difflib.get_close_matches(str(name), self.names, n=3, cutoff=0.4)
            advice = f"did you mean {' or '.join(near)}?" if near else "see Result.names"
            raise ValueError(f"there is no class {name!r}; {advice}")
        return np.isin(self.labels, ids)

    # -------------------------------------------------------------------------- probabilities
    def probabilities(self) -> np.ndarray:
        """Probability of each class at each pixel, (K, H, W) float32.

        The mean over scales and flips of the softmax; `labels` is its argmax.

        Raises:
            ValueError: the segmenter was not asked for them.
        """
        return scores.probabilities(self._scored(), self._size).numpy()[0]

    def uncertainty(self, kind: str = "entropy") -> np.ndarray:
        """How unsure the model is at each pixel, (H, W) float32 in [0, 1].

        Args:
            kind: "entropy" of the probabilities, divided by its maximum, the logarithm of the
                number of classes; or "confidence", 1 - the largest probability.

        Raises:
            ValueError: another kind, or the segmenter was not asked for probabilities.
        """
        if kind not in ("entropy", "confidence"):
            raise ValueError(f"kind is {kind!r}; give 'entropy' or 'confidence'")
        if kind == "confidence":
            found = 1 - scores.confidence_map(self._scored(), self._size)
        else:
            most = math.log(max(len(self.names), 2))
            found = scores.entropy_map(self._scored(), self._size) / most
        return found.numpy()[0]

    def _scored(self) -> Sequence[Tensor]:
        if not self.logits:
            raise ValueError(
                "this result has no probabilities: call the segmenter with probabilities=True"
            )
        return self.logits

    @property
    def _size(self) -> tuple[int, int]:
        return self.labels.shape[0], self.labels.shape[1]

    # -------------------------------------------------------------------------- data
    def coco(self, min_area: int = 1) -> dict[str, Any]:
        """The regions as COCO's JSON, with polygons (see `dataset.outlines.coco_annotations`).

        COCO's API rasterises them to the same pixels. A region with holes is cut into polygons
        without holes.

        Args:
            min_area: smaller regions, in pixels, are left out.

        Returns:
            `images` (one, with id 1), `annotations` and `categories` (class id + 1).
        """
        H, W = self._size
        name = "" if self.source is None else os.path.basename(self.source)
        return {
            "images": [{"id": 1, "file_name": name, "width": W, "height": H}],
            "annotations": coco_annotations(self.labels, min_area),
            "categories": [
                {"id": k + 1, "name": name, "supercategory": ""}
                for k, name in enumerate(self.names)
            ],
        }

    def geojson(self, min_area: int = 1) -> dict[str, Any]:
        """The regions as a GeoJSON feature collection (RFC 7946), with holes.

        Coordinates are longitude and latitude if the image is a file with a georeference, such as
        a GeoTIFF; otherwise pixels to the right and down from the upper left corner of the image.

        Args:
            min_area: smaller regions, in pixels, are left out.

        Returns:
            A feature for each region, with the properties `class`, `class_id`, `color` and
            `pixels`.

        Raises:
            FileNotFoundError: the file of the image is gone.
            ValueError: the image is a GeoTIFF, and rasterio is not installed.
        """
        file = self.source is not None and not is_url(self.source)
        place = to_lon_lat(self.source) if file and self.source is not None else None
        return {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "properties": {
                        "class": self.names[region.label],
                        "class_id": region.label,
                        "color": self._hex(region.label),
                        "pixels": region.area,
                    },
                    "geometry": {
                        "type": "Polygon",
                        "coordinates": [
                            _closed(ring if place is None else place(ring), hole=n > 0)
                            for n, ring in enumerate(region.rings())
                        ],
                    },
                }
                for region in regions(self.labels, min_area)
            ],
        }

    def to_dict(self, polygons: bool = False) -> dict[str, Any]:
        """The result without pixels, of types that JSON has.

        Args:
            polygons: also `annotations`, as of `coco`.

        Returns:
            `source` (path, url or None), `width`, `height`, and `classes`: `id`, `name`, `color`
            ("#rrggbb"), `pixels` and `area` (share of the image in [0, 1]) of those that occur,
            largest first.
        """
        counts = class_counts(self.labels, len(self.names))
        order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
        H, W = self._size
        found: dict[str, Any] = {
            "source": None if self.source is None else os.fspath(self.source),
            "width": W,
            "height": H,
            "classes": [
                {
                    "id": k,
                    "name": self.names[k],
                    "color": self._hex(k),
                    "pixels": int(counts[k]),
                    "area": float(counts[k] / self.labels.size),
                }
                for k in order
            ],
        }
        return found | ({"annotations": coco_annotations(self.labels)} if polygons else {})

    def to_json(self, polygons: bool = False, indent: int | None = None) -> str:
        """`to_dict` as JSON text; `indent` is that of `json.dumps`."""
        return json.dumps(self.to_dict(polygons), indent=indent)

    def _hex(self, label: int) -> str:
        return "#{:02x}{:02x}{:02x}".format(*self.classes.colors[label].tolist())

    # -------------------------------------------------------------------------- pictures
    def color(self) -> Image.Image:
        """The labels in the colours of the classes."""
        return Image.fromarray(color_encode(self.labels, self.classes.colors))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image blended with the class colours; `alpha` in [0, 1] is their weight."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; give the weight of the colours, in [0, 1]")
        return Image.fromarray(overlay(self.image, self.labels, self.classes.colors, alpha))

    def legend(self) -> Image.Image:
        """Colour, name and area of each class in the image."""
        return Image.fromarray(area_legend(self.labels, self.classes))

    def plot(self, path: str | os.PathLike[str] | None = None, truth: Any = None) -> Figure:
        """A matplotlib figure of image, prediction and overlay, with a legend.

        Args:
            path: file to save, .png, .svg or .pdf.
            truth: (H, W) class ids, -1 for ignored pixels, to show with the errors.

        Raises:
            ValueError: `truth` has another size, or the suffix is unknown.
        """
        truth = None if truth is None else np.asarray(truth)
        title = "" if self.source is None else os.path.basename(self.source)
        table = self.classes
        return prediction_sheet(
            self.image, self.labels, table.names, table.colors, truth, path=path, title=title
        )

    def _repr_png_(self) -> bytes:
        """The overlay beside its legend, for Jupyter."""
        shown = self.overlay()
        shown.thumbnail((_SHOWN, _SHOWN))
        buffer = io.BytesIO()
        Image.fromarray(framed(np.asarray(shown), np.asarray(self.legend()))).save(
            buffer, "PNG", compress_level=1
        )
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str], kind: str | None = None) -> Path:
        """Write the result to a file, and create its folder.

        Args:
            path: an image file in the format of its suffix; `.npy` for the array of class ids;
                `.json` for `coco`; `.geojson` for `geojson`.
            kind: of an image: overlay (the default), color, index (a palette image with the values
                class id + `label_offset`), side, legend or uncertainty (grey, white is unsure).

        Returns:
            The path.

        Raises:
            ValueError: the path is the source image, the kind or suffix is unknown, an index
                file has a lossy format, or there are no probabilities.
        """
        path = Path(path)
        if self._is_source(path):
            raise ValueError(f"{path} is the source image; choose another name")
        suffix = path.suffix.lower()
        if suffix in _DATA:
            if kind not in (None, _DATA[suffix]):
                what = "class ids" if suffix == ".npy" else f"the kind {_DATA[suffix]}"
                raise ValueError(f"{path}: {suffix} is for {what}; use an image suffix for {kind}")
        elif suffix not in Image.registered_extensions():
            raise ValueError(f"{path}: unknown image format {suffix!r}; use .png")
        if kind == "index" and suffix not in (*EXACT, ".npy"):
            raise ValueError(f"{path}: {suffix} files change label values; save an index as .png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npy":
            np.save(path, self.labels)
        elif suffix in _DATA:
            content = self.geojson() if suffix == ".geojson" else self.coco()
            path.write_text(json.dumps(content), encoding="utf-8")
        elif kind == "uncertainty":
            grey = np.rint(self.uncertainty() * 255).astype(np.uint8)
            Image.fromarray(grey).save(path)
        else:
            kind = kind or "overlay"
            render(kind, self.image, self.labels, self.classes, self.label_offset).save(path)
        return path

    def _is_source(self, path: Path) -> bool:
        if self.source is None or not path.exists() or not Path(self.source).exists():
            return False
        return path.samefile(self.source)


def _closed(ring: np.ndarray, hole: bool) -> list[list[float]]:
    """A ring of GeoJSON, (n, 2): counterclockwise, or clockwise for a hole, and closed."""
    x, y = ring.T
    doubled_area = float(x @ np.roll(y, -1) - y @ np.roll(x, -1))
    ordered = ring if (doubled_area < 0) == hole else ring[::-1]
    return [*ordered.tolist(), ordered[0].tolist()]
