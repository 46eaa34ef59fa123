"""A page to try models in a browser: `mit-semseg app`."""

from __future__ import annotations

import io
import shutil
import signal
import tempfile
import threading
import time
import zipfile
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from mit_semseg.result import Result
from mit_semseg.segmenter import Segmenter
from mit_semseg.serving.answers import OUTPUTS
from mit_semseg.serving.limits import Limits, Refused, decode, open_upload
from mit_semseg.visualize.legend import percent

_HERE = Path(__file__).parent
_SIDE = 1600  # longest side of an image in the browser, in pixels
_KEPT = 3600  # seconds that files of results are kept
# File in the archive -> name in `OUTPUTS`.
_FILES = {
    "labels.png": "labels",
    "overlay.png": "overlay",
    "areas.json": "areas",
    "polygons.geojson": "polygons",
}


def build(models: Sequence[tuple[str, Segmenter]], limits: Limits, folder: Path) -> gr.Blocks:
    """The page.

    Args:
        models: one or two models of RGB images, with the names that are shown.
        limits: of the images.
        folder: for files of results, which are kept for an hour.
    """
    with gr.Blocks(
        title="mit-semseg",
        analytics_enabled=False,
        delete_cache=(_KEPT, _KEPT),
        fill_width=True,
    ) as blocks:
        gr.Markdown("## Segment an image")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                picture = gr.Image(
                    label="Image: upload, paste or photograph",
                    type="filepath",  # as it is, for its orientation and limits
                    image_mode=None,
                    sources=["upload", "clipboard", "webcam"],
                    elem_id="picture",
                )
                download = gr.DownloadButton("Download masks", visible=False, elem_id="download")
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    viewers = [_viewer(name, number) for number, (name, _) in enumerate(models)]
                slider = gr.ImageSlider(visible=False, elem_id="both")

        def run(path: str | None) -> list[Any]:
            if path is None:
                hidden = gr.update(value=None, visible=False)
                return [None] * len(models) + [hidden, hidden]
            results = [_segment(segmenter, path, limits) for _, segmenter in models]
            return [
                *map(shown, results),
                _saved(models, results, folder),
                _compared(models, results),
            ]

        picture.change(
            run,
            picture,
            [*viewers, download, slider],
            api_visibility="private",
            concurrency_limit=1,
        )
    return blocks


def _viewer(name: str, number: int) -> gr.HTML:
    read = {kind: (_HERE / f"viewer.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    return gr.HTML(
        None,
        label=name,
        show_label=True,
        container=True,
        padding=True,
        html_template=read["html"],
        css_template=read["css"],
        js_on_load=read["js"],
        elem_id=f"result{number}",
    )


def _segment(segmenter: Segmenter, path: str, limits: Limits) -> Result:
    try:
        image = decode(open_upload(Path(path).read_bytes(), limits))
    except Refused as error:
        raise gr.Error(str(error), print_exception=False) from error
    return segmenter(image)


def shown(result: Result) -> dict[str, Any]:
    """What the viewer takes: picture and labels as data urls, and the classes that occur.

    Images are reduced to at most 1600 pixels a side.
    """
    height, width = result.labels.shape
    share = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(share * width)), max(1, round(share * height)))
    picture = io.BytesIO()
    Image.fromarray(result.image).resize(size, Image.Resampling.BILINEAR).save(
        picture, "JPEG", quality=90
    )
    ids = (result.labels + 1).astype(np.uint16)
    bytes_of = np.stack([ids & 255, ids >> 8, np.zeros_like(ids)], axis=2).astype(np.uint8)
    labels = io.BytesIO()
    Image.fromarray(bytes_of).resize(size, Image.Resampling.NEAREST).save(labels, "PNG")
    counts = np.bincount(ids.ravel(), minlength=len(result.names) + 1)[1:]
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return {
        "image": _url(picture, "jpeg"),
        "labels": _url(labels, "png"),
        "classes": [
            {
                "id": k,
                "name": result.names[k],
                "color": result.classes.colors[k].tolist(),
                "area": percent(counts[k] / result.labels.size),
            }
            for k in order
        ],
    }


def _url(data: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(data.getvalue()).decode()}"


def _saved(models: Sequence[tuple[str, Segmenter]], results: Sequence[Result], root: Path) -> Any:
    """An archive to download, in a new folder; old ones are removed."""
    for old in root.iterdir():
        if time.time() - old.stat().st_mtime > _KEPT:
            shutil.rmtree(old, ignore_errors=True)
    path = Path(tempfile.mkdtemp(dir=root), "masks.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for number, ((name, _), result) in enumerate(zip(models, results), 1):
            prefix = "" if len(models) == 1 else f"{number}_{name}/"
            for file, output in _FILES.items():
                archive.writestr(prefix + file, OUTPUTS[output][1](result))
    return gr.update(value=str(path), visible=True)


def _compared(models: Sequence[tuple[str, Segmenter]], results: Sequence[Result]) -> Any:
    """The slider of two overlays, with the share of pixels with the same class name."""
    if len(results) < 2:
        return gr.update()
    first, second = results
    names = {name: k for k, name in enumerate(dict.fromkeys([*first.names, *second.names]))}
    same = np.array([names[name] for name in first.names])[first.labels]
    same = same == np.array([names[name] for name in second.names])[second.labels]
    left, right = (name for name, _ in models)
    label = f"{left} and {right}: equal in {percent(float(same.mean()))} of the pixels"
    return gr.update(value=(first.overlay(), second.overlay()), label=label, visible=True)


@contextmanager
def open_page(
    models: Sequence[tuple[str, Segmenter]], host: str, port: int, limits: Limits
) -> Iterator[str]:
    """The address of the page, while it is open; arguments and errors as for `show`."""
    with tempfile.TemporaryDirectory(prefix="mit_semseg_") as folder:
        blocks = build(models, limits, Path(folder))
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=limits.bytes,
                ssr_mode=False,
                enable_monitoring=False,
                footer_links=[],
            )
            yield address
        finally:
            blocks.close(verbose=False)


def show(models: Sequence[tuple[str, Segmenter]], host: str, port: int, limits: Limits) -> None:
    """Show the page until SIGTERM or SIGINT.

    Raises:
        OSError: the address cannot be used.
    """
    stop = threading.Event()
    with open_page(models, host, port, limits) as address:
        names = " and ".join(name for name, _ in models)
        print(f"{names} on {address} (Control-C stops)", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
