"""Weights in safetensors files: the same tensors, wherever weights are read."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mit_semseg import Segmenter
from mit_semseg.cli import main
from mit_semseg.config import load_options
from mit_semseg.engine.checkpoint import CheckpointFolder, atomic_save, pack
from mit_semseg.engine.from_model import model_options
from mit_semseg.models import ModelBuilder
from mit_semseg.weights import load_checked

pytest.importorskip("safetensors")
NAMES = ("a", "b", "c")


def tensors():
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    found = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    shared = torch.randn(4, 4)
    return {
        **found,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "shared": shared,
        "view": shared[1:],
        "transposed": shared.t(),
    }


def test_the_library_reads_what_is_written(tmp_path):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "a.safetensors"
    atomic_save({file: tensors()})
    # Read by the library, and what the library has written, without our checksum.
    save_file({k: v.clone().contiguous() for k, v in tensors().items()}, tmp_path / "b.safetensors")
    for found in (load_file(file), load_checked(file), load_checked(tmp_path / "b.safetensors")):
        for key, expected in tensors().items():
            if key not in ("shared", "view", "transposed"):  # random
                assert found[key].dtype == expected.dtype and torch.equal(found[key], expected)
        assert torch.equal(found["view"], found["shared"][1:])
        assert torch.equal(found["transposed"], found["shared"].t())


@pytest.mark.parametrize("fault", ["truncated", "header", "empty", "bit"])
def test_damage_is_found(tmp_path, fault):
    """Also a flipped bit in a tensor, for which the format has no checksum."""
    file = tmp_path / "a.safetensors"
    atomic_save({file: tensors()})
    data = bytearray(file.read_bytes())
    if fault == "bit":
        data[-5] ^= 1
    elif fault == "header":
        data[9:12] = b"\xff\xff\xff"
    file.write_bytes(data[:0] if fault == "empty" else data[:-9] if fault == "truncated" else data)
    with pytest.raises(
        ValueError, match=r"a\.safetensors is damaged \(.*copy or download"
    ) as error:
        load_checked(file)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    atomic_save({file: {"x": torch.zeros(2)}})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="cannot write"):
        atomic_save({file: {"x": torch.ones(2)}})
    assert load_checked(file)["x"].tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.fixture
def packed(tmp_path, make_model):
    """The same model as files of torch and of safetensors."""
    source = tmp_path / "source"
    make_model(source, NAMES)
    assert main(["pack", str(source), str(tmp_path / "torch")]) == 0
    assert main(["pack", str(source), str(tmp_path / "safe"), "--format", "safetensors"]) == 0
    assert not list((tmp_path / "safe").glob("*.pth"))
    return tmp_path


def test_a_packed_folder_is_used_like_any_other(packed, capsys):
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(image).save(packed / "a.png")
    safe = packed / "safe"
    expected = Segmenter.from_checkpoint(packed / "torch", device="cpu")(image).labels
    for found in (
        Segmenter.from_checkpoint(safe, device="cpu"),
        Segmenter.from_pretrained(safe, device="cpu"),
        Segmenter.from_checkpoint(safe, device="cpu", checkpoint="best.safetensors"),
    ):
        np.testing.assert_array_equal(found(image).labels, expected)
    for number, given in enumerate(
        (
            ["--model", str(safe)],
            ["--cfg", str(safe)],
            ["--cfg", str(safe / "config.yaml"), "TEST.checkpoint", "best.safetensors"],
            ["--cfg", str(packed / "torch"), "TEST.checkpoint", f"{safe}/best.safetensors"],
        )
    ):
        out = packed / f"out{number}"
        words = [*given, "TEST.result", str(out), "TEST.save", "index"]
        assert main(["predict", str(packed / "a.png"), "--gpu", "cpu", *words]) == 0
        (file,) = out.glob("*.png")
        np.testing.assert_array_equal(np.asarray(Image.open(file)), expected + 1)


def test_parts_are_starting_weights(packed):
    """`MODEL.weights_encoder` and `weights_decoder`, as for fine-tuning."""
    files = CheckpointFolder(packed / "safe").files("best.safetensors")
    opts = [f"MODEL.weights_{part}" for part in ("encoder", "decoder")]
    options = load_options(
        packed / "torch" / "config.yaml", [x for pair in zip(opts, map(str, files)) for x in pair]
    )
    module = ModelBuilder.from_config(options, inference=True)
    for part, file in zip((module.encoder, module.decoder), files):
        for key, value in load_checked(file).items():
            assert torch.equal(part.state_dict()[key], value.to(part.state_dict()[key].dtype)), key


def test_of_two_formats_that_of_a_training_is_preferred(packed):
    both = packed / "torch"
    pack(packed / "source", packed / "again", suffix=".safetensors", half=False)
    for file in (packed / "again").glob("*.safetensors"):
        file.rename(both / file.name)
    assert CheckpointFolder(both).names() == ["best.safetensors", "best.pth"]
    assert model_options(str(both), "TEST").TEST.checkpoint == "best.pth"
    for file in both.glob("*.pth"):
        file.unlink()
    assert model_options(str(both), "TEST").TEST.checkpoint == "best.safetensors"
    with pytest.raises(
        FileNotFoundError, match=r"encoder_best\.pth does not exist; .* has best\.s"
    ):
        CheckpointFolder(both).files("best.pth")


def test_without_the_package_the_extra_is_named(packed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    needs = r"best\.safetensors needs safetensors: pip install 'mit_semseg\[hub\]'$"
    with pytest.raises(ValueError, match=needs):
        Segmenter.from_checkpoint(packed / "safe", device="cpu")
    words = [str(packed / "source"), str(packed / "new"), "--format", "safetensors"]
    assert main(["pack", *words]) == 2
    assert "pip install 'mit_semseg[hub]'" in capsys.readouterr().err
    assert not (packed / "new").exists()
