"""Masks, polygons, probabilities and pictures of a result, against other libraries."""

import io
import json

import cv2
import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage, special

from mit_semseg.dataset import ClassTable
from mit_semseg.result import Result
from mit_semseg.segmenter import Segmenter

NAMES = ("wall", "floor", "lamp", "plant")


def labels_of(number):
    """Noise, or smooth shapes, with holes, pixels without a class and other sizes each time."""
    rng = np.random.default_rng(number)
    H, W = (int(n) for n in rng.integers(1, 40, 2))
    if number % 2:
        return rng.integers(-1, 3, (H, W))
    coarse = rng.integers(-1, 5, (8, 8)).astype(np.float32)
    return cv2.resize(coarse, (W, H), interpolation=cv2.INTER_CUBIC).round().astype(int).clip(-1, 3)


def result_of(labels, **fields):
    image = np.full((*labels.shape, 3), 90, dtype=np.uint8)
    return Result(image, labels.astype(np.int64), ClassTable.of(NAMES), **fields)


@pytest.mark.parametrize("number", range(30))
def test_polygons_are_the_pixels_by_cocos_api(number, tmp_path, capsys):
    labels = labels_of(number)
    path = result_of(labels).save(tmp_path / "x.json")
    coco = COCO(path)
    assert [cat["name"] for cat in coco.loadCats(coco.getCatIds())] == list(NAMES)
    back = np.full(labels.shape, -1)
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(annotation).astype(bool)
        assert (back[mask] == -1).all()  # they do not overlap
        back[mask] = annotation["category_id"] - 1
        assert annotation["area"] == mask.sum()
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert annotation["bbox"] == coco_mask.toBbox(encoded).tolist()
    np.testing.assert_array_equal(back, labels)
    regions = sum(ndimage.label(labels == k)[1] for k in range(len(NAMES)))
    assert len(coco.getAnnIds()) == regions


@pytest.mark.parametrize("number", range(30))
def test_features_are_the_pixels_by_gdal(number):
    features = pytest.importorskip("rasterio.features")
    labels = labels_of(number)
    found = result_of(labels).geojson()
    back = np.full(labels.shape, -1)
    for feature in json.loads(json.dumps(found))["features"]:
        assert features.is_valid_geom(feature["geometry"])
        mask = features.rasterize([feature["geometry"]], labels.shape).astype(bool)
        assert feature["properties"]["pixels"] == mask.sum()
        back[mask] = feature["properties"]["class_id"]
        outline, *holes = feature["geometry"]["coordinates"]
        assert doubled_area(outline) > 0 and all(doubled_area(hole) < 0 for hole in holes)
    np.testing.assert_array_equal(back, labels)
    # GDAL's own polygons of the same label map: as many, with equal areas.
    known = (labels >= 0).astype(np.uint8)
    theirs = features.shapes(labels.astype(np.int16), known, connectivity=4)
    areas = [sum(map(doubled_area, geometry["coordinates"])) for geometry, _ in theirs]
    ours = [2 * feature["properties"]["pixels"] for feature in found["features"]]
    assert sorted(map(abs, areas)) == sorted(ours)


def doubled_area(ring):
    x, y = np.array(ring).T
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))


