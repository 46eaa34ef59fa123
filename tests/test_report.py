"""The result page and the sheets of images."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mit_semseg.visualize.pages import write_page
from mit_semseg.visualize.palette import error_map, paint
from mit_semseg.visualize.sheets import Sample, contact_sheet, image_grid

NAMES = ("sky", "road <b>", "car & van")
COLORS = np.array([(10, 20, 30), (200, 100, 0), (0, 250, 90)], np.uint8)


def sample(height=20, width=30):
    rng = np.random.default_rng(4)
    truth = rng.integers(-1, 3, (height, width))
    prediction = np.where(truth < 0, 0, truth)
    prediction[0, 0] = (truth[0, 0] + 1) % 3
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample("a<b>.png", image, truth, prediction)


class _Page(HTMLParser):
    """Collects image sources, links and text; fails on tags that are closed in the wrong order."""

    def __init__(self, text):
        super().__init__()
        self.sources = []
        self.outside = []
        self.text = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key == "src":
                self.sources.append(value or "")
            if key in ("href", "srcset", "action", "data") or tag in ("script", "link", "iframe"):
                self.outside.append(f"{tag} {key}={value}")

    def handle_data(self, data):
        self.text.append(data)


def page(path, **more):
    write_page(path, [sample()], NAMES, COLORS, title="Title & more", **more)
    text = path.read_text(encoding="utf-8")
    return _Page(text), text


def test_accuracy_leaves_ignored_pixels_out():
    truth = np.array([[0, 1, -1, 2]])
    shown = Sample("x", np.zeros((1, 4, 3), np.uint8), truth, np.array([[0, 2, 1, 2]]))
    assert shown.accuracy == pytest.approx(2 / 3)
    nothing = Sample("x", np.zeros((1, 4, 3), np.uint8), truth * 0 - 1, truth)
    assert np.isnan(nothing.accuracy)
    with pytest.raises(ValueError, match="street.png: prediction"):
        Sample("street.png", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), np.zeros((2, 4)))


def test_colours_and_errors():
    truth, prediction = np.array([[0, 2, -1]]), np.array([[0, 1, 1]])
    image = np.full((1, 3, 3), 100, np.uint8)
    assert paint(truth, COLORS)[0, :2].tolist() == COLORS[[0, 2]].tolist()
    errors = error_map(image, truth, prediction)
    assert errors[0, 0].tolist() == [200, 200, 200]  # 165 + 0.35 * 100
    red, ignored = errors[0, 1], errors[0, 2]
    assert red[0] > 200 and red[1] < 80
    assert np.array_equal(ignored, paint(np.array([[-1]]), COLORS)[0, 0])


def test_the_page_is_self_contained(tmp_path):
    parsed, text = page(tmp_path / "deep" / "index.html")
    assert parsed.outside == []
    assert not re.search(r"url\(|@import|https?:", text)
    assert len(parsed.sources) == 4 and all(s.startswith("data:image/") for s in parsed.sources)
    # Names are escaped.
    assert "<b>." not in text and "road <b>" not in text
    assert "road <b>" in parsed.text and "Title & more" in parsed.text
    # Label maps survive exactly.
    shown = sample()
    for source, labels in zip(parsed.sources[1:3], (shown.truth, shown.prediction), strict=True):
        data = base64.b64decode(source.partition(",")[2])
        picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(picture, paint(labels, COLORS))


def test_summary_charts_and_commands_are_on_the_page(tmp_path):
    history = [
        {"kind": "train", "epoch": 1, "step": 20, "loss": 1.5, "accuracy": 0.5},
        {"kind": "train", "epoch": 2, "step": 40, "loss": 0.75, "accuracy": 0.7},
    ]
    parsed, _ = page(
        tmp_path / "index.html",
        figures=[("mean IoU", "0.812")],
        ious=[0.5, None, 0.25],
        history=history,
        commands=[("python train.py --cfg a<b>", 93.4), ("python test.py", None)],
    )
    words = " ".join(" ".join(parsed.text).split())
    for expected in ("0.812", "IoU per class", "Training", "python train.py --cfg a<b> 93 s"):
        assert expected in words, expected
    charts = [s for s in parsed.sources if s.startswith("data:image/svg+xml;base64,")]
    assert len(charts) == 2 and parsed.sources[-2:] == charts
    for chart in charts:
        assert b"<svg" in base64.b64decode(chart.partition(",")[2])
    # A single record draws no curve, and numbers that disagree are refused.
    assert "svg" not in page(tmp_path / "index.html", history=history[:1])[1]
    with pytest.raises(ValueError, match="3 names, 3 colours and 2 IoUs"):
        page(tmp_path / "index.html", ious=[0.1, 0.2])


def test_contact_sheet_holds_the_images(tmp_path):
    shown, path = sample(30, 40), tmp_path / "new" / "a.png"
    sheet = contact_sheet([shown, shown], NAMES, COLORS, path, title="T")
    assert path.is_file() and [text.get_text() for text in sheet.texts] == ["T"]
    captions = [axes.get_title(loc="left") for axes in sheet.axes]
    assert captions == ["image", "truth", "prediction", "errors", *[""] * 4]
    for row in (sheet.axes[:4], sheet.axes[4:]):
        for axes, view in zip(row, shown.views(COLORS), strict=True):
            assert np.array_equal(axes.images[0].get_array(), view)
    # The colours of classes are not mixed.
    assert [a.images[0].get_interpolation() for a in sheet.axes[1:3]] == ["nearest"] * 2
    key = [text.get_text() for text in sheet.legends[0].get_texts()]
    assert key == [*NAMES, "wrong"]
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], NAMES, COLORS, path)


def test_grid_holds_images_and_label_maps_under_their_captions(tmp_path):
    tiles = [(f"model {n}\nsecond line", np.full((6, 8, 3), 20 * n, np.uint8)) for n in range(1, 6)]
    tiles.append(("labels", np.resize([0, 2, -1], (6, 8))))
    path = tmp_path / "x" / "a.png"
    grid = image_grid(tiles, path, columns=2, names=NAMES, colors=COLORS)
    assert [axes.get_title(loc="left") for axes in grid.axes] == [name for name, _ in tiles]
    places = np.array([axes.get_position().p0 for axes in grid.axes]).round(6)
    assert [len(set(x)) for x in places.T] == [2, 3], "two columns, three rows"
    assert np.array_equal(grid.axes[-1].images[0].get_array(), paint(tiles[-1][1], COLORS))
    assert [text.get_text() for text in grid.legends[0].get_texts()] == ["sky", "car & van"]
    plain = image_grid(tiles[:1], tmp_path / "b.png")
    long = image_grid(
        [("a caption that is too long for the width of its column " * 2, tiles[0][1])] * 2
    )
    long.draw_without_rendering()
    sizes = [axes.get_tightbbox() for axes in long.axes]
    assert sizes[0].x1 < sizes[1].x0, "long captions are made smaller"
    assert not plain.legends and path.is_file()
    with pytest.raises(ValueError, match="at least one image"):
        image_grid([], path)
    with pytest.raises(ValueError, match="label maps need colors"):
        image_grid(tiles, path)


# ------------------------------------------------------------------------------ the demo's page


def test_demo_page_from_the_files_of_a_run(tmp_path, capsys):
    """What render, train.py, eval_multipro.py and test.py leave behind is all the page needs."""
    from mit_semseg.cli import main
    from mit_semseg.config import dump_config, load_config
    from mit_semseg.demo import streets

    data, ckpt, result = (tmp_path / name for name in ("data", "ckpt", "predictions"))
    arguments = ["--out", str(data), "--train", "1", "--val", "2", "--size", "64", "96"]
    assert main(["demo", "render", *arguments]) == 0
    cfg = load_config("config/demo.yaml")
    cfg.DIR, cfg.TEST.result, cfg.DATASET.root_dataset = str(ckpt), str(result), str(data)
    cfg.DATASET.list_train = str(data / "training.odgt")
    cfg.DATASET.list_val = str(data / "validation.odgt")
    cfg.DATASET.classes = str(data / "classes.csv")
    dump_config(cfg, tmp_path / "demo.yaml")
    page = ["demo", "page", "--cfg", str(tmp_path / "demo.yaml"), "--out", str(tmp_path / "out")]
    page += ["--evaluation", str(tmp_path), "--commands", str(tmp_path / "commands.tsv")]
    (tmp_path / "commands.tsv").write_text("12\tpython train.py --cfg x\n")

    assert main(page) == 2
    assert "run eval_multipro.py first" in capsys.readouterr().err

    rows = [{"iou": 0.5}] * 8 + [{"iou": None}] * 2
    figures = {"mean_iou": 0.5, "pixel_accuracy": 0.75, "images": 2, "classes": rows}
    (tmp_path / "eval.json").write_text(json.dumps(figures))
    ckpt.mkdir()
    line = {"kind": "train", "step": 20, "loss": 1.0, "seconds": 31.0, "images_per_second": 9.25}
    (ckpt / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert main(page) == 2
    assert "0000_index.png is missing; run test.py" in capsys.readouterr().err

    result.mkdir()
    for index in range(2):
        stored = Image.open(data / f"annotations/validation/{index:04d}.png")
        # The truth itself as the prediction, where it is not ignored.
        Image.fromarray(np.maximum(np.asarray(stored), 1)).save(result / f"{index:04d}_index.png")
    assert main(page) == 0
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert text.count("pixel accuracy 100.0 %") == 2
    for expected in ("0.500", "75.0%", "31 s", "python train.py --cfg x", streets.CLASSES[0][0]):
        assert expected in text
    assert str(tmp_path) not in text, "the page names no folder of this machine"
    assert Image.open(tmp_path / "out" / "overview.png").width > 400
