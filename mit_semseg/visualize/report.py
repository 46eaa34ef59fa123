"""What a run achieved, to the eye: one self-contained HTML page, and a contact sheet as PNG."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mit_semseg.visualize.palette import color_encode

Picture = NDArray[np.uint8]  # (H, W, 3) RGB
Labels = NDArray[Any]  # (H, W) integer class ids, -1 ignored

_GREY = (196, 199, 206)  # ignored pixels, in truth and errors alike
_WRONG = (226, 45, 72)
_COLUMNS = ("image", "truth", "prediction", "errors")


@dataclass(frozen=True)
class Sample:
    """One held-out image: the picture, what is there, and what the model sees."""

    name: str
    image: Picture
    truth: Labels
    prediction: Labels

    def __post_init__(self) -> None:
        size = self.image.shape[:2]
        for what, labels in (("truth", self.truth), ("prediction", self.prediction)):
            if labels.shape != size:
                raise ValueError(f"{self.name}: {what} is {labels.shape}, the image {size}")

    @property
    def accuracy(self) -> float:
        """Share of labelled pixels that are right, NaN when none is labelled."""
        known = self.truth >= 0
        return float(np.mean((self.truth == self.prediction)[known])) if known.any() else np.nan


def paint(labels: Labels, colors: NDArray[Any]) -> Picture:
    """`color_encode`, with ignored pixels in the grey of the legend.

    Args:
        labels: (H, W) integers, -1 ignored, below K.
        colors: (K, 3) uint8.
    """
    painted: Picture = color_encode(labels, colors)
    painted[labels < 0] = _GREY
    return painted


def error_map(image: Picture, truth: Labels, prediction: Labels) -> Picture:
    """The picture faded to grey, wrong pixels red; where the truth is ignored nothing is wrong."""
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    out = np.repeat(165 + 0.35 * grey, 3, axis=2)
    out[truth < 0] = _GREY
    out[(truth >= 0) & (truth != prediction)] = _WRONG
    return np.rint(out).clip(0, 255).astype(np.uint8)


def contact_sheet(
    samples: Sequence[Sample],
    names: Sequence[str],
    colors: NDArray[Any],
    path: str | Path,
    *,
    title: str = "",
    width: int = 280,
) -> Path:
    """Write rows of image | truth | prediction | errors with a legend, as one PNG.

    Args:
        samples: the rows.
        names: K class names.
        colors: (K, 3) their colours.
        path: file to write.
        title: a line at the top.
        width: pixels of one column; pictures keep their aspect.

    Returns:
        `path`.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample")
    gap, margin = 8, 24
    font, small = ImageFont.load_default(21), ImageFont.load_default(14)
    inner = len(_COLUMNS) * (width + gap) - gap
    heights = [round(s.image.shape[0] * width / s.image.shape[1]) for s in samples]
    # Upright pictures would dominate the sheet: they get the height of a square.
    heights = [min(h, width) for h in heights]
    legend, line = _legend_places(names, small, inner)
    top = margin + (36 if title else 0) + line + 14
    sheet = Image.new(
        "RGB", (inner + 2 * margin, top + 24 + sum(heights) + gap * len(heights) + margin), "white"
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, fill=(28, 32, 44), font=font)
    _draw_legend(draw, (margin, margin + (36 if title else 0)), legend, names, colors, small)
    for column, name in enumerate(_COLUMNS):
        x = margin + column * (width + gap)
        draw.text((x, top), name, fill=(110, 116, 130), font=small)
    y = top + 24
    for sample, height in zip(samples, heights, strict=True):
        for column, picture in enumerate(_views(sample, colors)):
            tile = Image.fromarray(picture)
            scale = min(width / tile.width, height / tile.height)
            size = (round(tile.width * scale), round(tile.height * scale))
            # Labels are never blended: a mixed colour would be no class at all.
            how = Image.Resampling.NEAREST if column in (1, 2) else Image.Resampling.LANCZOS
            x = margin + column * (width + gap) + (width - size[0]) // 2
            sheet.paste(tile.resize(size, how), (x, y))
        y += height + gap
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path


