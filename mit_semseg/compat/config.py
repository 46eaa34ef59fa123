"""The published module `mit_semseg.config.defaults`."""

from mit_semseg.config import cfg as _C

__all__ = ["_C"]
