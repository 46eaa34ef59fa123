"""Images of any bands, written here by rasterio and compared with what it reads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tolerances import rounding

from mit_semseg.cli import main
from mit_semseg.config import DataOptions
from mit_semseg.dataset import (
    ClassTable,
    LabelMap,
    Split,
    TestDataset,
    TrainDataset,
    ValDataset,
    check_sample,
    load_mask,
)
from mit_semseg.dataset.crops import RandomCrops
from mit_semseg.dataset.rasters import RasterFile, write_labels
from mit_semseg.tools.view import view

rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed")

NAMES = ("blue", "green", "red", "nir")


def write(path, planes, names=NAMES, **profile):
    """A GeoTIFF of (C, H, W) planes."""
    count, height, width = planes.shape
    given = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": planes.dtype,
        "crs": "EPSG:32632",
        "transform": rasterio.Affine(10, 0, 500000, 0, -10, 5500000),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **given | profile) as file:
        file.write(planes)
        for number, name in enumerate(names, 1):
            file.set_band_description(number, name)
    return path


def options(bands=NAMES, mean=None, std=None, **values):
    mean, std = mean or [0.0] * len(bands), std or [1.0] * len(bands)
    return DataOptions.read({"bands": bands, "mean": mean, "std": std, **values})


def same(actual, expected):
    """Equal but for rounding in float32: of a subtraction and a division, and of means."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= rounding(actual, 4)


def planes(dtype, count=4, size=(12, 16), seed=0):
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return rng.normal(0, 3, (count, *size)).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, (count, *size), dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_values_of_bands_by_name_and_number(dtype, tmp_path):
    path = write(tmp_path / "x.tif", planes(np.dtype(dtype)))
    with rasterio.open(path) as file:
        expected = file.read([4, 3, 1]).astype(np.float32).transpose(1, 2, 0)
    with RasterFile(path, options(("NIR", "3", "blue"), [1, 2, 3], [4, 5, 6])) as file:
        assert file.size == (16, 12)
        assert np.array_equal(file.values(), expected)
        assert np.array_equal(file.values((2, 1, 5, 4)), expected[1:5, 2:7])
        same(file.pixels(), (expected - [1, 2, 3]) / [4, 5, 6])