def picture_grid(
    pictures: Sequence[tuple[str, Picture]],
    path: str | Path,
    *,
    title: str = "",
    columns: int = 6,
    width: int = 200,
    names: Sequence[str] = (),
    colors: NDArray[Any] | None = None,
) -> Path:
    """Write pictures side by side, each under its name, as one PNG.

    Args:
        pictures: (name, (H, W, 3) uint8 RGB); a name may have two lines.
        path: file to write.
        title: a line at the top.
        columns: pictures in a row, at most.
        width: pixels of a column; pictures keep their aspect.
        names, colors: K class names and their colours, (K, 3), for a legend above the pictures;
            without colours there is none.

    Returns:
        `path`.

    Raises:
        ValueError: there are no pictures.
    """
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    gap, margin = 12, 24
    head = 36 if title else 0
    columns = min(columns, len(pictures))
    font, small = ImageFont.load_default(21), ImageFont.load_default(13)
    places, lines = _legend_places(names, small, columns * (width + gap) - gap)
    legend = margin, margin + head
    head += lines + gap if colors is not None else 0
    text = 18 * max(name.count("\n") + 1 for name, _ in pictures)
    tall = max(round(p.shape[0] * width / p.shape[1]) for _, p in pictures)
    pitch = text + tall + gap
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB",
        (2 * margin + columns * (width + gap) - gap, 2 * margin + head + rows * pitch - gap),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((margin, margin), title, fill=(28, 32, 44), font=font)
    if colors is not None:
        _draw_legend(draw, legend, places, names, colors, small)
    for n, (name, picture) in enumerate(pictures):
        x = margin + n % columns * (width + gap)
        y = margin + head + n // columns * pitch
        draw.multiline_text((x, y), name, fill=(60, 66, 80), font=small, spacing=3)
        size = (width, round(picture.shape[0] * width / picture.shape[1]))
        # Colours of classes must not be mixed, and photographs are rarely enlarged.
        sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (x, y + text))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path


def write_page(
    path: str | Path,
    samples: Sequence[Sample],
    names: Sequence[str],
    colors: NDArray[Any],
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
        path: file to write.
        samples: rows of image, truth, prediction and errors.
        names: K class names.
        colors: (K, 3) their colours.
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
    swatches = [_css(color) for color in np.asarray(colors).tolist()]
    parts = [
        f"<header><h1>{html.escape(title)}</h1>",
        f"<p class=lead>{html.escape(lead)}</p></header>" if lead else "</header>",
        _figures(figures),
        _gallery(samples, names, colors, swatches),
        '<div class="pair">' if len(ious) and history else "",
        _bars(names, swatches, ious),
        _curves(history),
        "</div>" if len(ious) and history else "",
        _commands(commands),
    ]
    page = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------ pictures


def _views(sample: Sample, colors: NDArray[Any]) -> tuple[Picture, Picture, Picture, Picture]:
    return (
        sample.image,
        paint(sample.truth, colors),
        paint(sample.prediction, colors),
        error_map(sample.image, sample.truth, sample.prediction),
    )


def _legend_places(
    names: Sequence[str], font: Any, width: int
) -> tuple[list[tuple[int, int]], int]:
    """Where legend entries go when they wrap at `width`, and the height of them all."""
    x, y, places = 0, 0, []
    for name in names:
        step = 20 + int(font.getlength(name)) + 22
        if x and x + step > width:
            x, y = 0, y + 22
        places.append((x, y))
        x += step
    return places, y + 22


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    places: Sequence[tuple[int, int]],
    names: Sequence[str],
    colors: NDArray[Any],
    font: Any,
) -> None:
    """A square and a name for each class, at its place below and right of a corner."""
    for (x, y), name, color in zip(places, names, np.asarray(colors).tolist(), strict=True):
        x, y = x + corner[0], y + corner[1]
        draw.rounded_rectangle((x, y + 1, x + 14, y + 15), 3, fill=tuple(map(int, color)))
        draw.text((x + 20, y), name, fill=(60, 66, 80), font=font)


