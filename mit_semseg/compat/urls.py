"""Published `models.utils`: weights from a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from mit_semseg.download import fetch
from mit_semseg.weights import load_checked, load_encoder

M = TypeVar("M", bound=nn.Module)


def load_url(url: str, model_dir: str = "./pretrained", map_location: Any = None) -> Any:
    """Downloads a file of `torch.save` once, and loads it.

    `ModelBuilder` and `pretrained=True` use `weights.resolve` instead.

    Args:
        url: URL of the file.
        model_dir: folder for the file, whose name is the last part of the URL.
        map_location: as in `torch.load`; None: the CPU.

    Raises:
        DownloadError: the file could not be downloaded.
        ValueError: it is damaged, or contains more than tensors and plain values.
    """
    path = fetch(url, Path(model_dir) / url.rsplit("/", 1)[-1])
    return load_checked(path, "cpu" if map_location is None else map_location)


def initialized(model: M, name: str, pretrained: bool) -> M:
    """The model, with the published ImageNet weights of `name` if `pretrained`."""
    if pretrained:
        load_encoder(model, name, "")
    return model