def test_a_ring_by_hand():
    labels = np.zeros((4, 5), dtype=int)
    labels[1:4, 1:4] = 1
    labels[2, 2] = -1
    result = result_of(labels)
    (ring,) = (f for f in result.geojson()["features"] if f["properties"]["class"] == "floor")
    assert ring["properties"]["color"] == "#{:02x}{:02x}{:02x}".format(*result.classes.colors[1])
    outline, hole = ring["geometry"]["coordinates"]
    assert {tuple(p) for p in outline} == {(1, 1), (4, 1), (4, 4), (1, 4)}
    assert {tuple(p) for p in hole} == {(2, 2), (3, 2), (3, 3), (2, 3)}
    assert outline[0] == outline[-1] and len(outline) == len(hole) == 5
    one = result.coco(min_area=9)["annotations"]
    assert [a["category_id"] for a in one] == [1]
    assert result.geojson(min_area=100)["features"] == []
    assert result_of(np.full((2, 2), -1)).coco()["annotations"] == []


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32633"])
def test_features_of_a_geotiff_are_in_degrees(crs, tmp_path, make_model):
    rasterio = pytest.importorskip("rasterio")
    from rasterio import features, warp

    path = tmp_path / "field.tif"
    size = 0.25 if crs == "EPSG:32633" else 1e-5
    corner = (500000.0, 5400000.0) if crs == "EPSG:32633" else (15.0, 48.75)
    transform = rasterio.transform.from_origin(*corner, size, size)
    labels = labels_of(4)
    H, W = labels.shape
    with rasterio.open(
        path, "w", "GTiff", width=W, height=H, count=3, dtype="uint8", crs=crs, transform=transform
    ) as file:
        file.write(np.zeros((3, H, W), np.uint8))
    back = np.full(labels.shape, -1)
    for feature in result_of(labels, source=path).geojson()["features"]:
        x, y = np.array(feature["geometry"]["coordinates"][0]).T
        assert np.allclose(x, 15, atol=1e-3) and np.allclose(y, 48.75, atol=5e-3)
        projected = warp.transform_geom("EPSG:4326", crs, feature["geometry"])
        mask = features.rasterize([projected], labels.shape, transform=transform).astype(bool)
        back[mask] = feature["properties"]["class_id"]
    np.testing.assert_array_equal(back, labels)


def test_a_geotiff_without_rasterio_says_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    labels = np.zeros((2, 2), int)
    Image.new("RGB", (2, 2)).save(path)
    missing = ValueError("no rasterio")
    monkeypatch.setattr(
        "mit_semseg.dataset.rasters.load_rasterio", lambda: (_ for _ in ()).throw(missing)
    )
    assert result_of(labels, source=path).geojson()["features"]
    Image.new("RGB", (2, 2)).save(path, tiffinfo={34735: (1, 1, 0, 0)})
    with pytest.raises(ValueError, match=r"a.tif is georeferenced.*mit_semseg\[geo\]"):
        result_of(labels, source=path).geojson()


def test_masks_by_name():
    labels = np.array([[0, 1], [2, -1]])
    result = result_of(labels)
    assert result.mask("floor").tolist() == result.mask(1).tolist() == [[False, True], [False] * 2]
    for wrong, advice in (("flor", "did you mean floor?"), (4, "see Result.names"), (-1, "names")):
        with pytest.raises(ValueError, match=f"there is no class .*{advice}"):
            result.mask(wrong)
    twins = Result(result.image, labels, ClassTable.of(["a", "b", "a"]))
    assert twins.mask("a").tolist() == [[True, False], [True, False]]


def test_numbers_as_json():
    labels = np.array([[0, 1, 1], [2, -1, 1]])
    result = result_of(labels)
    content = json.loads(result.to_json())
    assert content == result.to_dict()
    assert content["source"] is None and (content["width"], content["height"]) == (3, 2)
    assert [(c["id"], c["name"], c["pixels"]) for c in content["classes"]] == [
        *((1, "floor", 3), (0, "wall", 1), (2, "lamp", 1))
    ]
    assert content["classes"][0]["area"] == 0.5
    assert json.loads(result.to_json(polygons=True))["annotations"] == result.coco()["annotations"]


# ------------------------------------------------------------------------------ probabilities
@pytest.fixture(scope="module")
def scored(tmp_path_factory, make_model):
    cfg = make_model(tmp_path_factory.mktemp("ckpt") / "model", NAMES)
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    image = image.repeat(8, 0).repeat(8, 1)
    segmenter = Segmenter.from_checkpoint(cfg.DIR, device="cpu")
    return segmenter(image, probabilities=True), segmenter(image)