def _embedded(picture: Picture, *, flat: bool) -> str:
    """A data URI: few flat colours as a palette PNG, exact and small, else JPEG."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if flat:
        found, index = np.unique(picture.reshape(-1, 3), axis=0, return_inverse=True)
        if len(found) <= 256:
            image = Image.fromarray(index.reshape(picture.shape[:2]).astype(np.uint8), "P")
            image.putpalette(found.tobytes())
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=88, optimize=True)
    kind = "png" if flat else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------ sections


def _figures(figures: Sequence[tuple[str, str]]) -> str:
    if not figures:
        return ""
    tiles = "".join(
        f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in figures
    )
    return f'<section class="tiles">{tiles}</section>'


def _gallery(
    samples: Sequence[Sample], names: Sequence[str], colors: NDArray[Any], swatches: Sequence[str]
) -> str:
    if not samples:
        return ""
    chips = "".join(
        f'<span class=chip><i style="background:{swatch}"></i>{html.escape(name)}</span>'
        for name, swatch in zip(names, swatches, strict=True)
    )
    grey, red = _css(_GREY), _css(_WRONG)
    chips += f'<span class=chip><i style="background:{grey}"></i>ignored</span>'
    chips += f'<span class=chip><i style="background:{red}"></i>wrong</span>'
    heads = "".join(f"<span>{name}</span>" for name in _COLUMNS)
    rows = []
    for sample in samples:
        cells = "".join(
            f'<img alt="{html.escape(sample.name)}: {what}" '
            f'src="{_embedded(picture, flat=what in ("truth", "prediction"))}">'
            for what, picture in zip(_COLUMNS, _views(sample, colors), strict=True)
        )
        right = "" if np.isnan(sample.accuracy) else f"{100 * sample.accuracy:.1f}% of pixels right"
        rows.append(
            f"<figure><div class=row>{cells}</div><figcaption>{html.escape(sample.name)}"
            f"<span>{right}</span></figcaption></figure>"
        )
    return (
        f"<section><h2>Held-out images</h2><div class=legend>{chips}</div>"
        f'<div class="row heads">{heads}</div>{"".join(rows)}</section>'
    )


def _bars(names: Sequence[str], swatches: Sequence[str], ious: Sequence[float | None]) -> str:
    if not len(ious):
        return ""
    rows = []
    known = [(k, v) for k, v in enumerate(ious) if v is not None and not np.isnan(v)]
    absent = [k for k in range(len(names)) if k not in dict(known)]
    for k, value in sorted(known, key=lambda item: -item[1]):
        rows.append(
            f"<tr><th>{html.escape(names[k])}<td><div class=track><div class=bar "
            f'style="width:{100 * value:.1f}%;background:{swatches[k]}"></div></div>'
            f"<td class=number>{100 * value:.1f}"
        )
    rows += [f"<tr><th>{html.escape(names[k])}<td>absent<td class=number>n/a" for k in absent]
    mean = f" (mean {100 * float(np.mean([v for _, v in known])):.1f})" if known else ""
    return (
        f"<section class=card><h2>IoU per class, %{mean}</h2>"
        f"<table class=bars>{''.join(rows)}</table></section>"
    )


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Loss over steps, validated mean IoU and pixel accuracy over epochs, as inline SVG."""
    loss = [(float(r["step"]), float(r["loss"])) for r in history if r.get("kind") == "train"]
    val = [r for r in history if r.get("kind") == "val"]
    charts = []
    if len(loss) > 1:
        charts.append(_chart("Training loss", "step", [("loss", "#3b6fd4", loss)], None))
    if len(val) > 1:
        lines = [
            (name, color, [(float(r["epoch"]), 100 * float(r[key])) for r in val])
            for name, color, key in (
                ("mean IoU", "#c2410c", "mean_iou"),
                ("pixel accuracy", "#0f766e", "pixel_accuracy"),
            )
        ]
        charts.append(_chart("Validation, %", "epoch", lines, 100.0))
    if not charts:
        return ""
    return f"<section class=card><h2>Training</h2>{''.join(charts)}</section>"


