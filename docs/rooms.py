"""Draw the rooms of the package, as the contract in pyproject.toml orders them: images/rooms.svg.

python docs/rooms.py
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"
WIDTH, ROW, GAP, MARGIN = 780, 60, 8, 12

CONTENT = {
    "cli": "arguments, configuration, one library call",
    "command_settings": "settings of a command line",
    "benchmarks": "mit-semseg bench",
    "tools": "profile, overfit, sweep, compare",
    "serving": "HTTP server, page",
    "compat": "published names",
    "segmenter": "Segmenter",
    "result": "Result: pictures, masks, polygons",
    "demo": "rendered scenes, result page",
    "engine": "train, evaluate, predict; Predictor; training/: trainer, step, state; devices",
    "export": "a network as a file of another library: ONNX, OpenVINO, ...; running such files",
    "models": "encoders/, decoders/, builder, module; inference",
    "utils": "published helpers",
    "scores": "logits to labels",
    "weights": "verified files",
    "losses": "all losses",
    "dataset": "files to batches",
    "visualize": "figures, pages",
    "metrics": "mIoU and others",
    "download": "URL to file",
    "config": "keys, files, checks",
    "precision": "fp32, tf32, bf16, fp16",
    "shipped": "installed recipes and weights",
    "registry": "names to classes",
    "lib": "SyncBN, replicas",
    "arguments": "command line",
    "errors": "one-line errors",
    "files": "atomic files",
    "fused_scores": "Triton kernels",
    "matrices": "cached matrices",
}


def layers() -> list[list[str]]:
    """Rooms in the order in which they may import each other, top first."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    found = re.search(r"^layers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert found, "pyproject.toml has no layers"
    rows = re.findall(r'"(.+)"', found[1])
    return [[name.removeprefix("mit_semseg.") for name in row.split(" | ")] for row in rows]


def box(name: str, x: float, y: float, width: float) -> str:
    content = escape(CONTENT.get(name, ""))
    middle = x + width / 2
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{ROW - GAP}" rx="5" '
        'fill="#eef2f7" stroke="#8fa1b5"/>'
        f'<text x="{middle:.0f}" y="{y + 21:.0f}" class="name">{name}</text>'
        f'<text x="{middle:.0f}" y="{y + 39:.0f}">{content}</text>'
    )


def picture() -> str:
    rows = layers()
    inner = WIDTH - 2 * MARGIN - 44
    boxes = []
    for i, names in enumerate(rows):
        width = (inner - GAP * (len(names) - 1)) / len(names)
        boxes += [
            box(name, MARGIN + k * (width + GAP), MARGIN + i * ROW, width)
            for k, name in enumerate(names)
        ]
    bottom = MARGIN + len(rows) * ROW
    x = WIDTH - 34
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + MARGIN}">',
            "<style>text{font:11px sans-serif;text-anchor:middle;fill:#37424f}"
            ".name{font:bold 14px sans-serif;fill:#101820}</style>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *boxes,
            f'<path d="M{x} {MARGIN}V{bottom - GAP}m-6 -9l6 9l6 -9" fill="none" stroke="#37424f"/>',
            f'<text transform="translate({x + 14} {bottom / 2:.0f}) rotate(90)">imports</text>',
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
