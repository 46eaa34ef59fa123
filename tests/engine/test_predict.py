"""Prediction: results against the published procedure, names that never collide, inputs kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mit_semseg.config.node import Config
from mit_semseg.dataset import ClassTable
from mit_semseg.dataset.transforms import load_image, scaled_inputs
from mit_semseg.engine import predict as engine
from mit_semseg.engine.checkpoint import load_model
from mit_semseg.engine.inputs import find_images, output_stems, result_endings
from mit_semseg.engine.predict import predict
from mit_semseg.engine.predictor import Predictor
from mit_semseg.visualize import results as drawing
from mit_semseg.visualize.results import areas, index_image, render

CPU = torch.device("cpu")
NAMES = ("wall", "floor", "lamp", "plant")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Config]) -> Config:
    return make_model(tmp_path_factory.mktemp("ckpt") / "model", NAMES)


def photo(path: Path, size: tuple[int, int] = (64, 48), mode: str = "RGB", seed: int = 0) -> Path:
    """A blocky random picture; size is (width, height)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3)).astype(np.uint8)
    image = Image.fromarray(small.repeat(8, 0).repeat(8, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(path)
    else:
        image.convert(mode).save(path)
    return path


def published(cfg: Config, path: Path) -> np.ndarray:
    """Mean of the scales' probabilities at full size, (K, H, W), as the published script has it."""
    module = load_model(cfg, "best.pth")
    image = load_image(path)
    height, width = image.shape[:2]
    total = torch.zeros(1, len(NAMES), height, width)
    with torch.no_grad():
        for x in scaled_inputs(image, cfg.DATASET):
            logits = F.interpolate(
                module.logits(x), (height, width), mode="bilinear", align_corners=False
            )
            total += torch.softmax(logits, dim=1) / len(cfg.DATASET.imgSizes)
    return total[0].numpy()


def with_save(cfg: Config, *kinds: str) -> Config:
    changed = cfg.clone()
    changed.TEST.save = list(kinds)
    return changed


# ------------------------------------------------------------------------------ results
def test_prediction_is_the_published_procedure(
    cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photo(tmp_path / "in" / "room.jpg")
    scores = published(cfg, path)
    expected = scores.argmax(0)
    assert len(np.unique(expected)) >= 2, "the random model must see more than one class"
    kinds = ("color", "index", "overlay", "prob", "side", "legend")
    (one,) = predict(with_save(cfg, *kinds), path, CPU, result=tmp_path / "out", progress=False)

    out = tmp_path / "out"
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
    np.testing.assert_array_equal(side[:, :64], load_image(path))
    np.testing.assert_array_equal(side[:, 64:], colors[labels])
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


def test_settings_of_the_prediction_are_its_own(cfg: Config, tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    changed = with_save(cfg, "prob")
    changed.TEST.imgSizes = [40]
    changed.TEST.flip = True
    predict(changed, path, CPU, result=tmp_path / "out", progress=False)
    stored = np.load(tmp_path / "out" / "a.npy")
    single = cfg.clone()
    single.DATASET.imgSizes = [40]
    turned = tmp_path / "turned.png"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(turned)
    both = (published(single, path) + published(single, turned)[:, :, ::-1]) / 2
    np.testing.assert_allclose(stored, both, atol=1e-3)


def test_batches_lose_no_image(cfg: Config, tmp_path: Path) -> None:
    for k, size in enumerate([(64, 48), (48, 64), (64, 48), (64, 48), (72, 40)]):
        photo(tmp_path / "in" / f"{k}.png", size, seed=k)
    changed = with_save(cfg, "index")
    single = predict(changed, tmp_path / "in", CPU, result=tmp_path / "a", progress=False)
    changed.TEST.batch_size = 4
    batched = predict(changed, tmp_path / "in", CPU, result=tmp_path / "b", progress=False)
    assert [Path(one["image"]).name for one in batched] == [f"{k}.png" for k in range(5)]
    for one, other in zip(single, batched, strict=True):
        a, b = (np.asarray(Image.open(x["outputs"]["index"])) for x in (one, other))
        assert a.shape == b.shape and (a == b).mean() > 0.99


def test_every_mode_and_extension(cfg: Config, tmp_path: Path) -> None:
    for name, mode in [
        *(("a.JPG", "RGB"), ("b.png", "RGBA"), ("c.png", "P"), ("d.tif", "I;16")),
        *(("e.bmp", "L"), ("f.jpeg", "CMYK"), ("g.webp", "RGB"), ("h.gif", "P")),
    ]:
        photo(tmp_path / "in" / name, mode=mode)
    results = predict(
        with_save(cfg, "index"), tmp_path / "in", CPU, result=tmp_path / "out", progress=False
    )
    assert [Path(one["image"]).name[0] for one in results] == list("abcdefgh")
    assert all("error" not in one for one in results)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{x}.png" for x in "abcdefgh"]


def test_bad_image_is_reported_and_does_not_stop_the_others(
    cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "c.jpg").write_text("no picture")
    photo(tmp_path / "d.png")
    results = predict(cfg, tmp_path, CPU, result=tmp_path / "out", progress=False)
    assert ["error" in one for one in results] == [False, True, True, False]
    assert "b.png" in results[1]["error"] and "c.jpg" in results[2]["error"]
    printed = capsys.readouterr().out
    assert "2 images parsed" in printed and "2 of 4 images failed" in printed
    assert (tmp_path / "out" / "d.png").is_file()


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, MemoryError, RuntimeError])
def test_what_no_memory_is_enough_for_is_reported(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Last of all, after tiles and the CPU; torch's error on the CPU has no type of its own."""
    plain, calls = Predictor.logits, []

    def scarce(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return plain(*args, **kwargs)

    monkeypatch.setattr(Predictor, "logits", scarce)
    for name in "ab":
        photo(tmp_path / f"{name}.png")
    results = predict(cfg, tmp_path, CPU, result=tmp_path / "out", progress=False)
    assert results[0]["error"].startswith("out of memory: lower DATASET.imgMaxSize")
    assert "error" not in results[1]


def test_other_errors_are_not_taken_for_want_of_memory(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Predictor, "logits", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        predict(cfg, photo(tmp_path / "a.png"), CPU, result=tmp_path / "out", progress=False)


def test_images_may_be_computed_in_tiles(cfg: Config, tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png", (160, 120))
    changed = with_save(cfg, "index")
    changed.TEST.imgSizes, changed.DATASET.imgMaxSize = [240], 320
    labels = {}
    for tile in ("off", "auto", 64, 320):
        changed.TEST.tile = tile
        (one,) = predict(changed, path, CPU, result=tmp_path / str(tile), progress=False)
        labels[tile] = np.asarray(Image.open(one["outputs"]["index"]))
    np.testing.assert_array_equal(labels["auto"], labels["off"])
    np.testing.assert_array_equal(labels[320], labels["off"])
    assert (labels[64] != labels["off"]).any()  # a random network, and tiles that see little


def test_large_images_are_not_read_while_others_are_computed(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_LARGE", 64 * 48 - 1)
    plain, busy, seen = Predictor.logits, [], []

    def computing(*args: Any, **kwargs: Any) -> Any:
        busy.append(1)
        time.sleep(0.05)
        done = plain(*args, **kwargs)
        busy.clear()
        return done

    def reading(path: Path) -> np.ndarray:
        seen.append(bool(busy))
        return load_image(path)

    monkeypatch.setattr(Predictor, "logits", computing)
    monkeypatch.setattr(engine, "load_image", reading)
    for k in range(4):
        photo(tmp_path / "in" / f"{k}.png", seed=k)
    predict(cfg, tmp_path / "in", CPU, result=tmp_path / "out", progress=False)
    assert seen == [False] * 4


# ------------------------------------------------------------------------------ names
def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_input_is_ever_overwritten(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As published: PNG inputs in the working folder, results written to `./`."""
    monkeypatch.chdir(tmp_path)
    inputs = [photo(tmp_path / name, seed=k) for k, name in enumerate(["x.png", "x.jpg", "y.PNG"])]
    before = [digest(path) for path in inputs]
    results = predict(cfg, ".", CPU, progress=False)
    assert [digest(path) for path in inputs] == before
    outputs = [Path(one["outputs"]["side"]).name for one in results]
    assert [Path(one["image"]).name for one in results] == ["x.jpg", "x.png", "y.PNG"]
    assert outputs == ["x_jpg.png", "x_png.png", "y_PNG.png"]


def test_relative_paths_are_kept(cfg: Config, tmp_path: Path) -> None:
    photo(tmp_path / "in" / "one" / "x.png")
    photo(tmp_path / "in" / "two" / "deep" / "x.png")
    photo(tmp_path / "in" / "x.jpg")
    predict(cfg, tmp_path / "in", CPU, result=tmp_path / "in" / "out", progress=False)
    out = tmp_path / "in" / "out"
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png"))
    pictures = ["one/x.png", "two/deep/x.png", "x.png"]
    assert found == sorted(pictures + [p.replace(".png", "_legend.png") for p in pictures])
    # Results inside the given folder are no images of the next run.
    files, _ = find_images(tmp_path / "in", skip=out)
    assert len(files) == 3


@pytest.mark.parametrize(
    ("files", "endings", "expected"),
    [
        (["a.jpg", "b.png"], [".png"], ["a", "b"]),
        (["a.jpg", "a.png", "a.tif"], [".png"], ["a_jpg", "a_png", "a_tif"]),
        (["s/a.jpg", "t/a.jpg"], [".png"], ["s/a", "t/a"]),
        (["A.jpg", "a.jpg"], [".png"], ["A_jpg", "a_jpg_2"]),
        # `a.jpg` and its legend beside an image of that very name.
        (["a.jpg", "a_legend.jpg"], [".png", "_legend.png"], ["a", "a_legend_jpg"]),
        (["a_color.jpg", "a.jpg"], ["_color.png", "_index.png"], ["a_color", "a"]),
        (["a"], [".png"], ["a"]),
    ],
)
def test_names(tmp_path: Path, files: list[str], endings: list[str], expected: list[str]) -> None:
    stems = output_stems([tmp_path / f for f in files], tmp_path, tmp_path / "out", endings)
    assert stems == [tmp_path / "out" / x for x in expected]
    results = {f"{stem}{end}".casefold() for stem in stems for end in endings}
    assert len(results) == len(stems) * len(endings)


def test_result_through_a_link_to_an_input_is_refused_too(tmp_path: Path) -> None:
    image = photo(tmp_path / "in" / "a.png")
    (tmp_path / "out").symlink_to(tmp_path / "in")
    (stem,) = output_stems([image], tmp_path / "in", tmp_path / "out", [".png"])
    assert stem.name == "a_png"


def test_endings() -> None:
    assert result_endings(["side"]) == {"side": ".png"}
    assert result_endings(["prob"]) == {"prob": ".npy"}
    assert result_endings(["side", "legend"]) == {"side": ".png", "legend": "_legend.png"}
    assert result_endings(["color", "prob"]) == {"color": "_color.png", "prob": "_prob.npy"}


# ------------------------------------------------------------------------------ finding
def test_find_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = photo(tmp_path / "s" / "a.JPG"), photo(tmp_path / "s" / "t" / "b.tiff")
    odd = tmp_path / "s" / "c.data"
    odd.write_bytes(a.read_bytes())
    (tmp_path / "s" / ".hidden.png").write_bytes(a.read_bytes())
    assert find_images(tmp_path / "s") == ([a, b], tmp_path / "s")
    assert find_images(str(tmp_path / "s" / "**" / "*.*")) == ([a, b], tmp_path / "s")
    assert find_images(odd) == ([odd], tmp_path / "s"), "a file that is named is taken"
    assert find_images([a, b, a, tmp_path / "s"]) == ([a, b], tmp_path / "s")
    monkeypatch.chdir(tmp_path / "s")
    assert find_images("*.JPG") == ([Path("a.JPG")], tmp_path / "s")
    # A name with brackets is that file before it is a pattern.
    odd_name = photo(tmp_path / "s" / "u" / "img[1].png")
    assert find_images(odd_name)[0] == [odd_name]


def test_nothing_found_says_what_is_there(tmp_path: Path) -> None:
    for k in range(12):
        (tmp_path / f"{k}.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"found 0 images; saw 12 \.txt"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg: no such file or folder"):
        find_images(tmp_path / "nowhere.jpg")
    with pytest.raises(FileNotFoundError, match=r"\*\.jpg: found 0 images; saw no files"):
        find_images(str(tmp_path / "*.jpg"))


def test_bad_settings_are_refused(cfg: Config, tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"TEST\.save.*colour.*choose from color, index"):
        predict(with_save(cfg, "colour"), path, CPU, result=tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match=r"epoch_3\.pth.*best\.pth"):
        predict(cfg, path, CPU, checkpoint="epoch_3.pth", result=tmp_path, progress=False)


# ------------------------------------------------------------------------------ pieces
@pytest.mark.parametrize("kind", ["color", "overlay", "side"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_pictures_in_bands_are_the_same(
    kind: str, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 20, 3)).astype(np.uint8)
    labels = rng.integers(0, 4, (37, 20)).astype(dtype)
    table = ClassTable.of(NAMES)
    whole = render(kind, image, labels, table)
    shares = areas(labels, NAMES)
    monkeypatch.setattr(drawing, "_BAND", 100)
    np.testing.assert_array_equal(np.asarray(render(kind, image, labels, table)), np.asarray(whole))
    assert (
        areas(labels, NAMES)
        == shares
        == {NAMES[k]: pytest.approx((labels == k).mean()) for k in range(4)}
    )


def test_areas_by_hand() -> None:
    labels = np.array([[0, 0, 2, 2], [2, 2, 2, 2], [1, 3, -1, 2]])
    found = areas(labels, ["wall", "lamp", "floor", "lamp"])
    assert list(found.items()) == [
        *(("floor", pytest.approx(7 / 12)), ("wall", pytest.approx(2 / 12))),
        ("lamp", pytest.approx(2 / 12)),
    ]


@pytest.mark.parametrize(("count", "offset"), [(3, 0), (3, 1), (255, 1), (300, 0), (256, 1)])
def test_index_files_hold_class_ids(tmp_path: Path, count: int, offset: int) -> None:
    labels = np.arange(count).reshape(1, -1)
    colors = np.random.default_rng(0).integers(0, 256, (count, 3)).astype(np.uint8)
    index_image(labels, colors, offset).save(tmp_path / "i.png")
    image = Image.open(tmp_path / "i.png")
    np.testing.assert_array_equal(np.asarray(image).astype(int), labels + offset)
    if count + offset <= 256:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[0], colors)


def test_unknown_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="'outline' is no kind"):
        render("outline", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), int), ClassTable.of("ab"))