def _chart(
    title: str,
    unit: str,
    lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    top: float | None,
) -> str:
    """A line chart with a zero baseline; `top` fixes the upper end of its axis."""
    width, height, left, right, over, under = 460, 190, 40, 138, 12, 34
    values = np.array([y for _, _, points in lines for _, y in points], np.float64)
    steps = np.array([x for _, _, points in lines for x, _ in points], np.float64)
    high = top if top is not None else _round_up(float(values.max()))
    low_x, high_x = float(steps.min()), max(float(steps.max()), float(steps.min()) + 1)

    def x_of(x: float) -> float:
        return left + (x - low_x) / (high_x - low_x) * (width - left - right)

    def y_of(y: float) -> float:
        return height - under - min(y, high) / high * (height - over - under)

    out = [f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{html.escape(title)}">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = y_of(share * high)
        out.append(f'<line class=grid x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{left - 7}" y="{y + 4:.1f}" class=end>{share * high:g}</text>')
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        out.append(
            f'<text x="{x_of(x):.1f}" y="{height - under + 17}" class={anchor}>{unit} {x:g}</text>'
        )
    taken: list[float] = []
    for name, color, points in sorted(lines, key=lambda line: -line[2][-1][1]):
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        x, y = x_of(points[-1][0]), y_of(points[-1][1])
        out.append(f'<polyline points="{path}" stroke="{color}"/>')
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{color}"/>')
        y = max([y, *(other + 15 for other in taken)])  # labels do not sit on each other
        taken.append(y)
        out.append(
            f'<text x="{x + 8:.1f}" y="{y + 4:.1f}" fill="{color}" class=tag>'
            f"{html.escape(name)} {points[-1][1]:.3g}</text>"
        )
    return f"<h3>{html.escape(title)}</h3>{''.join(out)}</svg>"


def _round_up(value: float) -> float:
    """The next of 1, 2, 3, 4, 6, 8 times a power of ten: quarters of it read well."""
    if value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(k * power for k in (1, 2, 3, 4, 6, 8, 10) if k * power >= value * 0.999))


def _commands(commands: Sequence[tuple[str, float | None]]) -> str:
    if not commands:
        return ""
    rows = "".join(
        f"<tr><td><code>{html.escape(command)}</code><td class=number>"
        f"{'' if seconds is None else f'{seconds:.0f} s'}"
        for command, seconds in commands
    )
    return f"<section class=card><h2>What was run</h2><table class=runs>{rows}</table></section>"


def _css(color: Sequence[float]) -> str:
    return "#" + "".join(f"{int(c):02x}" for c in color)


_STYLE = """
:root{--ink:#1c2030;--soft:#667085;--line:#e4e7ee;--card:#fff;--back:#f6f7fa}
@media(prefers-color-scheme:dark){:root{--ink:#eceef4;--soft:#9aa3b5;--line:#2c3242;--card:#1a1f2c;
--back:#12151e}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:44px 24px 64px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0}
h2{font-size:17px;margin:0 0 12px}
h3{font-size:13px;font-weight:600;color:var(--soft);margin:14px 0 4px}
.lead{color:var(--soft);margin:8px 0 0;max-width:80ch}
section{margin-top:30px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:14px 18px}
.tile b{display:block;font-size:25px;letter-spacing:-.01em;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.card{padding:20px 22px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));gap:20px}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin-bottom:14px}
.chip{display:inline-flex;align-items:center;gap:7px;color:var(--soft);font-size:13px}
.chip i{width:14px;height:14px;border-radius:4px}
.row{display:grid;grid-template-columns:repeat(4,1fr);gap:6px;align-items:center}
.heads{color:var(--soft);font-size:13px;margin-bottom:6px}
figure{margin:0 0 16px}
.row img{display:block;width:100%;height:auto;max-height:340px;object-fit:contain;border-radius:6px;
image-rendering:auto}
figcaption{display:flex;justify-content:space-between;color:var(--soft);font-size:12px;
margin-top:4px}
table{border-collapse:collapse;width:100%}
.bars th{text-align:left;font-weight:500;padding:5px 14px 5px 0;white-space:nowrap;width:1%}
.track{background:var(--back);border-radius:5px;overflow:hidden}
.bar{height:16px;border-radius:5px;min-width:2px}
.number{text-align:right;font-variant-numeric:tabular-nums;padding-left:12px;white-space:nowrap;
width:1%}
svg{display:block;width:100%;height:auto;max-width:560px}
svg text{font-size:11.5px;fill:var(--soft)}
svg .tag{font-weight:600}
svg .end{text-anchor:end}
.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.runs td{padding:6px 0;border-top:1px solid var(--line);vertical-align:top}
.runs tr:first-child td{border-top:0}
code{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
""".replace("\n", "")
