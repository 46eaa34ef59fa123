"""Results as one HTML file, from the jinja2 templates in `templates/`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mit_semseg.visualize.charts import PathLike, class_bars, curves
from mit_semseg.visualize.palette import IGNORED, WRONG
from mit_semseg.visualize.sheets import COLUMNS, RGB, Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"


def write_page(
    path: PathLike,
    samples: Sequence[Sample],
    names: Sequence[str],
    colors: np.ndarray,
    *,
    title: str,
    lead: str = "",
    figures: Sequence[tuple[str, str]] = (),
    ious: Sequence[float | None] = (),
    history: Sequence[Mapping[str, Any]] = (),
    commands: Sequence[tuple[str, float | None]] = (),
) -> Path:
    """Write a result as one HTML file that needs nothing beside itself.

    Args:
        path: file to write; its folder is made.
        samples: rows of image, truth, prediction and errors.
        names: K class names.
        colors: (K, 3) uint8 RGB.
        title: heading of the page.
        lead: a sentence below it.
        figures: (name, value) of the summary.
        ious: K per-class IoUs in [0, 1], None or NaN where a class is absent; () leaves them out.
        history: records of a run as `metrics.jsonl` holds them, for the training curves.
        commands: (command line, seconds or None) of what was run.

    Returns:
        `path`.

    Raises:
        ValueError: names, colours and IoUs differ in number.
    """
    if len(names) != len(colors) or (len(ious) and len(ious) != len(names)):
        raise ValueError(f"{len(names)} names, {len(colors)} colours, {len(ious)} IoUs: must agree")
    charts = []
    if len(ious):
        charts.append(("IoU per class", *_svg(class_bars(names, ious, colors, title=""))))
    if sum("loss" in record for record in history) > 1:
        charts.append(("Training", *_svg(curves(history, title=""))))
    rows = [
        (sample.name, sample.accuracy, [_embedded(view) for view in sample.views(colors)])
        for sample in samples
    ]
    classes = zip(names, np.asarray(colors).tolist())
    return render_page(
        path,
        "report.html",
        title=title,
        lead=lead,
        figures=figures,
        columns=COLUMNS,
        rows=rows,
        legend=[*classes, ("ignored", IGNORED), ("wrong", WRONG)],
        charts=charts,
        commands=commands,
    )


def render_page(path: PathLike, template: str, **values: Any) -> Path:
    """Fill a template of `templates/` and write it; values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(templates.get_template(template).render(values) + "\n", encoding="utf-8")
    return path


def _embedded(image: RGB) -> str:
    """A data URI: few colours as a palette PNG, exact and small, else a JPEG."""
    found, index = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
    buffer = io.BytesIO()
    if len(found) <= 256:
        flat = Image.fromarray(index.reshape(image.shape[:2]).astype(np.uint8), "P")
        flat.putpalette(found.tobytes())
        flat.save(buffer, "PNG", optimize=True)
        return _data_uri("image/png", buffer)
    Image.fromarray(image).save(buffer, "JPEG", quality=88, optimize=True)
    return _data_uri("image/jpeg", buffer)


def _svg(figure: Figure) -> tuple[str, int]:
    """A data URI, and how wide the chart is to be shown, in pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return _data_uri("image/svg+xml", buffer), round(100 * figure.get_figwidth())


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
