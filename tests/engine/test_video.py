"""Videos: order, number and rate of frames, smoothing, cameras, and what ends them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from mit_semseg.cli import main
from mit_semseg.config import Options
from mit_semseg.dataset.clips import Clip, ClipWriter, is_video, split_videos
from mit_semseg.demo.streets import render
from mit_semseg.engine.video import Smoothing, predict_videos
from mit_semseg.segmenter import Segmenter

CPU = torch.device("cpu")
NAMES = ("wall", "floor", "lamp", "plant")
FPS = 12.5


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model):
    return make_model(tmp_path_factory.mktemp("ckpt") / "model", NAMES, TEST__imgSizes=[48])


@pytest.fixture
def cfg(model):
    return model.clone()


@pytest.fixture(scope="module")
def frames():
    """A camera that pans over a rendered street."""
    street, *_ = render(1, size=(128, 192))
    return [np.ascontiguousarray(street[:96, 4 * n : 4 * n + 128]) for n in range(14)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory, frames):
    path = tmp_path_factory.mktemp("clip") / "street.mp4"
    with ClipWriter(path, FPS) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def read_back(path):
    """The frames of a file and its rate, by OpenCV."""
    capture, found = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        found.append(read[1][:, :, ::-1].astype(np.float32))
    rate = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return found, rate


def difference(one, other):
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


def test_overlays_in_order_at_the_rate_of_the_clip(cfg, clip, tmp_path, capsys):
    (result,) = predict_videos(Options.read(cfg), [str(clip)], CPU, result=tmp_path)
    path = tmp_path / "street.mp4"
    assert result["outputs"] == {
        "overlay": str(path),
        "legend": str(tmp_path / "street_legend.png"),
    }
    assert (result["frames"], result["fps"], result["size"]) == (14, FPS, (128, 96))
    found, rate = read_back(path)
    assert len(found) == 14 and rate == FPS
    # The same from each frame that OpenCV reads, segmented as an image.
    source, _ = read_back(clip)
    segmenter = Segmenter.from_checkpoint(cfg.DIR, device="cpu")
    expected = [segmenter(frame.astype(np.uint8)) for frame in source]
    for n, frame in enumerate(found):
        away = [difference(frame, one.overlay()) for one in expected]
        assert int(np.argmin(away)) == n and away[n] < 8
    for name in NAMES:
        mean = np.mean([one.areas.get(name, 0) for one in expected])
        assert result["areas"].get(name, 0) == pytest.approx(mean)
    assert Image.open(tmp_path / "street_legend.png").width > 50
    output = capsys.readouterr().out
    assert "Predictions in" in output and "14 frames of 128x96 pixels at 12.5 per second" in output


def test_kinds_and_batches(cfg, clip, tmp_path):
    labels = []
    for size, save in ((1, ["color", "index"]), (4, ["side", "color"])):
        changed = cfg.clone()
        changed.TEST.batch_size, changed.TEST.save = size, save
        out = tmp_path / str(size)
        (result,) = predict_videos(Options.read(changed), [str(clip)], CPU, result=out)
        assert result["frames"] == 14
        labels.append(result["areas"])
    assert labels[0] == pytest.approx(labels[1], abs=1e-3)
    assert [path.name for path in sorted((tmp_path / "1").iterdir())] == ["street.mp4"]
    side, _ = read_back(tmp_path / "4" / "street_side.mp4")
    color, _ = read_back(tmp_path / "4" / "street_color.mp4")
    assert side[0].shape == (96, 256, 3) and len(side) == len(color) == 14
    assert difference(side[7][:, 128:], color[7]) < 12


def test_a_generator_of_results(cfg, clip):
    segmenter = Segmenter.from_checkpoint(cfg.DIR, device="cpu")
    source, _ = read_back(clip)
    results = list(segmenter.video(clip))
    for result, frame in zip(results, source, strict=True):
        np.testing.assert_array_equal(result.image, frame)
        np.testing.assert_array_equal(result.labels, segmenter(result.image).labels)
    with pytest.raises(FileNotFoundError, match=r"none\.mp4: no such file"):
        next(segmenter.video("none.mp4"))
    with pytest.raises(ValueError, match="TEST.smooth is 1"):
        next(segmenter.video(clip, smooth=1.0))


# ------------------------------------------------------------------------------ smoothing
def test_smoothing_is_the_exponential_average():
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3, 4, 5)))
    p = logits.softmax(1).numpy()
    expected = [p[0]]
    for frame in p[1:]:
        expected.append(0.7 * expected[-1] + 0.3 * frame)
    for sizes in ([6], [1] * 6, [2, 3, 1]):
        smoothing = Smoothing(0.7)
        found = [smoothing([part.clone()])[0] for part in logits.split(sizes)]
        np.testing.assert_allclose(torch.cat(found).softmax(1).numpy(), expected, atol=1e-12)
    same = [logits]
    assert Smoothing(0)(same)[0] is logits
    smoothing([torch.zeros(1, 3, 2, 2)])  # another size: it starts again
    np.testing.assert_allclose(smoothing([torch.zeros(1, 3, 2, 2)])[0].softmax(1).numpy(), 1 / 3)


def test_certain_probabilities_stay_finite():
    smoothing = Smoothing(0.5)
    certain = torch.tensor([0.0, 500.0]).view(1, 2, 1, 1)
    for _ in range(3):
        assert torch.isfinite(smoothing([certain])[0]).all()
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="TEST.smooth is"):
            Smoothing(wrong)


def test_smoothing_removes_flicker(cfg, frames, tmp_path):
    """Noise on a standing camera: fewer labels change from frame to frame."""
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.mp4"
    with ClipWriter(path, 25) as writer:
        for _ in range(8):
            noise = rng.normal(0, 25, frames[0].shape)
            writer.write((frames[0] + noise).clip(0, 255).astype(np.uint8))
    segmenter = Segmenter.from_checkpoint(cfg.DIR, device="cpu")
    changes = []
    for weight in (0, 0.8):
        labels = [result.labels for result in segmenter.video(path, smooth=weight)]
        changes.append(np.mean([(a != b).mean() for a, b in zip(labels, labels[1:])]))
    assert changes[1] < changes[0] / 2


# ------------------------------------------------------------------------------ cameras
class Camera:
    """Stands in for `cv2.VideoCapture`: so many frames at once, and 0 frames per second."""

    def __init__(self, frames, delay=0.0):
        self.frames, self.delay, self.number, self.released = iter(frames), delay, None, False

    def __call__(self, number):
        self.number = number
        return self

    def isOpened(self):  # noqa: N802  # the names of OpenCV
        return self.number == 0

    def set(self, *setting):
        return True

    def get(self, setting):
        known = {cv2.CAP_PROP_FRAME_WIDTH: 128.0, cv2.CAP_PROP_FRAME_HEIGHT: 96.0}
        return known.get(setting, 0.0 if setting == cv2.CAP_PROP_FPS else -1.0)

    def read(self):
        time.sleep(self.delay)
        frame = next(self.frames, None)
        return frame is not None, None if frame is None else frame[:, :, ::-1].copy()

    def release(self):
        self.released = True


def test_a_camera_is_recorded_at_its_pace(cfg, frames, tmp_path, monkeypatch):
    camera = Camera(frames[:5], delay=0.1)
    monkeypatch.setattr("mit_semseg.dataset.clips.cv2.VideoCapture", camera)
    (result,) = predict_videos(Options.read(cfg), ["0"], CPU, result=tmp_path)
    monkeypatch.undo()
    assert result["frames"] == 5 and camera.released and result["fps"] == 30
    found, rate = read_back(tmp_path / "camera0.mp4")
    # 4 pauses of at least a tenth of a second, in which 3 frames are due each.
    assert rate == 30 and len(found) >= 12


def test_no_such_camera(cfg, frames, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mit_semseg.dataset.clips.cv2.VideoCapture", Camera(frames))
    (result,) = predict_videos(Options.read(cfg), ["7"], CPU, result=tmp_path)
    assert result["error"].startswith("camera 7: cannot be opened; is it connected")
    assert "failed: 7: camera 7: cannot be opened" in capsys.readouterr().out


def test_which_inputs_are_videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").write_text("a file")
    for name in ("b.mp4", "a.mp4"):
        (tmp_path / name).touch()
    videos = ["x.MP4", "0", "rtsp://host/a", "http://host/a.webm?b=c.jpg", "*.mp4", "no/*.avi"]
    images = ["a.jpg", "3", "-", "http://host/a.jpg?v=b.mp4", "folder", "anim.gif"]
    assert all(map(is_video, videos)) and not any(map(is_video, images))
    assert split_videos([*images, *videos]) == (
        images,
        ["x.MP4", "0", "rtsp://host/a", "http://host/a.webm?b=c.jpg", "a.mp4", "b.mp4", "no/*.avi"],
    )


# ------------------------------------------------------------------------------ the command
def test_the_command(cfg, clip, frames, tmp_path, monkeypatch, capsys):
    """A video and an image; a missing and a damaged one do not stop them; status 1."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(frames[0]).save("photo.png")
    Path("bad.mp4").write_bytes(b"no video")
    words = ["photo.png", str(clip), "bad.mp4", "none.avi", "--cfg", cfg.DIR, "--gpu", "cpu"]
    status = main(["predict", *words, "TEST.result", "out", "TEST.smooth", "0.5"])
    output = capsys.readouterr().out
    assert status == 1 and "1 image segmented" in output
    assert "failed: bad.mp4: cannot be opened; not a video" in output
    assert "failed: none.avi: no such file" in output
    assert sorted(os.listdir("out")) == [
        *("photo.png", "photo_legend.png", "street.mp4", "street_legend.png")
    ]
    assert len(read_back("out/street.mp4")[0]) == 14
    # The file itself is never overwritten.
    before = clip.read_bytes()
    assert main(["predict", str(clip), "--cfg", cfg.DIR, "TEST.result", str(clip.parent)]) == 0
    assert clip.read_bytes() == before and (clip.parent / "street_mp4.mp4").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_video_can_be_played(cfg, clip, tmp_path, sent):
    script = f"""
import sys, time
from mit_semseg.engine.predictor import Predictor
logits = Predictor.logits
def slowly(self, scales):
    time.sleep(0.3)
    return logits(self, scales)
Predictor.logits = slowly
from mit_semseg.cli import main
words = ["--cfg", {cfg.DIR!r}, "--gpu", "cpu", "TEST.result", "out"]
sys.exit(main(["predict", {str(clip)!r}, *words]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    path, deadline = tmp_path / "out" / "street.mp4", time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(sent)
    assert process.wait(60) == 130
    found, rate = read_back(path)
    assert 1 <= len(found) < 14 and rate == FPS


# ------------------------------------------------------------------------------ files
def test_damaged_files(clip, tmp_path, caplog):
    with pytest.raises(ValueError, match="empty.mp4: cannot be opened; not a video"):
        (tmp_path / "empty.mp4").touch()
        Clip(tmp_path / "empty.mp4")
    # An AVI has its index at the end, but can be read without.
    path = tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for n in range(30):
        writer.write(np.full((48, 64, 3), 8 * n, np.uint8))
    writer.release()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with Clip(path) as opened:
        count = len(list(opened))
    assert 0 < count < 30
    if opened.count and opened.count > count + 1:
        assert f"ended after {count} frames of {opened.count}; damaged" in caplog.text


def test_odd_sizes_and_one_size(tmp_path):
    with ClipWriter(tmp_path / "odd.mp4", 10) as writer:
        writer.write(np.zeros((35, 51, 3), np.uint8))
        with pytest.raises(ValueError, match="a frame of 8x8 pixels after frames of 51x35"):
            writer.write(np.zeros((8, 8, 3), np.uint8))
    assert read_back(tmp_path / "odd.mp4")[0][0].shape == (34, 50, 3)
    with (
        pytest.raises(OSError, match="cannot be written as a video"),
        ClipWriter(tmp_path / "no" / "folder.mp4", 10) as writer,
    ):
        writer.write(np.zeros((8, 8, 3), np.uint8))


def test_only_for_models_of_colours(cfg, clip):
    changed = cfg.clone()
    changed.DATASET.depth, changed.MODEL.in_channels = True, 4
    with pytest.raises(ValueError, match="videos are RGB"):
        predict_videos(Options.read(changed), [str(clip)], CPU)


def test_the_shipped_model_on_a_street(clip, tmp_path):
    options = ["TEST.imgSizes", "(96,)", "TEST.result", str(tmp_path)]
    assert main(["predict", str(clip), "--gpu", "cpu", *options]) == 0
    # Its recipe saves colours too.
    assert len(read_back(tmp_path / "street_overlay.mp4")[0]) == 14
