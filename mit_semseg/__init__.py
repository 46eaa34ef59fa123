"""Semantic segmentation in PyTorch: any encoder with any decoder; train, evaluate, predict.

Example:
    >>> from mit_semseg import Segmenter  # doctest: +SKIP
    >>> Segmenter.from_checkpoint("ckpt/mine")("photo.jpg").save("overlay.png")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mit_semseg.compat import install as _install

if TYPE_CHECKING:
    from mit_semseg.segmenter import Result as Result
    from mit_semseg.segmenter import Segmenter as Segmenter

__version__ = "2.1.0"
__all__ = ["Result", "Segmenter", "__version__"]

_install()


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import mit_semseg` and `mit-semseg --help` are fast.
    if name in ("Result", "Segmenter"):
        from mit_semseg import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module 'mit_semseg' has no attribute {name!r}")
