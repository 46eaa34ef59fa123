"""Prediction: results against the published procedure, names that never collide, inputs kept."""

import hashlib
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import exit_codes, free_port

from mit_semseg.cli import main
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.images import load_image
from mit_semseg.dataset.loading import load_input
from mit_semseg.dataset.transforms import scaled_inputs
from mit_semseg.engine import predict as engine
from mit_semseg.engine.checkpoint import load_model
from mit_semseg.engine.inputs import find_images
from mit_semseg.engine.predict import predict
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.transfer import Threads
from mit_semseg.segmenter import Segmenter
from mit_semseg.visualize.results import save_result

CPU = torch.device("cpu")
NAMES = ("wall", "floor", "lamp", "plant")


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model):
    return make_model(tmp_path_factory.mktemp("ckpt") / "model", NAMES)


@pytest.fixture
def cfg(model):
    return model.clone()


def photo(path, size=(64, 48), mode="RGB", seed=0):
    """A blocky random picture; size is (width, height)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3)).astype(np.uint8)
    image = Image.fromarray(small.repeat(8, 0).repeat(8, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        image.convert(mode).save(path)
    return path


def photos(folder, count, sizes=((64, 48),)):
    return [photo(folder / f"{k:02}.png", sizes[k % len(sizes)], seed=k) for k in range(count)]


def run(cfg, images, out, *kinds, device=CPU, **options):
    if kinds:
        cfg.TEST.save = list(kinds)
    return predict(cfg, images, device, result=out, progress=False, **options)


def labels_of(one):
    return np.asarray(Image.open(one["outputs"]["index"]))


def published(cfg, path):
    """Mean of the scales' probabilities at full size, (K, H, W), as the published script has it."""
    module, image = load_model(cfg, "best.pth"), load_image(path)
    total = torch.zeros(1, len(NAMES), *image.shape[:2])
    with torch.no_grad():
        for x in scaled_inputs(image, cfg.DATASET):
            logits = F.interpolate(module.logits(x), image.shape[:2], mode="bilinear")
            total += torch.softmax(logits, dim=1) / len(cfg.DATASET.imgSizes)
    return total[0].numpy()


# ------------------------------------------------------------------------------ results
def test_prediction_is_the_published_procedure(cfg, tmp_path, capsys):
    path, out = photo(tmp_path / "in" / "room.jpg"), tmp_path / "out"
    scores = published(cfg, path)
    expected = scores.argmax(0)
    assert len(np.unique(expected)) >= 2, "the random model must see more than one class"
    kinds = ("color", "index", "overlay", "prob", "side", "legend")
    (one,) = run(cfg, path, out, *kinds)

    files = {kind: out / f"room_{kind}.{'npy' if kind == 'prob' else 'png'}" for kind in kinds}
    assert one["outputs"] == {kind: str(file) for kind, file in files.items()}
    stored = np.load(files["prob"], mmap_mode="r")
    assert stored.dtype == np.float16 and stored.shape == (4, 48, 64)
    np.testing.assert_allclose(stored, scores, atol=1e-3)

    index = Image.open(files["index"])
    assert index.mode == "P"
    labels = np.asarray(index).astype(int) - cfg.DATASET.label_offset
    # Where two classes are equal to rounding, either is right.
    second, first = np.sort(scores, axis=0)[-2:]
    clear = first - second > 1e-5
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(labels[clear], expected[clear])

    colors = ClassTable.load(Path(cfg.DIR) / "classes.csv").colors
    np.testing.assert_array_equal(np.asarray(index.convert("RGB")), colors[labels])
    np.testing.assert_array_equal(np.asarray(Image.open(files["color"])), colors[labels])
    side = np.asarray(Image.open(files["side"]))
    np.testing.assert_array_equal(side, np.hstack([load_image(path), colors[labels]]))
    overlay = np.asarray(Image.open(files["overlay"])).astype(float)
    half = (load_image(path).astype(float) + colors[labels]) / 2
    assert np.abs(overlay - half).max() <= 1
    assert Image.open(files["legend"]).mode == "RGB"

    shares = {NAMES[k]: float((labels == k).mean()) for k in range(4) if (labels == k).any()}
    assert one["areas"] == pytest.approx(shares)
    assert list(one["areas"].values()) == sorted(one["areas"].values(), reverse=True)
    printed = capsys.readouterr().out
    assert f"Predictions in [{path}]:" in printed
    for name, share in shares.items():
        assert (f"  {name}: {100 * share:.2f}%" in printed) == (100 * share > 0.1)
    assert "48x32" in printed and "64x48" in printed, "the time of each scale is printed"


