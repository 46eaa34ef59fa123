"""Names, signatures and flags of the published toolkit (mit-semseg 1.0.0) without another place.

`PUBLISHED` maps each published module to its replacement; `import mit_semseg` installs an import
hook for them. Names that this package has elsewhere are re-exported, those that torch provides
today are torch's, and the rest is implemented here.

This module imports the standard library only, because it is imported with the package.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PARALLEL, _DATA = "mit_semseg.compat.parallel", "mit_semseg.compat.data"
PUBLISHED = {
    "mit_semseg.config.defaults": "mit_semseg.compat.config",
    "mit_semseg.models.models": "mit_semseg.compat.models",
    "mit_semseg.models.resnet": "mit_semseg.compat.resnet",
    "mit_semseg.models.resnext": "mit_semseg.compat.resnext",
    "mit_semseg.models.mobilenet": "mit_semseg.compat.mobilenet",
    "mit_semseg.models.hrnet": "mit_semseg.compat.hrnet",
    "mit_semseg.models.utils": "mit_semseg.compat.urls",
    "mit_semseg.lib.nn.comm": _PARALLEL,
    "mit_semseg.lib.nn.modules": _PARALLEL,
    "mit_semseg.lib.nn.modules.batchnorm": _PARALLEL,
    "mit_semseg.lib.nn.modules.comm": _PARALLEL,
    "mit_semseg.lib.nn.modules.replicate": _PARALLEL,
    "mit_semseg.lib.nn.modules.unittest": _PARALLEL,
    "mit_semseg.lib.nn.parallel": _PARALLEL,
    "mit_semseg.lib.nn.parallel.data_parallel": _PARALLEL,
    "mit_semseg.lib.utils.th": "mit_semseg.lib.utils.convert",
    "mit_semseg.lib.utils.data": _DATA,
    "mit_semseg.lib.utils.data.dataloader": _DATA,
    "mit_semseg.lib.utils.data.dataset": _DATA,
    "mit_semseg.lib.utils.data.distributed": _DATA,
    "mit_semseg.lib.utils.data.sampler": _DATA,
}


class PublishedModules(MetaPathFinder, Loader):
    """Imports the modules of `PUBLISHED` under their published names, as the same module object."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PUBLISHED:
            return None
        return ModuleSpec(fullname, self, is_package=bool(_inside(fullname)))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(PUBLISHED[spec.name])
        self._specs.setdefault(module.__name__, module.__spec__)
        return module

    def exec_module(self, module: ModuleType) -> None:
        name = module.__spec__.name if module.__spec__ else ""
        module.__spec__ = self._specs[module.__name__]  # importlib has set that of `name`
        for inner in _inside(name):
            importlib.import_module(inner)  # as the published packages do


def _inside(package: str) -> list[str]:
    """The published modules inside a published package."""
    return [name for name in PUBLISHED if name.startswith(f"{package}.")]


def install() -> None:
    """Add the import hook of the published modules, after all others."""
    if not any(isinstance(finder, PublishedModules) for finder in sys.meta_path):
        sys.meta_path.append(PublishedModules())
