"""The forms in which a server answers with a result."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

from PIL import Image

from mit_semseg.result import Result
from mit_semseg.visualize.results import index_image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)  # half the time of 6, for files a tenth larger
    return buffer.getvalue()


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


def labels_png(result: Result) -> bytes:
    """A palette PNG of class ids, 16-bit grey for more than 256 classes."""
    return _png(index_image(result.labels, result.classes.colors))


def overlay_png(result: Result) -> bytes:
    """A PNG of the image blended with the class colours."""
    return _png(result.overlay())


def areas_json(result: Result) -> bytes:
    """Size and classes, as JSON (`Result.to_dict`)."""
    return _json(result.to_dict())


def polygons_json(result: Result) -> bytes:
    """Regions in pixels, as GeoJSON (`Result.geojson`)."""
    return _json(result.geojson())


PNG, JSON, GEOJSON = "image/png", "application/json", "application/geo+json"
# Name -> media type and function, in the order of preference.
OUTPUTS: dict[str, tuple[str, Callable[[Result], bytes]]] = {
    "labels": (PNG, labels_png),
    "overlay": (PNG, overlay_png),
    "areas": (JSON, areas_json),
    "polygons": (GEOJSON, polygons_json),
}


def wanted(accept: str) -> str:
    """The first output of a media type in an `Accept` header; its weights are not read.

    Example:
        >>> wanted("text/html, application/json;q=0.9"), wanted("*/*")
        ('areas', 'labels')
    """
    for part in accept.split(","):
        kind = part.partition(";")[0].strip().lower()
        for name, (media_type, _) in OUTPUTS.items():
            if kind == media_type:
                return name
    return "labels"
