"""Packing: half the size, the same labels."""

import pytest
import torch

from mit_semseg import Segmenter
from mit_semseg.engine.checkpoint import CheckpointFolder, pack

NAMES = ("a", "b", "c")


def test_packed_checkpoint_predicts_the_same(tmp_path, make_model, make_images):
    make_model(tmp_path / "model", NAMES)
    make_images(tmp_path, [(48, 64)])
    out = pack(tmp_path / "model", tmp_path / "packed")
    sizes = [
        sum(p.stat().st_size for p in folder.glob("*.pth")) for folder in (tmp_path / "model", out)
    ]
    assert sizes[1] < 0.6 * sizes[0]
    photo = tmp_path / "img" / "part0" / "0.png"
    whole, packed = (
        Segmenter.from_checkpoint(d, device="cpu")(photo) for d in (tmp_path / "model", out)
    )
    # A random network decides by a hair everywhere; a trained one does not.
    assert (whole.labels == packed.labels).mean() > 0.97
    assert packed.names == NAMES
    weights = torch.load(CheckpointFolder(out).files("best.pth")[0], weights_only=True)
    kinds = {value.dtype for key, value in weights.items() if value.ndim > 1}
    assert kinds == {torch.float16}
    assert weights["features.0.1.running_var"].dtype == torch.float32


def test_packing_refuses_bad_sources_and_targets(tmp_path, make_model):
    make_model(tmp_path / "model", NAMES)
    with pytest.raises(ValueError, match="is the source folder"):
        pack(tmp_path / "model", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"has best\.pth"):
        pack(tmp_path / "model", tmp_path / "out", "epoch_9.pth")
    file = tmp_path / "model" / "decoder_best.pth"
    weights = torch.load(file, weights_only=True)
    weights["conv_last.weight"] *= 1e9
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"conv_last\.weight"):
        pack(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
