"""Path of `mit_semseg.lib` in a checkout: the folder `lib/` beside the package.

In an installed package, the content of `lib/` replaces this file (see pyproject.toml).
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "lib")]