def test_prediction_scales_and_flip_override_the_data_set(cfg, tmp_path):
    path, turned = photo(tmp_path / "a.png"), tmp_path / "turned.png"
    single = cfg.clone()
    single.DATASET.imgSizes = [40]
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(turned)
    both = (published(single, path) + published(single, turned)[:, :, ::-1]) / 2
    cfg.TEST.imgSizes, cfg.TEST.flip = [40], True
    run(cfg, path, tmp_path / "out", "prob")
    np.testing.assert_allclose(np.load(tmp_path / "out" / "a.npy"), both, atol=1e-3)


def test_batches_lose_no_image(cfg, tmp_path):
    images = photos(tmp_path / "in", 5, [(64, 48), (48, 64), (64, 48), (64, 48), (72, 40)])
    single = run(cfg, tmp_path / "in", tmp_path / "a", "index")
    cfg.TEST.batch_size = 4
    batched = run(cfg, tmp_path / "in", tmp_path / "b")
    assert [Path(one["image"]) for one in batched] == images
    for one, other in zip(single, batched, strict=True):
        a, b = labels_of(one), labels_of(other)
        assert a.shape == b.shape and (a == b).mean() > 0.99


def test_every_mode_and_extension(cfg, tmp_path):
    for name, mode in [
        *(("a.JPG", "RGB"), ("b.png", "RGBA"), ("c.png", "P"), ("d.tif", "I;16")),
        *(("e.bmp", "L"), ("f.jpeg", "CMYK"), ("g.webp", "RGB"), ("h.gif", "P")),
    ]:
        photo(tmp_path / "in" / name, mode=mode)
    results = run(cfg, tmp_path / "in", tmp_path / "out", "index")
    assert [Path(one["image"]).name[0] for one in results] == list("abcdefgh")
    assert all("error" not in one for one in results)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{x}.png" for x in "abcdefgh"]


def test_images_may_be_computed_in_tiles(cfg, tmp_path):
    path = photo(tmp_path / "a.png", (160, 120))
    cfg.TEST.imgSizes, cfg.DATASET.imgMaxSize = [240], 320
    labels = {}
    for tile in ("off", "auto", 64, 320):
        cfg.TEST.tile = tile
        (one,) = run(cfg, path, tmp_path / str(tile), "index")
        labels[tile] = labels_of(one)
    for tile in ("auto", 320):
        np.testing.assert_array_equal(labels[tile], labels["off"])
    assert (labels[64] != labels["off"]).any()  # a random network, and tiles that see little


