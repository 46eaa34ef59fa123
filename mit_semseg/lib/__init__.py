"""Where a checkout finds `mit_semseg.lib`: in the folder `lib/` beside the package.

An installed package has the modules of that folder in this place (see pyproject.toml).
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "lib")]