def test_probabilities_are_the_mean_of_the_softmax(scored):
    result, plain = scored
    size = result.labels.shape
    expected = np.mean(
        [
            torch.nn.functional.interpolate(x, size, mode="bilinear").softmax(1).numpy()[0]
            for x in result.logits
        ],
        axis=0,
    )
    found = result.probabilities()
    assert len(result.logits) == 2 and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(0), result.labels)
    np.testing.assert_array_equal(plain.labels, result.labels)
    entropy = result.uncertainty()
    np.testing.assert_allclose(entropy, special.entr(found).sum(0) / np.log(4), atol=1e-5)
    np.testing.assert_allclose(result.uncertainty("confidence"), 1 - found.max(0), atol=1e-6)
    assert entropy.min() >= 0 and entropy.max() <= 1
    with pytest.raises(ValueError, match="kind is 'margin'; give 'entropy' or 'confidence'"):
        result.uncertainty("margin")
    for use in (plain.probabilities, plain.uncertainty):
        with pytest.raises(ValueError, match="call the segmenter with probabilities=True"):
            use()


def test_uncertainty_is_saved_as_grey(scored, tmp_path):
    result, _ = scored
    path = result.save(tmp_path / "u.png", kind="uncertainty")
    with Image.open(path) as image:
        assert image.mode == "L"
        assert np.abs(np.asarray(image) / 255 - result.uncertainty()).max() <= 0.5 / 255 + 1e-6


# ------------------------------------------------------------------------------ of tensors
def test_results_of_tensors_and_batches():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 6, 8, 3)).astype(np.uint8)
    logits = torch.from_numpy(rng.normal(size=(2, 4, 3, 4))).float()
    labels = torch.nn.functional.interpolate(logits, (6, 8), mode="bilinear").argmax(1)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    batches = [
        *(Result.of(images, labels, NAMES), Result.of(planes, labels, ClassTable.of(NAMES))),
        *(
            Result.of(planes / 255, logits.requires_grad_(), NAMES),
            Result.of(list(images), logits, NAMES),
        ),
    ]
    for results in batches:
        assert [type(x) for x in results] == [Result, Result]
        for result, image, expected in zip(results, images, labels, strict=True):
            np.testing.assert_array_equal(result.image, image)
            np.testing.assert_array_equal(result.labels, expected)
            assert result.names == NAMES and result.labels.dtype == np.int64
    assert batches[2][0].probabilities().shape == (4, 6, 8)
    single = Result.of(images[0], labels[0].numpy().astype(np.uint8), NAMES)
    assert isinstance(single, Result) and single.areas
    for output, message in (
        (labels[:1], "there are 2 images and 1 outputs"),
        (logits[:, :2], "K = 4 classes, or class ids"),
        (labels[:, :3], r"class ids of shape \(3, 8\) for an image of shape \(6, 8\)"),
        (labels + 4, "class id [4-7], but there are 4 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            Result.of(images, output, NAMES)


# ------------------------------------------------------------------------------ pictures
def test_a_notebook_shows_overlay_and_legend():
    result = result_of(np.arange(4).reshape(2, 2).repeat(40, 0).repeat(60, 1))
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        picture = np.asarray(shown)
    overlay, legend = (np.asarray(x()) for x in (result.overlay, result.legend))
    np.testing.assert_array_equal(picture[:80, :120], overlay)
    np.testing.assert_array_equal(picture[: len(legend), 120:], legend)
    assert (picture[80:, :120] == 255).all()
    large = result_of(np.zeros((500, 4000), dtype=int))
    with Image.open(io.BytesIO(large._repr_png_())) as shown:
        assert shown.size == (960 + large.legend().width, 120)


def test_a_figure(tmp_path):
    result = result_of(np.zeros((8, 8), dtype=int))
    figure = result.plot(tmp_path / "f.png")
    assert isinstance(figure, matplotlib.figure.Figure) and (tmp_path / "f.png").stat().st_size
    assert len(figure.axes) == 3
    assert len(result.plot(truth=np.ones((8, 8), dtype=int)).axes) == 4
    with pytest.raises(ValueError, match="sizes must be equal"):
        result.plot(truth=np.ones((4, 8)))


def test_json_is_for_data(tmp_path):
    result = result_of(np.zeros((4, 4), dtype=int))
    saved = json.loads(result.save(tmp_path / "new" / "x.geojson").read_text())
    assert saved == result.geojson()
    with pytest.raises(ValueError, match=".json is for the kind coco; use an image suffix"):
        result.save(tmp_path / "x.json", kind="color")
