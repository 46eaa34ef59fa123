"""Small generated images and masks, and where real data lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

Writer = Callable[..., dict[str, Any]]


@pytest.fixture
def write_pair(tmp_path: Path) -> Writer:
    """Writes `name.png` with a mask of classes 1..3 (0 = ignored) and returns its record."""

    def write(name: str, size: tuple[int, int] = (40, 30), **fields: Any) -> dict[str, Any]:
        width, height = size
        rng = np.random.default_rng(sum(map(ord, name)))
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = rng.integers(0, 4, (height, width), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
        return {
            "fpath_img": f"images/{name}.png",
            "fpath_segm": f"masks/{name}.png",
            "width": width,
            "height": height,
            **fields,
        }

    return write


@pytest.fixture
def mixed(write_pair: Writer) -> list[dict[str, Any]]:
    """Five wide, one square and three upright images."""
    sizes = [(40, 30)] * 5 + [(30, 30)] + [(30, 40)] * 3
    return [write_pair(f"s{k}", size) for k, size in enumerate(sizes)]


@pytest.fixture
def options() -> Callable[..., SimpleNamespace]:
    """`cfg.DATASET` for small images, with overrides."""

    def make(**changes: Any) -> SimpleNamespace:
        base: dict[str, Any] = {
            "num_class": 3,
            "imgSizes": [24, 32],
            "imgMaxSize": 64,
            "padding_constant": 8,
            "segm_downsampling_rate": 4,
            "random_flip": True,
        }
        return SimpleNamespace(**{**base, **changes})

    return make


@pytest.fixture
def real_data() -> Path:
    """The folder of real samples; tests that need it are skipped where it is absent."""
    beside = Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SEMSEG_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real samples at {folder}; set SEMSEG_DATA")
    return folder.resolve()
