"""The recipes and the trained model that are installed with the package.

They are the folders `config` and `weights` of the repository. Their paths there, and their names
alone, are understood from any working folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from mit_semseg.arguments import CONFIG

# What `mit-semseg predict` uses unless told otherwise.
MODEL = "camvid-mobilenetv2dilated-c1_deepsup"
ABOUT = "street scenes in 11 classes, trained on CamVid"

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "assets"  # package-dir in pyproject.toml
HOME = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent


def recipe(path: str | os.PathLike[str]) -> Path:
    """The path of a configuration: as given if there is one, otherwise of a shipped recipe.

    Args:
        path: any path; `config/NAME.yaml`, `NAME.yaml` and `NAME` are those of recipes.
    """
    path = Path(path)
    here = path.exists() and (not path.is_dir() or (path / CONFIG).is_file())
    return path if here else _found(path, "config", ".yaml")


def model(path: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint folder or file: as given if it exists, otherwise the shipped one.

    Args:
        path: any path; `weights/NAME`, files in it, and `NAME` are those of the shipped model.
    """
    path = Path(path)
    return path if path.exists() else _found(path, "weights", "")


def _found(path: Path, folder: str, suffix: str) -> Path:
    inside = path if path.parts[:1] in (("config",), ("weights",)) else Path(folder, path)
    for name in (inside, inside.with_name(f"{inside.name}{suffix}")):
        if len(name.parts) > 1 and (HOME / name).exists() and not path.is_absolute():
            return HOME / name
    return path
