"""`mit-semseg app`, in a browser."""

import base64
import importlib.util
import io
import os
import socket
import zipfile

import numpy as np
import pytest
from PIL import Image

if importlib.util.find_spec("gradio") is None:
    pytest.skip("gradio is not installed", allow_module_level=True)
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")

from browser import CHROMIUM, Browser  # noqa: E402
from http_server import CLASSES, Brightness, result, wait_until  # noqa: E402

from mit_semseg.cli import main  # noqa: E402
from mit_semseg.serving import page  # noqa: E402
from mit_semseg.serving.limits import Limits  # noqa: E402

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


class Dark(Brightness):
    """A model that sees nothing bright."""

    def __call__(self, image):
        return result(np.zeros_like(image))


@pytest.fixture
def halves(tmp_path):
    """A picture whose right half is bright: (60, 80)."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, 40:] = 200
    Image.fromarray(pixels).save(tmp_path / "halves.png")
    return tmp_path / "halves.png"


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def opened(browser, models, **limits):
    """The page of models, ready for an upload."""
    return page.open_page(models, "127.0.0.1", free_port(), Limits(**limits))


def upload(browser, address, path):
    browser.urls.clear()
    browser.go(address)
    browser.until("!!document.querySelector('#picture input[type=file]')")
    browser.upload("#picture input[type=file]", path)


# The colour and opacity of the canvas of a result at a pixel.
COLOR = (
    "[...document.querySelector('#result0 canvas').getContext('2d')"
    ".getImageData({x}, {y}, 1, 1).data]"
)


@needs_chromium
def test_an_image_is_uploaded_and_its_classes_are_shown(browser, halves):
    with opened(browser, [("bright", Brightness())]) as address:
        upload(browser, address, halves)
        browser.until("document.querySelectorAll('#result0 .class').length == 2")
        rows = "[...document.querySelectorAll('#result0 .class')].map((row) => row.innerText)"
        assert [text.split() for text in browser.js(rows)] == [
            ["dark", "50.0", "%"],
            ["bright", "50.0", "%"],
        ]
        dark, bright = ([*color, 255] for color in CLASSES.colors.tolist())
        assert browser.js(COLOR.format(x=5, y=5)) == dark
        assert browser.js(COLOR.format(x=75, y=55)) == bright

        # A class is switched off, and on again.
        browser.js("document.querySelector('#result0 .class input').click()")
        assert browser.js(COLOR.format(x=5, y=5)) == [0, 0, 0, 0]
        assert browser.js(COLOR.format(x=75, y=55)) == bright
        browser.js("document.querySelector('#result0 .all').click()")
        assert browser.js(COLOR.format(x=5, y=5)) == dark

        # The slider changes the opacity of all classes.
        browser.js(
            "(() => { const slider = document.querySelector('#result0 [type=range]');"
            "slider.value = 20; slider.dispatchEvent(new Event('input')); })()"
        )
        assert browser.js("document.querySelector('#result0 canvas').style.opacity") == "0.2"

        # The class under the mouse is named.
        left, top, width, height = browser.js(
            "(() => { const box = document.querySelector('#result0 canvas')"
            ".getBoundingClientRect(); return [box.left, box.top, box.width, box.height]; })()"
        )
        browser.move(left + 0.9 * width, top + 0.5 * height)
        tip = "document.querySelector('#result0 .tip')"
        browser.until(f"!{tip}.hidden")
        assert browser.js(f"{tip}.innerText") == "bright, 50.0 %"
        browser.move(left + 0.1 * width, top + 0.5 * height)
        browser.until(f"{tip}.innerText == 'dark, 50.0 %'")

        # The masks can be downloaded.
        browser.downloads_to(halves.parent)
        button = "document.querySelector('button#download, #download button')"
        browser.until(f"!!{button}")
        browser.js(f"{button}.click()")
        wait_until((halves.parent / "masks.zip").exists)
        with zipfile.ZipFile(halves.parent / "masks.zip") as archive:
            names = {"labels.png", "overlay.png", "areas.json", "polygons.geojson"}
            assert {*archive.namelist()} == names
            labels = Image.open(io.BytesIO(archive.read("labels.png")))
        np.testing.assert_array_equal(
            np.asarray(labels), np.asarray(Image.open(halves))[..., 0] > 0
        )
        assert not [url for url in browser.urls if not url.startswith(address)]
        assert not browser.errors


@needs_chromium
def test_two_models_are_compared(browser, halves):
    with opened(browser, [("bright", Brightness()), ("dark", Dark())]) as address:
        upload(browser, address, halves)
        browser.until("document.querySelectorAll('#result1 .class').length == 1")
        assert browser.js("document.querySelectorAll('#result0 .class').length") == 2
        browser.until("document.querySelectorAll('#both img').length == 2")
        text = browser.js("document.querySelector('#both').innerText")
        assert "bright and dark: equal in 50.0 % of the pixels" in text


@needs_chromium
def test_an_image_beyond_the_limits_is_refused(browser, halves):
    with opened(browser, [("bright", Brightness())], megapixels=0.001) as address:
        upload(browser, address, halves)
        browser.until("document.body.innerText.includes('an image of 80 x 60 pixels')")
        assert browser.js("document.querySelectorAll('#result0 .class').length") == 0


def test_what_is_shown_are_the_ids_and_the_classes():
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, 3:] = 255
    shown = page.shown(result(image))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown["labels"].split(",")[1]))))
    assert (pixels[..., 0] + 256 * pixels[..., 1].astype(int) - 1).tolist() == 4 * [
        [0] * 3 + [1] * 3
    ]
    assert [(one["id"], one["name"], one["area"]) for one in shown["classes"]] == [
        (0, "dark", "50.0 %"),
        (1, "bright", "50.0 %"),
    ]


def test_large_images_are_reduced_for_the_browser():
    shown = page.shown(result(np.zeros((200, 3200, 3), np.uint8)))
    assert Image.open(io.BytesIO(base64.b64decode(shown["image"].split(",")[1]))).size == (
        1600,
        100,
    )


def test_old_files_are_removed(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "masks.zip").touch()
    os.utime(old, (0, 0))
    page._saved([("a", None)], [result(np.zeros((4, 6, 3), np.uint8))], tmp_path)
    assert not old.exists()
    assert new.exists()


def test_three_models_are_too_many(capsys):
    assert main(["app", "a", "b", "c"]) == 2
    assert "error: app shows one model, or compares two; 3 are given" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert capsys.readouterr().err == "error: app needs gradio: pip install 'mit_semseg[app]'\n"