# ------------------------------------------------------------------------------ bad images
def test_a_bad_image_is_reported_and_does_not_stop_the_others(cfg, tmp_path, capsys):
    image = photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(image.read_bytes()[:60])
    (tmp_path / "c.jpg").write_text("no picture")
    photo(tmp_path / "d.png")
    results = run(cfg, tmp_path, tmp_path / "out")
    assert ["error" in one for one in results] == [False, True, True, False]
    assert "b.png" in results[1]["error"] and "c.jpg" in results[2]["error"]
    printed = capsys.readouterr().out
    assert "2 images segmented" in printed and "2 of 4 images failed" in printed
    assert (tmp_path / "out" / "d.png").is_file()


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_is_reported_with_its_image(cfg, tmp_path, monkeypatch, error):
    """Last of all, after tiles and the CPU; torch's error on the CPU has no type of its own."""
    plain, calls = Predictor.logits, []

    def scarce(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return plain(*args, **kwargs)

    monkeypatch.setattr(Predictor, "logits", scarce)
    photos(tmp_path, 2)
    results = run(cfg, tmp_path, tmp_path / "out")
    assert results[0]["error"].startswith("out of memory: lower DATASET.imgMaxSize")
    assert "error" not in results[1]

    def broken(*args, **kwargs):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Predictor, "logits", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(cfg, tmp_path, tmp_path / "out")


def test_what_cannot_be_written_is_reported_with_its_image(cfg, tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    photos(tmp_path / "in", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "01_legend.png").symlink_to("/dev/full")
    results = run(cfg, tmp_path / "in", tmp_path / "out", "color", "legend")
    assert ["error" in one for one in results] == [False, True, False]
    assert "No space left on device" in results[1]["error"]
    assert "01_legend.png" in results[1]["error"]
    printed = capsys.readouterr().out
    assert "1 of 3 images failed" in printed and "2 images segmented" in printed


def test_bad_settings_are_refused(cfg, tmp_path):
    path = photo(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"epoch_3\.pth.*best\.pth"):
        run(cfg, path, tmp_path, checkpoint="epoch_3.pth")
    with pytest.raises(ValueError, match="device is empty"):
        run(cfg, path, tmp_path, device=[])
    with pytest.raises(ValueError, match=r"TEST\.save.*colour.*any of color, index"):
        run(cfg, path, tmp_path, "colour")


# ------------------------------------------------------------------------------ the pipeline
@pytest.fixture
def several_writers(monkeypatch):
    """More threads than a CPU gets."""
    threads = Threads(readers=2, writers=3)
    monkeypatch.setattr(Threads, "of", lambda device, processes: threads)
    return threads


def test_large_images_are_not_read_while_others_are_computed(cfg, tmp_path, monkeypatch):
    plain, busy, seen = Predictor.logits, [], []

    def computing(*args, **kwargs):
        busy.append(1)
        time.sleep(0.05)
        done = plain(*args, **kwargs)
        busy.clear()
        return done

    def reading(*args):
        seen.append(bool(busy))
        return load_input(*args)

    monkeypatch.setattr(engine, "_LARGE", 64 * 48 - 1)
    monkeypatch.setattr(Predictor, "logits", computing)
    monkeypatch.setattr(engine, "load_input", reading)
    photos(tmp_path / "in", 4)
    run(cfg, tmp_path / "in", tmp_path / "out")
    assert seen == [False] * 4


@pytest.mark.usefixtures("several_writers")
def test_one_thread_computes_and_others_write_in_order(cfg, tmp_path, monkeypatch, capsys):
    images = photos(tmp_path / "in", 8)
    threads = {"read": set(), "logits": set(), "labels": set(), "write": set()}
    written, another = [], threading.Event()

    def watched(name, function):
        def call(*args, **kwargs):
            threads[name].add(threading.get_ident())
            return function(*args, **kwargs)

        return call

    def slow(path, *args):
        if path.name == "00.png":
            assert another.wait(20), "no other thread writes"
        save_result(path, *args)
        written.append(path.name)
        another.set()

    monkeypatch.setattr(engine, "load_input", watched("read", load_input))
    monkeypatch.setattr(engine, "save_result", watched("write", slow))
    for name in ("logits", "labels"):
        monkeypatch.setattr(Predictor, name, watched(name, getattr(Predictor, name)))
    results = run(cfg, tmp_path / "in", tmp_path / "out", "color")
    assert [Path(one["image"]) for one in results] == images
    assert sorted(written) == [image.name for image in images] and written[0] != "00.png"
    printed = re.findall(r"Predictions in \[(.*)\]", capsys.readouterr().out)
    assert printed == [str(image) for image in images]
    assert threads["logits"] == threads["labels"] == {threading.get_ident()}
    assert len(threads["write"]) > 1 and not threads["write"] & threads["read"]
    assert threading.get_ident() not in threads["write"] | threads["read"]


def test_reading_ahead_of_writing_is_bounded(cfg, tmp_path, monkeypatch, several_writers):
    photos(tmp_path / "in", 24)
    counts, most = {"read": 0, "written": 0}, [0]

    def reading(*args):
        counts["read"] += 1
        most[0] = max(most[0], counts["read"] - counts["written"])
        return load_input(*args)

    def writing(*args):
        time.sleep(0.1)
        counts["written"] += 1

    monkeypatch.setattr(engine, "load_input", reading)
    monkeypatch.setattr(engine, "save_result", writing)
    run(cfg, tmp_path / "in", tmp_path / "out", "color")
    assert most[0] <= several_writers.held + 1 < 24
    # So many pixels, however many images that is.
    counts.update(read=0, written=0)
    most[0] = 0
    monkeypatch.setattr(engine, "_IN_MEMORY", 3 * 64 * 48)
    run(cfg, tmp_path / "in", tmp_path / "out", "color")
    assert most[0] == 3


@pytest.mark.usefixtures("several_writers")
@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError, KeyboardInterrupt])
def test_errors_of_writers(cfg, tmp_path, monkeypatch, error):
    """Too little memory is one image's; anything else ends the run, and all its threads."""

    def broken(path, *args):
        if path.name == "03.png":
            raise error("while drawing")

    photos(tmp_path / "in", 9)
    monkeypatch.setattr(engine, "save_result", broken)
    threads = threading.active_count()
    if error is MemoryError:
        (failed,) = [one for one in run(cfg, tmp_path / "in", tmp_path, "color") if "error" in one]
        assert failed["error"].startswith("out of memory: lower")
    else:
        with pytest.raises(error, match="while drawing"):
            run(cfg, tmp_path / "in", tmp_path, "color")
    assert threading.active_count() == threads


def test_control_c_ends_all_threads(cfg, tmp_path, monkeypatch):
    plain, calls = Predictor.logits, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return plain(*args)

    photos(tmp_path / "in", 9)
    monkeypatch.setattr(Predictor, "logits", interrupted)
    # Readers wait for memory, which nobody gives back any more.
    monkeypatch.setattr(engine, "_LARGE", 0)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path / "in", tmp_path / "out")
    assert threading.active_count() == threads


