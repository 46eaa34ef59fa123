"""Memory of a prediction, measured from outside: the whole process, its imports included."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mit_semseg.dataset.images import load_image
from mit_semseg.demo.streets import render

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SEMSEG_DATA", ROOT.parent / "shared" / "data")) / "CamVid" / "val"
CAMVID = ROOT / "weights" / "camvid-mobilenetv2dilated-c1_deepsup" / "config.yaml"
PICTURES = "['color', 'index', 'overlay', 'side', 'legend']"

# Starts a program and prints its peak. Linux counts what a process held before it became another
# program, so the one that starts it must be small.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss if os.waitstatus_to_exitcode(status) == 0 else -1)
"""


def peak(image, model, out, *opts, save=PICTURES):
    """Most memory that `mit-semseg predict` ever held, in MB (10^6 bytes)."""
    settings = ["TEST.result", str(out), "TEST.save", save, *opts]
    command = [sys.executable, "-m", "mit_semseg.cli", "predict", "--gpu", "cpu"]
    command += ["--cfg", str(model), "--imgs", str(image), *settings]
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() not in ("", "-1"), done.stderr
    return int(done.stdout) * 1024 / 1e6


def streets(path, width, height):
    """A picture of many street scenes side by side: photographs, or drawn ones without the data."""
    files = sorted(DATA.glob("*.png"))[:12]
    scenes = [load_image(file) for file in files] or [render(k)[0] for k in range(4)]
    h, w = scenes[0].shape[:2]
    picture = np.empty((height, width, 3), dtype=np.uint8)
    places = [(y, x) for y in range(0, height, h) for x in range(0, width, w)]
    for k, (y, x) in enumerate(places):
        part = picture[y : y + h, x : x + w]
        part[:] = scenes[k % len(scenes)][: part.shape[0], : part.shape[1]]
    Image.fromarray(picture).save(path, quality=92)
    return path


@pytest.fixture
def model(tmp_path, make_model):
    """`model(count)`: the configuration of a model of so many classes."""

    def build(count):
        make_model(tmp_path / "model", tuple(f"class {k}" for k in range(count)))
        return tmp_path / "model" / "config.yaml"

    return build


def native(width, height):
    """Settings for the picture's own scale."""
    return ["DATASET.imgMaxSize", str(width), "TEST.imgSizes", f"({height},)"]


@pytest.mark.slow
def test_four_million_pixels(model, tmp_path):
    cfg, save = model(20), "['index', 'overlay']"
    small = streets(tmp_path / "small.jpg", 240, 160)
    large = streets(tmp_path / "large.jpg", 2464, 1760)
    base = peak(small, cfg, tmp_path / "a", *native(240, 160), save=save)
    tiled = peak(large, cfg, tmp_path / "b", *native(2464, 1760), save=save)
    # 200 MB for a tile, and 40 bytes a pixel. Whole, the network takes 150 bytes a pixel.
    assert tiled - base < 200 + 4.3 * 40
    assert Image.open(tmp_path / "b" / "large_overlay.png").size == (2464, 1760)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scales", ["native", "default"])
@pytest.mark.parametrize("classes", [11, 150])
def test_96_million_pixels_in_3_gigabytes(model, tmp_path, classes, scales):
    large = streets(tmp_path / "large.jpg", 12000, 8000)
    opts = native(12000, 8000) if scales == "native" else []
    used = peak(large, CAMVID if classes == 11 else model(150), tmp_path / "out", *opts)
    print(f"96 million pixels, {classes} classes, {scales} scales: {used:.0f} MB at most")
    assert used < 3000
    assert Image.open(tmp_path / "out" / "large_index.png").size == (12000, 8000)
