"""Losses on log-probabilities: functions in `functional`, modules by name from `build_loss`."""

from mit_semseg.losses import boundary, functional
from mit_semseg.losses.modules import LOSSES, Loss, build_loss

__all__ = ["LOSSES", "Loss", "boundary", "build_loss", "functional"]
