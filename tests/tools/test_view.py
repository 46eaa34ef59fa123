"""The page of a data set, and `mit-semseg data import | view`."""

import json
import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mit_semseg.cli import main
from mit_semseg.tools.view import view
from mit_semseg.visualize.pages import embedded_labels


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twenty-two images of 20x10 with values 0..2; some of them are odd."""
    folder = tmp_path / "set"
    for k in range(22):
        width = 12 if k == 7 else 20
        labels = np.zeros((10, width))
        labels[5:] = 1
        labels[:, :2] = 2
        if k == 3:
            labels[:] = 0
        if k == 9:
            labels[0, 0] = 3
        write(folder / f"images/s{k:02}.png", np.full((10, width, 3), 9 * k))
        write(folder / f"masks/s{k:02}.png", labels)
    write(folder / "images/alone.png", np.zeros((10, 20, 3)))
    (folder / "labels.txt").write_text("background\nroad\ncar\nbicycle\ntrain\n")
    return folder


def cards(page):
    """(name, what is odd) of the samples on a page, in order."""
    text = page.read_text("utf-8")
    found = []
    for card in text.split('<div class="card')[1:]:
        name = re.search(r"<figcaption><span>(.*?)</span>", card)
        if name:
            found.append((name[1], re.findall(r'<p class="why">(.*?)</p>', card)))
    return found


def test_odd_samples_come_first(folder, tmp_path):
    page = view(str(folder), tmp_path / "page.html", progress=False)
    names, odd = zip(*cards(page))
    assert odd[0] == [f"{folder}/images/alone.png: has no mask; left out"]
    assert names[1:4] == ("images/s03.png", "images/s07.png", "images/s09.png")
    assert odd[1:4] == (
        ["only background"],
        ["another size: 12x10, usually 20x10"],
        ["rare class: bicycle, in 1 image"],
    )
    assert not any(odd[4:]) and len(names) == 23
    text = page.read_text("utf-8")
    assert "train: in no mask" in text
    # Nothing is loaded from elsewhere.
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in text


def test_shares_and_the_number_of_pictures(folder, tmp_path):
    page = view(str(folder), tmp_path / "page.html", 6, progress=False)
    assert len(cards(page)) == 6
    text = page.read_text("utf-8")
    assert "17 more without pictures" in text
    # Cars: two columns of ten pixels in 21 images, one pixel of which is a bicycle.
    total = 21 * 200 + 120
    assert f"{100 * (21 * 20 - 1) / total:.1f} %" in text
    assert text.count("21 images") == 2 and "1 image<" in text


def test_the_command_imports_and_shows(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["data", "import", str(folder), "--out", str(out), "--ignore", "train"]) == 1
    text = capsys.readouterr().out
    assert "4 classes (background, road, car, bicycle)" in text
    assert "left out (1):" in text and "alone.png: has no mask" in text
    assert json.loads((out / "import.json").read_text())["samples"] == {
        "training": 20, "validation": 2
    }  # fmt: skip
    page = (out / "page.html").read_text("utf-8")
    assert "alone.png: has no mask" in page and "only background" in page
    assert main(["data", "view", str(out), "--out", str(tmp_path / "again.html")]) == 0
    assert cards(tmp_path / "again.html") == cards(out / "page.html")
    assert main(["data", "view", str(tmp_path / "nowhere")]) == 2
    assert "no such recipe or folder" in capsys.readouterr().err
    for damaged in ("{", "{}", "[]", '{"left_out": 3}'):
        (out / "import.json").write_text(damaged)
        assert main(["data", "view", str(out), "--out", str(tmp_path / "again.html")]) == 2
        assert "import.json" in capsys.readouterr().err


def test_masks_are_drawn_in_the_colours_of_their_classes():
    colors = np.array([[1, 2, 3], [200, 100, 50]], np.uint8)
    labels = np.array([[0, 1, -1]])
    for table, hidden in ((colors, []), (np.tile(colors, (200, 1)), []), (colors, [0])):
        uri = embedded_labels(labels, table, hidden)
        shown = Image.open(BytesIO(b64decode(uri.split(",")[1]))).convert("RGBA")
        pixels = np.array(shown)[0].tolist()
        assert pixels[1] == [200, 100, 50, 255]
        assert pixels[0] == [1, 2, 3, 255] if not hidden else pixels[0][3] == 0
        assert pixels[2][3] == 0
