"""The commands `serve` and `app`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import PurePath

import torch

from mit_semseg import shipped
from mit_semseg.engine.devices import resolve_devices, use_device
from mit_semseg.segmenter import Segmenter
from mit_semseg.serving.limits import Limits
from mit_semseg.utils import setup_logger

_SERVER = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")


def run(args: argparse.Namespace) -> int:
    """Answer HTTP requests, or show a page, until a signal; returns 0."""
    (_serve if args.command == "serve" else _app)(args)
    return 0


def _serve(args: argparse.Namespace) -> None:
    _need(_SERVER, "serve")
    from mit_semseg.serving.server import serve

    # On a CPU a pass of several images takes longer than the images one by one: 1.2 times, with
    # dilated MobileNetV2 at 360 x 480.
    batch = args.batch if args.batch is not None else 8 if _device(args).type == "cuda" else 1
    limits = Limits(args.megabytes, args.megapixels, args.queue, batch, args.window, args.timeout)
    source = args.model or shipped.MODEL
    serve(_segmenter(source, args), source, args.host, args.port, limits)


def _app(args: argparse.Namespace) -> None:
    if len(args.model) > 2:
        raise ValueError(f"app shows one model, or compares two; {len(args.model)} are given")
    _need(("gradio",), "app")
    # Read when it is imported: nothing is sent, and browsers keep no history of the images.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    from mit_semseg.serving.page import show

    limits = Limits(args.megabytes, args.megapixels)
    sources = args.model or [shipped.MODEL]
    models = [(PurePath(source).name, _segmenter(source, args)) for source in sources]
    show(models, args.host, args.port, limits)


def _device(args: argparse.Namespace) -> torch.device:
    return resolve_devices(args.devices, "--gpu")[0]


def _segmenter(source: str, args: argparse.Namespace) -> Segmenter:
    """A model on the device of the arguments."""
    setup_logger()
    device = _device(args)
    use_device(device)
    segmenter = Segmenter.from_pretrained(source, device=device, precision=args.precision)
    options = segmenter.predictor.options
    if options.bands or options.depth:
        raise ValueError(f"{source} takes bands or depth; {args.command} is for RGB images only")
    return segmenter


def _need(modules: Sequence[str], command: str) -> None:
    """ValueError if a library is missing of the extra with the name of the command."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"{command} needs {module.replace('_', '-')}: pip install 'mit_semseg[{command}]'"
            )
