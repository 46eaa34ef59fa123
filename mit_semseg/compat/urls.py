"""`models.utils` as published: weights from a url."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from mit_semseg.download import fetch
from mit_semseg.weights import load_checked, load_encoder

M = TypeVar("M", bound=nn.Module)


def load_url(url: str, model_dir: str = "./pretrained", map_location: Any = None) -> Any:
    """What a file of `torch.save` at a url holds; it is downloaded once.

    `ModelBuilder` and `pretrained=True` do not use this: see `weights.resolve`.

    Args:
        url: of the file.
        model_dir: folder that it is kept in, under the last part of the url.
        map_location: as of `torch.load`; None: the CPU.

    Raises:
        DownloadError: the file could not be downloaded.
        ValueError: it is damaged, or holds more than tensors and plain values.
    """
    path = fetch(url, Path(model_dir) / url.rsplit("/", 1)[-1])
    return load_checked(path, "cpu" if map_location is None else map_location)


def started(model: M, name: str, pretrained: bool) -> M:
    """A model, with the published ImageNet weights of a name if they are asked for."""
    if pretrained:
        load_encoder(model, name, "")
    return model
