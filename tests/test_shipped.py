"""The recipes and the model that come with the package, from any working folder."""

import io
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from download_server import head, whole
from PIL import Image
from source_tree import ROOT

from mit_semseg import Segmenter, shipped
from mit_semseg.cli import main
from mit_semseg.config import load_options
from mit_semseg.engine.checkpoint import resolve_checkpoint

WEIGHTS = ROOT / "weights" / shipped.MODEL


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another working folder, with a photo."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path


def predict(*words):
    small = ["TEST.imgSizes", "(64,)", "TEST.save", "['index']", "TEST.result", "out"]
    return main(["predict", *words, "--gpu", "cpu", *small])


def written(folder):
    return {file.name: np.asarray(Image.open(file)) for file in (folder / "out").iterdir()}


def test_recipes_and_models_have_names(elsewhere):
    assert shipped.recipe("config/demo.yaml") == ROOT / "config" / "demo.yaml"
    assert load_options("demo") == load_options("demo.yaml") == load_options("config/demo.yaml")
    assert shipped.model(shipped.MODEL) == shipped.model(f"weights/{shipped.MODEL}") == WEIGHTS
    folder, name = resolve_checkpoint("ckpt", f"weights/{shipped.MODEL}/best.pth")
    assert (folder.path, name) == (WEIGHTS, "best.pth")
    # What exists in the working folder comes first.
    (elsewhere / "config").mkdir()
    (elsewhere / "config" / "demo.yaml").write_text("DIR: mine\n")
    assert load_options("config/demo.yaml").DIR == "mine"
    assert load_options("demo").DIR == "demo/ckpt"
    for other in ("", "none", "lib/nn", "config", "weights"):
        assert str(shipped.recipe(other)) == str(shipped.model(other)) == (other or ".")


def test_a_photo_is_predicted_without_a_configuration(elsewhere, capsys):
    assert predict("photo.png") == 0
    output = capsys.readouterr().out
    assert f"the shipped model {shipped.MODEL}" in output and "1 image segmented" in output
    expected = Segmenter.from_pretrained(shipped.MODEL, device="cpu", imgSizes=64)("photo.png")
    assert np.array_equal(written(elsewhere)["photo.png"], expected.labels)  # label_offset is 0
    # It is not used in place of a configuration that is there.
    (elsewhere / "ckpt" / "ade20k-resnet50dilated-ppm_deepsup").mkdir(parents=True)
    assert predict("photo.png") == 2
    assert "encoder_epoch_20.pth does not exist" in capsys.readouterr().err


def test_bytes_and_urls_are_predicted(elsewhere, capsys, monkeypatch):
    (elsewhere / "in").mkdir()
    moved = shutil.move("photo.png", elsewhere / "in" / "a photo.png")
    stdin = SimpleNamespace(buffer=io.BytesIO((elsewhere / "in" / "a photo.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    url = moved.as_uri()
    assert predict("-", "in", url, "--model", str(WEIGHTS)) == 0
    found = written(elsewhere)
    assert sorted(found) == ["a photo_png.png", "a photo_png_2.png", "stdin.png"]
    first, *others = found.values()
    assert all(np.array_equal(first, one) for one in others)
    output = capsys.readouterr().out
    assert "[standard input]" in output and f"[{url}]" in output
    assert predict("-") == 2
    assert "standard input, which is empty" in capsys.readouterr().err
    (elsewhere / "bad.png").write_bytes(b"no image")
    assert predict((elsewhere / "bad.png").as_uri()) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"  {(elsewhere / 'bad.png').as_uri()}: ") and "/0/" not in last


def test_a_url_that_fails_does_not_stop_the_others(elsewhere, capsys, server):
    """One line each, in order, and status 1."""
    content = (elsewhere / "photo.png").read_bytes()
    server.answers = [whole(content), *[lambda start, send: send(head("404 Not Found"))] * 2]
    urls = [f"{server.base}/{name}.png" for name in ("good", "gone", "missing")]
    assert predict(*urls, "http://[bad", "photo.png", "TEST.batch_size", "3") == 1
    assert sorted(written(elsewhere)) == ["good.png", "photo.png"]
    output = capsys.readouterr().out
    assert "2 images segmented" in output
    summary = output[output.index("3 of 5 images failed:") :].splitlines()[1:]
    assert summary == [
        f"  {urls[1]}: cannot download gone.png (HTTP 404 Not Found)",
        f"  {urls[2]}: cannot download missing.png (HTTP 404 Not Found)",
        "  http://[bad: Invalid IPv6 URL",
    ]


@pytest.mark.parametrize("name", ["", "config.yaml"])
def test_a_configuration_finds_the_weights_beside_it(name, elsewhere, capsys):
    copy = shutil.copytree(WEIGHTS, elsewhere / "copy")
    text = (copy / "config.yaml").read_text().replace("best.pth", "epoch_70.pth")
    (copy / "config.yaml").write_text(text)
    assert str(copy) == load_options(copy / name).DIR
    assert predict("photo.png", "--cfg", str(copy / name)) == 0
    capsys.readouterr()
    assert predict("photo.png", "--cfg", str(copy / name), "TEST.checkpoint", "epoch_9.pth") == 2
    assert "encoder_epoch_9.pth does not exist" in capsys.readouterr().err


def test_images_and_overrides_may_be_in_any_order(monkeypatch, elsewhere):
    calls = []
    monkeypatch.setattr(
        "mit_semseg.engine.predict.predict",
        lambda options, images, *args, **more: calls.append((options.TEST, images)) or [],
    )
    for words in (
        "a.jpg b.jpg --gpu cpu TEST.flip True",
        "--imgs a.jpg b.jpg --gpu cpu TEST.flip True",
        "--gpu cpu a.jpg b.jpg TEST.flip True",
        "a.jpg --gpu cpu b.jpg TEST.flip True",
        "--imgs a.jpg b.jpg TEST.flip True --gpu cpu",
    ):
        assert main(["predict", *words.split()]) == 0
    assert [images for _, images in calls] == [["a.jpg", "b.jpg"]] * 5
    assert all(test.flip for test, _ in calls)


def test_mistakes_are_named(elsewhere, capsys):
    assert main(["predict", "--gpu", "cpu"]) == 2
    assert "no image is given" in capsys.readouterr().err
    assert predict("photo.png", "--model", "camvid-mobilenetv2dilated-c1") == 2
    assert f"did you mean {shipped.MODEL!r}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict("photo.png", "--model", "x", "--cfg", "y")