def test_colours_name_bands_without_description(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(planes(np.uint8, 3).transpose(1, 2, 0)).save(path)
    with RasterFile(path, options(("green", "blue"))) as file:
        assert np.array_equal(file.values(), np.asarray(Image.open(path))[:, :, 1:])


def test_missing_values_are_nan(tmp_path):
    values = planes(np.uint16) | 1
    values[:, 0, :3] = 0
    values[1, 5, 5] = 0
    path = write(tmp_path / "nodata.tif", values, nodata=0)
    with RasterFile(path, options()) as file:
        assert np.array_equal(np.isnan(file.values()), values.transpose(1, 2, 0) == 0)
    floats = planes(np.float32)
    floats[2, 3, 4], floats[0, 1, 1] = np.nan, np.inf
    with RasterFile(write(tmp_path / "nan.tif", floats), options()) as file:
        assert np.argwhere(np.isnan(file.values())).tolist() == [[1, 1, 0], [3, 4, 2]]
    pixels = planes(np.uint8)
    pixels[3] = 255
    pixels[3, 2:4] = 0
    path = write(
        tmp_path / "alpha.tif", pixels, ("red", "green", "blue"), photometric="RGB", alpha="YES"
    )
    with RasterFile(path, options(("red", "green", "blue"))) as file:
        assert np.isnan(file.values()).all(axis=2).sum(1).nonzero()[0].tolist() == [2, 3]
    # GDAL takes the fourth band of 8 bits for alpha, which it is not if it has values.
    with RasterFile(path, options(("1", "4"))) as file:
        assert not np.isnan(file.values()).any()
    with RasterFile(write(tmp_path / "nir.tif", pixels), options(("red",))) as file:
        assert not np.isnan(file.values()).any()


@pytest.mark.parametrize(
    ("bands", "says"),
    [
        (("red", "swir"), "no real band swir of DATASET.bands; its bands are 1 blue uint16, 2 "),
        (("5",), "no real band 5 of "),
        (("0",), "no real band 0 of "),
        (("green",), "several bands green of .* 3 without name uint16, 4 green uint16"),
    ],
)
def test_wrong_bands_are_refused(bands, says, tmp_path):
    path = write(tmp_path / "x.tif", planes(np.uint16), ("blue", "green", "", "green"))
    if bands == ("red", "swir"):
        path = write(tmp_path / "x.tif", planes(np.uint16))
    with pytest.raises(ValueError, match=says) as error:
        RasterFile(path, options(bands))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        RasterFile(tmp_path / "x.tif", options())
    (tmp_path / "x.tif").write_text("no raster")
    with pytest.raises(ValueError, match=r"x\.tif: not a readable raster"):
        RasterFile(tmp_path / "x.tif", options())
    path = write(tmp_path / "cut.tif", planes(np.uint16, size=(300, 300)), compress="deflate")
    content = path.read_bytes()
    path.write_bytes(content[:200_000] + bytes(1000) + content[201_000:])
    with RasterFile(path, options()) as file, pytest.raises(ValueError, match="damaged or trunc"):
        file.values()
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(ValueError, match=r"needs rasterio: pip install 'mit_semseg\[geo\]'"):
        RasterFile(path, options())


@pytest.fixture
def pair(tmp_path):
    """A raster without values in its first two rows, and its mask."""
    values = planes(np.uint16, size=(32, 48)) | 1
    values[:, :2] = 0
    values[1, 20, 20] = 0
    write(tmp_path / "images/x.tif", values, nodata=0)
    mask = np.random.default_rng(1).integers(1, 4, (32, 48), dtype=np.uint8)
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/x.png")
    record = {"fpath_img": "images/x.tif", "fpath_segm": "masks/x.png"}
    return tmp_path, record, values, mask


MEAN, STD = [3e4, 2e4, 1e4, 4e4], [1e4, 2e4, 3e4, 1e4]


def test_samples_of_all_data_sets(pair):
    root, record, values, mask = pair
    given = options(
        mean=MEAN, std=STD, num_class=3, imgSizes=0, segm_downsampling_rate=1, random_flip=False
    )
    wide = np.where(values == 0, np.array(MEAN)[:, None, None], values)
    expected = torch.from_numpy(
        (wide - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    )
    labels = np.where(np.arange(32)[:, None] < 2, -1, mask.astype(int) - 1)
    batch = TrainDataset(root, [record], given)[0]
    same(batch["img_data"][0], expected)
    assert np.array_equal(batch["seg_label"][0], labels)
    sample = ValDataset(root, [record], given)[0]
    same(sample["img_data"][0][0], expected)
    assert np.array_equal(sample["seg_label"][0], labels)
    assert np.array_equal(np.isnan(sample["img_ori"]), values.transpose(1, 2, 0) == 0)
    alone = TestDataset([{"fpath_img": str(root / "images/x.tif")}], given)[0]
    assert torch.equal(alone["img_data"][0], sample["img_data"][0])


def test_augmentation_treats_bands_alike(pair):
    """Every band is transformed as it is alone."""
    root, record, *_ = pair
    changes = {
        "num_class": 3,
        "imgSizes": (24, 40),
        "crop_size": (24, 24),
        "batching": "crop",
        "random_blur": 1.0,
        "cutmix": 0.5,
        "classmix": 0.5,
    }
    together = TrainDataset(root, [record] * 2, options(mean=MEAN, std=STD, **changes), 2)
    for number, name in enumerate(NAMES):
        one = options((name,), MEAN[number : number + 1], STD[number : number + 1], **changes)
        alone = TrainDataset(root, [record] * 2, one, 2)
        for index in range(4):
            batch, single = together[index], alone[index]
            same(single["img_data"], batch["img_data"][:, number : number + 1])
            # A pixel with a single missing band is ignored where no other is read.
            equal = single["seg_label"] == batch["seg_label"]
            assert equal.float().mean() > 0.98
    plan = RandomCrops(options(**changes)).plan((48, 32), 0, np.random.default_rng(0))
    assert plan.sigma and plan.angle


def test_own_size_ignores_the_maximum_and_keeps_the_scale():
    given = options(imgSizes=0, imgMaxSize=10, batching="crop", crop_size=(8, 8))
    plan = RandomCrops(given).plan((400, 300), 0, np.random.default_rng(0))
    scale = plan.size[0] / 400
    assert 0.5 <= scale <= 2 and plan.size[1] == pytest.approx(300 * scale, abs=1)


def test_own_transform_sees_all_bands(pair, monkeypatch):
    root, record, values, _ = pair
    (root / "bands_transform.py").write_text(
        "def double(image, mask):\n"
        "    assert image.shape[0] == 4 and image.is_floating_point()\n"
        "    return 2 * image, mask\n"
        "def cut(image, mask):\n"
        "    return image[:3], mask\n"
    )
    monkeypatch.syspath_prepend(str(root))
    given = {"num_class": 3, "random_flip": False, "imgSizes": 0}
    plain = TrainDataset(root, [record], options(**given))[0]
    doubled = options(**given, transform="bands_transform:double")
    assert torch.equal(TrainDataset(root, [record], doubled)[0]["img_data"], 2 * plain["img_data"])
    cut = options(**given, transform="bands_transform:cut")
    with pytest.raises(RuntimeError, match=r"to return \(image, mask\): \(4, h, w\) float32"):
        TrainDataset(root, [record], cut)[0]


def test_data_check_measures_the_bands(pair, tmp_path, capsys):
    root, _, values, _ = pair
    cfg = tmp_path / "c.yaml"
    words = ["data", "check", "train", "--json", str(tmp_path / "x.json"), "--cfg", str(cfg)]
    cfg.write_text(
        f"DATASET:\n  format: folder\n  root_dataset: {root}\n  list_train: images:masks\n"
        "  list_val: images:masks\n  num_class: 3\n  bands: [nir, green]\n"
        "MODEL:\n  in_channels: 2\n"
    )
    assert main(words) == 0
    report = json.loads((tmp_path / "x.json").read_text())
    for band, plane in zip(report["bands"], values[[3, 1]], strict=True):
        known = plane[plane > 0].astype(float)
        assert band["mean"] == pytest.approx(known.mean())
        assert band["std"] == pytest.approx(known.std())
    said = capsys.readouterr().out
    assert "  bands: [nir, green]\n  mean: [" in said and "2 bands (1)" in said
    assert view(str(cfg), tmp_path / "page.html", progress=False).stat().st_size > 1000
    # Training without these numbers is refused.
    assert main(["train", "--cfg", str(cfg)]) == 2
    assert "data check train --cfg FILE prints them" in capsys.readouterr().err


def test_statistics_in_other_units_are_pointed_out(pair):
    root, record, *_ = pair
    files = {key: str(root / path) for key, path in record.items()}
    split = Split([files], ClassTable(("a", "b", "c"), np.zeros((3, 3))), LabelMap.shifted(3))
    right, wrong = (options(mean=[m / u for m in MEAN], std=[s / u for s in STD]) for u in (1, 1e4))
    assert check_sample(split, options=right) == []
    (warning,) = check_sample(split, options=wrong)
    assert "standard deviations from its mean: DATASET.mean and std are in the units" in warning


def test_lists_of_rasters(pair, tmp_path, capsys):
    root, *_ = pair
    words = ["--images", str(root / "images"), "--labels", str(root / "masks"), "--split", "1"]
    assert main(["data", "make-odgt", *words, "--out", str(tmp_path / "lists")]) == 0
    (line,) = (tmp_path / "lists/training.odgt").read_text().splitlines()
    assert (json.loads(line)["width"], json.loads(line)["height"]) == (48, 32)


@pytest.mark.parametrize(
    ("count", "offset", "dtype", "nodata"),
    [(4, 1, "uint8", 0), (4, 0, "uint8", 255), (256, 0, "uint16", 65535), (300, 1, "uint16", 0)],
)
def test_labels_are_written_with_the_georeference(count, offset, dtype, nodata, tmp_path):
    image = write(tmp_path / "x.tif", planes(np.uint16))
    colors = np.random.default_rng(0).integers(0, 256, (count, 3), dtype=np.uint8)
    labels = np.random.default_rng(1).integers(-1, count, (12, 16))
    write_labels(tmp_path / "y.tif", image, colors, offset, [(None, labels)])
    with rasterio.open(image) as old, rasterio.open(tmp_path / "y.tif") as new:
        assert new.crs == old.crs and new.transform == old.transform
        assert new.dtypes == (dtype,) and new.nodata == nodata
        expected = np.where(labels < 0, nodata, labels + offset)
        assert np.array_equal(new.read(1), expected)
        if dtype == "uint8":
            assert new.colormap(1)[offset + 1] == (*colors[1].tolist(), 255)
    assert np.array_equal(load_mask(tmp_path / "y.tif"), expected)
