"""Outputs of PIDNet and DDRNet as their authors published them, filled as `fixtures/fill.py` does.

Stored are, of `image(128, 192, seed=7)` and 11 classes, the logits of the main head and of the
auxiliary ones, in evaluation, at every fifth row and seventh column of the 16 x 24.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fill import fill, image
from tolerances import rounding

from mit_semseg.models import ModelBuilder
from mit_semseg.weights import load_decoder, load_encoder

FILE = Path(__file__).resolve().parents[1] / "fixtures" / "reference_realtime.npz"


@torch.no_grad()
def check(arch: str, folder: Path) -> None:
    """One file with the layers of both parts, under the names that the authors' training gives
    them, initialises both; their outputs are the authors'."""
    encoder = ModelBuilder.build_encoder(arch, weights="none")
    channels = encoder.channels
    decoder = ModelBuilder.build_decoder(arch, num_class=11, channels=channels)
    whole = {**fill(encoder).state_dict(), **fill(decoder).state_dict()}
    state = {f"model.{key}": value for key, value in whole.items()}
    torch.save({**state, "loss.criterion.weight": torch.ones(11)}, folder / "whole.pth")
    encoder = ModelBuilder.build_encoder(arch, weights="none").eval()
    decoder = ModelBuilder.build_decoder(arch, num_class=11, channels=channels).eval()
    for report in (
        load_encoder(encoder, arch, folder / "whole.pth"),
        load_decoder(decoder, arch, folder / "whole.pth"),
    ):
        assert report is not None and report.ok
    decoder.training = True  # of this alone: the layers stay in evaluation
    heads = decoder.logits(encoder(image(128, 192, seed=7), return_feature_maps=True))
    with np.load(FILE) as stored:
        wanted = [torch.from_numpy(stored[key]) for key in sorted(stored) if f"{arch}/" in key]
    for given, expected in zip(heads, wanted):
        sampled = given[0, :, ::5, ::7]
        torch.testing.assert_close(sampled, expected, rtol=0, atol=rounding(expected, 50))
