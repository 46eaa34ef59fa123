"""The command `serve`."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence

from mit_semseg import shipped
from mit_semseg.engine.devices import resolve_devices, use_device
from mit_semseg.segmenter import Segmenter
from mit_semseg.serving.limits import Limits
from mit_semseg.utils import setup_logger

_SERVER = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")


def run(args: argparse.Namespace) -> int:
    """Answer HTTP requests until a signal; returns 0."""
    _need(_SERVER, "serve")
    from mit_semseg.serving.server import serve

    limits = Limits(
        args.megabytes, args.megapixels, args.queue, args.batch, args.window, args.timeout
    )
    source = args.model or shipped.MODEL
    serve(_segmenter(source, args), source, args.host, args.port, limits)
    return 0


def _segmenter(source: str, args: argparse.Namespace) -> Segmenter:
    """A model on the device of the arguments."""
    setup_logger()
    device = resolve_devices(args.devices, "--gpu")[0]
    use_device(device)
    return Segmenter.from_pretrained(source, device=device, precision=args.precision)


def _need(modules: Sequence[str], command: str) -> None:
    """ValueError if a library is missing of the extra with the name of the command."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"{command} needs {module.replace('_', '-')}: pip install 'mit_semseg[{command}]'"
            )
