"""HTML reports, from the jinja2 templates in `templates/`."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mit_semseg.files import PathLike
from mit_semseg.visualize.charts import class_bars, curves
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
    rows_title: str = "Held-out images",
    more: Sequence[tuple[str, Figure]] = (),
) -> Path:
    """Writes results as one self-contained HTML file.

    Args:
        path: file to write; its folder is created.
        samples: rows of image, truth, prediction and errors.
        names: K class names.
        colors: (K, 3) uint8 RGB.
        title: title of the page.
        lead: text below the title.
        figures: (name, value) pairs of the summary.
        ious: K per-class IoUs in [0, 1], None or NaN if a class is absent; (): no chart.
        history: records of `metrics.jsonl`, for the training curves.
        commands: (command line, seconds or None) of the commands that were run.
        rows_title: heading of the samples.
        more: (heading, chart) of further charts.

    Returns:
        `path`.

    Raises:
        ValueError: names, colours and IoUs differ in number.
    """
    if len(names) != len(colors) or (len(ious) and len(ious) != len(names)):
        raise ValueError(
            f"there are {len(names)} names, {len(colors)} colours and {len(ious)} IoUs; give one "
            "of each per class"
        )
    charts = []
    if len(ious):
        charts.append(("IoU per class", *_svg(class_bars(names, ious, colors, title=""))))
    if sum("loss" in record for record in history) > 1:
        charts.append(("Training", *_svg(curves(history, title=""))))
    charts += [(name, *_svg(figure)) for name, figure in more]
    rows = [
        (sample.name, sample.accuracy, [embedded(view) for view in sample.views(colors)])
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
        rows_title=rows_title,
        legend=[*classes, ("ignored", IGNORED), ("wrong", WRONG)],
        charts=charts,
        commands=commands,
    )


def render_page(path: PathLike, template: str, **values: Any) -> Path:
    """Writes a rendered template to a file, whose folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rendered(template, **values), encoding="utf-8")
    return path


def rendered(template: str, **values: Any) -> str:
    """A template of `templates/` with its values, which are escaped in HTML only."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(values) + "\n"


def embedded(image: RGB) -> str:
    """A data URI: a palette PNG for up to 256 colours, otherwise a JPEG."""
    found, index = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
    buffer = io.BytesIO()
    if len(found) <= 256:
        flat = Image.fromarray(index.reshape(image.shape[:2]).astype(np.uint8), "P")
        flat.putpalette(found.tobytes())
        flat.save(buffer, "PNG", optimize=True)
        return _data_uri("image/png", buffer)
    Image.fromarray(image).save(buffer, "JPEG", quality=88, optimize=True)
    return _data_uri("image/jpeg", buffer)


def embedded_labels(labels: np.ndarray, colors: np.ndarray, hidden: Sequence[int] = ()) -> str:
    """A data URI of a label map, transparent where it is ignored.

    Args:
        labels: (H, W) class ids, negative for ignored pixels.
        colors: (K, 3) uint8 RGB.
        hidden: classes that are transparent, too.
    """
    table, hide = np.asarray(colors, dtype=np.uint8), [*hidden]
    buffer = io.BytesIO()
    if len(table) < 256:
        image = Image.fromarray(np.where(labels < 0, len(table), labels).astype(np.uint8), "P")
        image.putpalette(np.concatenate([table, np.zeros((1, 3), np.uint8)]).tobytes())
        alpha = bytes(0 if k in hide or k == len(table) else 255 for k in range(len(table) + 1))
        image.save(buffer, "PNG", optimize=True, transparency=alpha)
    else:
        shown = (labels >= 0) & ~np.isin(labels, hide)
        pixels = np.dstack([table[np.maximum(labels, 0)], 255 * shown.astype(np.uint8)])
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return _data_uri("image/png", buffer)


def _svg(figure: Figure) -> tuple[str, int]:
    """A data URI, and the display width of the chart in pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return _data_uri("image/svg+xml", buffer), round(100 * figure.get_figwidth())


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