# ------------------------------------------------------------------------------ processes
@pytest.mark.usefixtures("forked")
def test_several_devices_share_the_images(cfg, tmp_path, capsys):
    photos(tmp_path / "in", 5, [(64, 48), (48, 64), (64, 48), (72, 40), (64, 48)])
    (tmp_path / "in" / "05.png").write_text("no picture")
    one, two = (
        run(cfg, tmp_path / "in", tmp_path / str(len(devices)), "index", device=devices)
        for devices in ([CPU], [CPU, CPU])
    )
    assert [x["image"] for x in two] == [x["image"] for x in one]
    assert ["error" in x for x in two] == [False] * 5 + [True]
    assert two[5]["error"] == one[5]["error"]
    for a, b in zip(one[:5], two[:5], strict=True):
        assert (labels_of(a) == labels_of(b)).mean() > 0.99
    output = capsys.readouterr().out
    assert re.findall(r"Predictions in \[.*0(\d)\.png\]", output) == list("01234") * 2
    assert output.count("5 images segmented") == output.count("1 of 6 images failed") == 2


@pytest.mark.usefixtures("forked")
def test_a_device_that_dies_ends_the_run(cfg, tmp_path):
    photos(tmp_path / "in", 40)

    def kill_one():
        while not (alive := multiprocessing.active_children()):
            time.sleep(0.01)
        os.kill(alive[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ChildProcessError, match=r"SIGKILL.* while working on .*\.png"):
        run(cfg, tmp_path / "in", tmp_path / "out", device=[CPU, CPU])
    killer.join()
    assert not multiprocessing.active_children()


def rank(number, port, log, words):
    os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    raise SystemExit(main(words))


def test_ranks_share_the_images(cfg, tmp_path):
    """By the command line; the results lie among the images, where other ranks look for some."""
    photos(tmp_path / "in", 5)
    (tmp_path / "in" / "x.png").write_text("no picture")
    words = ["predict", "--gpu", "cpu", "--cfg", f"{cfg.DIR}/config.yaml", "--imgs"]
    words += [str(tmp_path / "in"), "TEST.result", str(tmp_path / "in"), "TEST.save", "['index']"]
    codes = exit_codes(rank, 2, free_port(), tmp_path / "log.txt", words)
    assert codes == [1, 1], "an image failed"
    output = (tmp_path / "log.txt").read_text()
    assert output.count("5 images segmented") == 1 and output.count("1 of 6 images failed") == 1
    assert sorted(re.findall(r"Predictions in \[.*/0(.)\.png\]", output)) == list("01234")
    written = sorted(path.name for path in (tmp_path / "in").glob("*_png.png"))
    assert written == [f"0{k}_png.png" for k in range(5)]


@pytest.mark.gpu
def test_a_folder_on_a_gpu_is_what_segmenter_says(cfg, tmp_path):
    images = photos(tmp_path / "in", 24, [(64, 48), (48, 64), (64, 48), (160, 120)])
    device = torch.device("cuda:0")
    results = run(cfg, tmp_path / "in", tmp_path / "out", "index", device=device)
    segmenter = Segmenter.from_checkpoint(cfg.DIR, device=device)
    for one, image in zip(results, images, strict=True):
        labels, expected = labels_of(one), segmenter(image).labels + cfg.DATASET.label_offset
        # Kernels may be chosen anew for each call: labels differ where classes tie.
        assert labels.shape == expected.shape and (labels == expected).mean() > 0.995
        assert one["seconds"] > 0


# ------------------------------------------------------------------------------ names
def test_no_input_is_ever_overwritten(cfg, tmp_path, monkeypatch):
    """As published: PNG inputs in the working folder, results written to `./`."""
    monkeypatch.chdir(tmp_path)

    def digests():
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs]

    inputs = [photo(tmp_path / name, seed=k) for k, name in enumerate(["x.png", "x.jpg", "y.PNG"])]
    before = digests()
    results = predict(cfg, ".", CPU, progress=False)
    assert digests() == before
    assert [Path(one["image"]).name for one in results] == ["x.jpg", "x.png", "y.PNG"]
    outputs = [Path(one["outputs"]["side"]).name for one in results]
    assert outputs == ["x_jpg.png", "x_png.png", "y_PNG.png"]


def test_relative_paths_are_kept(cfg, tmp_path):
    for name in ("one/x.png", "two/deep/x.png", "x.jpg"):
        photo(tmp_path / "in" / name)
    out = tmp_path / "in" / "out"
    run(cfg, tmp_path / "in", out)
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    pictures = ["one/x.png", "two/deep/x.png", "x.png"]
    assert found == sorted(pictures + [p.replace(".png", "_legend.png") for p in pictures])
    # Results inside the given folder are no images of the next run.
    files, _ = find_images(tmp_path / "in", skip=out)
    assert len(files) == 3
