"""Training batches: geometry by hand, padding, and one permutation a pass for everybody."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import normalize
from PIL import Image

from mit_semseg.config import DataOptions
from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.images import load_image, load_mask
from mit_semseg.dataset.reading import READINGS
from mit_semseg.dataset.sample import LoadedSample, Plan
from mit_semseg.dataset.transforms import Normalize

Options = Callable[..., SimpleNamespace]
Writer = Callable[..., dict[str, Any]]


def one_by_one(batches: Any) -> list[dict[str, Any]]:
    return list(batches)


def test_geometry_and_values_by_hand(tmp_path: Path, write_pair: Writer, options: Options) -> None:
    """Two images of one size class: resized by Pillow, top-left, padded, labels at 1/4."""
    records = [write_pair("wide", (50, 30)), write_pair("narrow", (36, 30))]
    opt = options(imgSizes=[24], random_flip=False)
    batch = TrainDataset(tmp_path, records, opt, batch_per_gpu=2)[0]
    # short side 24: 50x30 -> 40x24, 36x30 -> 28x24 (28.8); padded to multiples of 8: 40x24
    assert batch["img_data"].shape == (2, 3, 24, 40) and batch["img_data"].dtype == torch.float32
    assert batch["seg_label"].shape == (2, 6, 10) and batch["seg_label"].dtype == torch.int64
    for k, name in enumerate(batch["info"]):
        width = 40 if "wide" in name else 28
        stem = Path(name).stem
        with Image.open(tmp_path / "images" / f"{stem}.png") as file:
            image = np.asarray(file.resize((width, 24), Image.Resampling.BILINEAR))
        difference = batch["img_data"][k, :, :, :width] - normalize(image, DataOptions())
        levels = difference.abs() * torch.tensor(DataOptions.std)[:, None, None] * 255
        assert levels.max() <= 1.001
        assert not batch["img_data"][k, :, :, width:].any()
        with Image.open(tmp_path / "masks" / f"{stem}.png") as file:
            mask = file.resize((width, 24), Image.Resampling.NEAREST)
        small = np.asarray(mask.resize((width // 4, 6), Image.Resampling.NEAREST)).astype(int) - 1
        assert np.array_equal(batch["seg_label"][k, :, : width // 4].numpy(), small)
        assert (batch["seg_label"][k, :, width // 4 :] == -1).all()


def test_labels_of_odd_sizes_are_padded_before_the_downsampling(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    """The published way, spelt out: paste into a multiple of r, then Pillow nearest by 1/r."""
    record = write_pair("odd", (37, 29))
    for rate in (1, 2, 4, 8):
        opt = options(imgSizes=[29], segm_downsampling_rate=rate, random_flip=False)
        label = TrainDataset(tmp_path, [record], opt)[0]["seg_label"][0].numpy()
        padded = np.full((32, 40), -1, np.int32)
        padded[:29, :37] = load_mask(tmp_path / record["fpath_segm"]) - 1
        reference = Image.fromarray(padded).resize(
            (40 // rate, 32 // rate), Image.Resampling.NEAREST
        )
        assert np.array_equal(label, np.asarray(reference))


def test_padding_is_ignored_never_class_0(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    records = [write_pair("a", (60, 24)), write_pair("b", (30, 24))]
    for record in records:
        Image.new("L", (record["width"], 24), 2).save(tmp_path / record["fpath_segm"])
    opt = options(imgSizes=[24], segm_downsampling_rate=1, random_flip=False)
    batch = TrainDataset(tmp_path, records, opt, batch_per_gpu=2)[0]
    counts = Counter(batch["seg_label"].flatten().tolist())
    assert counts == {1: 60 * 24 + 30 * 24, -1: 2 * 24 * 64 - 90 * 24}


def test_padding_to_larger_multiples_changes_the_padding_only(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    records = [write_pair(f"s{k}", (50 + 9 * k, 30)) for k in range(4)]
    opt = options(imgSizes=[24, 32], padding_constant=24, segm_downsampling_rate=4)
    tight, padded = (
        TrainDataset(tmp_path, records, opt, batch_per_gpu=2, normalized=False, pad_to=pad_to)
        for pad_to in (1, 64)
    )
    for k in range(8):
        expected, batch = tight[k], padded[k]
        h, w = expected["img_data"].shape[2:]
        assert batch["img_data"].shape[2:] == (192, 192), "multiples of 24 and of 64"
        assert torch.equal(batch["img_data"][:, :, :h, :w], expected["img_data"])
        assert torch.equal(batch["img_size"], expected["img_size"])
        assert not batch["img_data"][:, :, h:].any() and not batch["img_data"][:, :, :, w:].any()
        h, w = expected["seg_label"].shape[1:]
        assert batch["seg_label"].shape[1:] == (48, 48)
        assert torch.equal(batch["seg_label"][:, :h, :w], expected["seg_label"])
        assert (batch["seg_label"][:, h:] == -1).all() and (
            batch["seg_label"][:, :, w:] == -1
        ).all()


def test_batches_are_of_one_orientation(
    tmp_path: Path, mixed: list[dict[str, Any]], options: Options
) -> None:
    data = TrainDataset(tmp_path, mixed, options(), batch_per_gpu=2)
    assert data.batches_per_pass == 3 + 2  # 6 not upright, 3 upright
    upright = {r["fpath_img"] for r in mixed if r["height"] > r["width"]}
    for k in range(2 * data.batches_per_pass):
        info = set(data[k]["info"])
        assert info <= upright or not info & upright


def test_every_image_of_a_batch_shares_one_short_side(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    records = [write_pair(f"i{k}", (40, 30)) for k in range(4)]
    data = TrainDataset(tmp_path, records, options(), batch_per_gpu=4)
    heights = {tuple(data[k]["img_data"].shape[2:]) for k in range(20)}
    assert heights == {(24, 32), (32, 48)}  # 24 -> 32x24; 32 -> 42x32


@given(
    st.integers(1, 7), st.integers(0, 12), st.integers(0, 12), st.integers(0, 5), st.integers(1, 3)
)
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_each_pass_shows_each_image_once(
    options: Options, batch: int, wide: int, upright: int, seed: int, ranks: int
) -> None:
    records = [{"fpath_img": f"w{k}", "width": 4, "height": 3} for k in range(wide)]
    records += [{"fpath_img": f"u{k}", "width": 3, "height": 4} for k in range(upright)]
    if not records:
        return
    data = TrainDataset("", records, options(), batch_per_gpu=batch, seed=seed)
    for number in range(2):
        plan = data._order(number)
        assert len(plan) == data.batches_per_pass
        shares = [plan[rank::ranks] for rank in range(ranks)]
        shown = [int(k) for share in shares for chunk in share for k in chunk]
        assert sorted(shown) == list(range(len(records)))


def test_the_order_depends_on_seed_and_pass_only(
    tmp_path: Path, mixed: list[dict[str, Any]], options: Options
) -> None:
    def order(seed: int, start: int) -> list[list[str]]:
        data = TrainDataset(tmp_path, mixed, options(), batch_per_gpu=2, seed=seed)
        return [data[start + k]["info"] for k in range(data.batches_per_pass)]

    data = TrainDataset(tmp_path, mixed, options(), batch_per_gpu=2, seed=1)
    assert order(1, 0) == order(1, 0) == [data.files(k) for k in range(data.batches_per_pass)]
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 5)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(
    tmp_path: Path, mixed: list[dict[str, Any]], options: Options, workers: int
) -> None:
    opt = options(crop_size=[16, 24], color_jitter=0.4)
    data = TrainDataset(tmp_path, mixed, opt, batch_per_gpu=2, seed=9)
    indices = list(range(3, 11))
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, sampler=indices, num_workers=workers, collate_fn=one_by_one
    )
    got = [item for batch in loader for item in batch]
    assert len(got) == len(indices)
    torch.manual_seed(5)
    np.random.seed(5)
    for index, item in zip(indices, got):
        alone = data[index]
        assert item["info"] == alone["info"]
        assert torch.equal(item["img_data"], alone["img_data"])
        assert torch.equal(item["seg_label"], alone["seg_label"])


def test_survives_pickling(tmp_path: Path, mixed: list[dict[str, Any]], options: Options) -> None:
    data = TrainDataset(tmp_path, mixed, options(), batch_per_gpu=2)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[7]["img_data"], data[7]["img_data"])


def test_random_flip_is_honoured(tmp_path: Path, write_pair: Writer, options: Options) -> None:
    record = write_pair("f", (32, 24))
    image = normalize(load_image(tmp_path / record["fpath_img"]), DataOptions())
    label = torch.from_numpy(load_mask(tmp_path / record["fpath_segm"]).astype(np.int64) - 1)
    opt = options(imgSizes=[24], segm_downsampling_rate=1)
    data = TrainDataset(tmp_path, [record], opt)
    flipped = 0
    for k in range(40):
        batch = data[k]
        turned = not torch.equal(batch["img_data"][0], image)
        flipped += turned
        assert torch.equal(batch["img_data"][0], image.flip(2) if turned else image)
        assert torch.equal(batch["seg_label"][0], label.flip(1) if turned else label)
    assert 8 <= flipped <= 32
    opt.random_flip = False
    still = TrainDataset(tmp_path, [record], opt)
    assert all(torch.equal(still[k]["img_data"][0], image) for k in range(20))


def test_flipped_labels_are_resized_as_published(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    """Mirrored by Pillow first, then resized: not the same as the other way round."""
    record = write_pair("f", (64, 48))
    opt = options(imgSizes=[24], segm_downsampling_rate=1)
    data = TrainDataset(tmp_path, [record], opt)
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    with Image.open(tmp_path / record["fpath_segm"]) as file:
        masks = [file.copy(), file.transpose(mirror)]
    with Image.open(tmp_path / record["fpath_img"]) as file:
        images = [file.copy(), file.transpose(mirror)]
    expected = [
        torch.from_numpy(np.array(mask.resize((32, 24), Image.Resampling.NEAREST)).astype(int) - 1)
        for mask in masks
    ]
    pixels = [np.asarray(image.resize((32, 24), Image.Resampling.BILINEAR)) for image in images]
    assert not torch.equal(expected[0].flip(1), expected[1])
    seen = set()
    for k in range(20):
        batch = data[k]
        label = batch["seg_label"][0, :24, :32]
        (turned,) = (n for n in (0, 1) if torch.equal(label, expected[n]))
        seen.add(turned)
        difference = batch["img_data"][0, :, :24, :32] - normalize(pixels[turned], DataOptions())
        levels = difference.abs() * torch.tensor(DataOptions.std)[:, None, None] * 255
        assert levels.max() <= 1.001
    assert seen == {0, 1}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_size": [20, 28], "color_jitter": 0.4},
        {"color_order": "BGR", "value_range": 255, "mean": [99.0, 98.5, 97.0], "std": [1.0] * 3},
    ],
)
def test_pixels_normalised_later_are_the_same_batch(
    tmp_path: Path, mixed: list[dict[str, Any]], options: Options, change: dict[str, Any]
) -> None:
    opt = options(**change)
    ready = TrainDataset(tmp_path, mixed, opt, batch_per_gpu=3)
    raw = TrainDataset(tmp_path, mixed, opt, batch_per_gpu=3, normalized=False)
    module = Normalize.of(opt)
    padded = False
    for k in range(8):
        batch, pixels = ready[k], raw[k]
        assert set(pixels) == {*batch, "img_size"} and pixels["info"] == batch["info"]
        images, sizes = pixels["img_data"], pixels["img_size"]
        assert images.dtype == torch.uint8 and sizes.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert sizes.shape == (len(images), 2)
        padded |= bool((sizes < torch.tensor(images.shape[2:])).any())
        assert torch.equal(module(images, sizes), batch["img_data"])
        assert torch.equal(pixels["seg_label"], batch["seg_label"])
    assert padded


@pytest.mark.parametrize("ignored", [[], [255]])
def test_a_wrong_label_is_refused_where_the_resize_drops_it(
    tmp_path: Path, write_pair: Writer, options: Options, ignored: list[int]
) -> None:
    record = write_pair("x", (64, 48))
    with Image.open(tmp_path / record["fpath_segm"]) as file:
        mask = np.array(file)
    mask[0, 0] = 255 if ignored else 3
    Image.fromarray(mask).save(tmp_path / record["fpath_segm"])
    opt = options(imgSizes=[24], ignore_label=ignored, segm_downsampling_rate=8)
    data = TrainDataset(tmp_path, [record], opt)
    assert data[0]["seg_label"].max() <= 2  # 24 of 3072 pixels become labels
    mask[0, 1] = 77
    Image.fromarray(mask).save(tmp_path / record["fpath_segm"])
    for k in range(3):
        with pytest.raises(ValueError, match=r"x\.png: label 77 is outside 0\.\.3"):
            data[k]
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / record["fpath_segm"])
    with pytest.raises(ValueError, match=r"x\.png: label 77 is outside 0\.\.3"):
        data[0]


def test_a_large_jpeg_with_a_mask_of_another_size(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    """Sizes are compared as the files have them, however little of the JPEG is decoded."""
    record = write_pair("x", (400, 300))
    with Image.open(tmp_path / record["fpath_img"]) as file:
        file.resize((400, 300)).save(tmp_path / "images/x.jpg")
    record["fpath_img"] = "images/x.jpg"
    opt = options(imgSizes=[24])
    batch = TrainDataset(tmp_path, [record], opt)[0]
    assert batch["img_data"].shape == (1, 3, 24, 32)
    Image.new("L", (200, 150)).save(tmp_path / "masks/x.png")
    with pytest.raises(ValueError, match=r"x\.png: 200x150 pixels, but its image .* 400x300"):
        TrainDataset(tmp_path, [record], opt)[0]


def test_crops_cut_image_and_label_alike_and_pad_what_is_small(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    big, small = write_pair("big", (64, 48)), write_pair("small", (20, 16))
    for record in (big, small):  # the loaded shows its own labels
        mask = load_mask(tmp_path / record["fpath_segm"]).astype(np.uint8)
        Image.fromarray(np.dstack([mask] * 3)).save(tmp_path / record["fpath_img"])
    opt = options(
        imgSizes=[48], crop_size=[32, 40], segm_downsampling_rate=1, mean=[0.0] * 3, std=[1.0] * 3,
        value_range=255,
    )  # fmt: skip
    data = TrainDataset(tmp_path, [big], opt)
    corners = set()
    for k in range(12):
        batch = data[k]
        assert batch["img_data"].shape == (1, 3, 32, 40)
        assert torch.equal(batch["img_data"][0, 0].long() - 1, batch["seg_label"][0])
        corners.add(batch["seg_label"].sum().item())
    assert len(corners) > 6
    opt.imgSizes = [16]
    batch = TrainDataset(tmp_path, [small], opt)[0]
    assert batch["img_data"].shape == (1, 3, 32, 40)
    assert (batch["seg_label"][0, 16:] == -1).all() and (batch["seg_label"][0, :, 20:] == -1).all()


def test_sizes_missing_from_the_list_are_read(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    record = write_pair("n", (30, 40))
    del record["width"], record["height"]
    data = TrainDataset(tmp_path, [record], options(imgSizes=[24]))
    assert data[0]["img_data"].shape == (1, 3, 32, 24)


def test_a_wrong_list_size_is_an_error(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    record = write_pair("x", (40, 30), width=30, height=40)
    with pytest.raises(ValueError, match=r"x\.png: 40x30 pixels .* list says 30x40"):
        TrainDataset(tmp_path, [record], options())[0]


def test_mask_of_another_size_names_both_files(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    record = write_pair("x", (40, 30))
    Image.new("L", (41, 30)).save(tmp_path / "masks/x.png")
    with pytest.raises(ValueError, match=r"masks.x\.png: 41x30 .*images.x\.png has 40x30"):
        TrainDataset(tmp_path, [record], options())[0]


def test_a_turned_image_whose_mask_is_not_is_an_error(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    record = write_pair("x", (40, 30))
    exif = Image.Exif()
    exif[274] = 8
    with Image.open(tmp_path / "images/x.png") as file:
        file.load()
    file.save(tmp_path / "images/x.png", exif=exif)
    del record["width"], record["height"]
    with pytest.raises(ValueError, match=r"40x30 pixels, but its image .* 30x40 \(upright by EXIF"):
        TrainDataset(tmp_path, [record], options())[0]


def test_errors_in_a_worker_name_the_file(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    record = write_pair("bad")
    (tmp_path / "masks/bad.png").write_bytes(b"no image")
    data = TrainDataset(tmp_path, [record], options())
    loader = torch.utils.data.DataLoader(
        data, batch_size=1, num_workers=1, collate_fn=one_by_one, sampler=[0]
    )
    with pytest.raises(ValueError, match=r"bad\.png: not a readable image"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("change", "batch", "says"),
    [
        ({"padding_constant": 12, "segm_downsampling_rate": 8}, 1, "no multiple"),
        ({}, 0, "batch_size_per_gpu is 0"),
    ],
)
def test_impossible_settings(
    options: Options, change: dict[str, Any], batch: int, says: str
) -> None:
    records = [{"fpath_img": "a", "fpath_segm": "a", "width": 4, "height": 3}]
    with pytest.raises(ValueError, match=says):
        TrainDataset("", records, options(**change), batch_per_gpu=batch)


def test_published_call(tmp_path: Path, write_pair: Writer) -> None:
    """List path, positional arguments, only published keys; a length that never ends."""
    import json

    record = write_pair("p", (64, 48))
    (tmp_path / "training.odgt").write_text(json.dumps(record) + "\n")
    opt = SimpleNamespace(
        imgSizes=(300, 375), imgMaxSize=1000, padding_constant=8, segm_downsampling_rate=8
    )
    data = TrainDataset(str(tmp_path), os.path.join(tmp_path, "training.odgt"), opt, 2)
    batch = data[10**9]
    assert batch["img_data"].shape[2] in (304, 376) and len(data) > 10**9
    assert batch["seg_label"].max() <= 2


def test_random_choices_depend_on_the_seed(
    tmp_path: Path, write_pair: Writer, options: Options
) -> None:
    record = write_pair("one", (40, 30))

    def choices(seed: int) -> list[tuple[int, float]]:
        data = TrainDataset(tmp_path, [record], options(), seed=seed)
        batches = [data[k] for k in range(12)]
        return [(b["img_data"].shape[2], b["img_data"][0, 0, 0, 0].item()) for b in batches]

    assert choices(1) == choices(1)
    assert choices(1) != choices(2)


def test_reading_names_every_file_before_it_is_read(
    tmp_path: Path,
    mixed: list[dict[str, Any]],
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = TrainDataset(tmp_path, mixed, options(), batch_per_gpu=2)
    heard: list[str] = []
    monkeypatch.setattr(READINGS, "listener", heard.append)
    batch = data[0]
    expected = []
    for image in batch["info"]:
        mask = image.replace("images", "masks")
        # The mask is read between the image's header and its pixels.
        expected += [str(tmp_path / image), str(tmp_path / mask), str(tmp_path / image), ""]
    assert heard == expected
    (tmp_path / batch["info"][0]).unlink()
    heard.clear()
    with pytest.raises(FileNotFoundError):
        data[0]
    assert heard == [expected[0], ""]


def tell_pid(worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    folder = Path(info.dataset.root_dataset)  # type: ignore[attr-defined]

    def reading(file: str) -> None:
        with open(folder / f"worker{worker}", "a") as log:
            log.write(f"{file}\n")

    READINGS.listener = reading


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_listens_to_its_own_reading(
    tmp_path: Path, mixed: list[dict[str, Any]], options: Options, start: str
) -> None:
    data = TrainDataset(tmp_path, mixed, options())
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        sampler=range(4),
        num_workers=2,
        worker_init_fn=tell_pid,
        multiprocessing_context=start,
    )
    assert len(list(loader)) == 4 and READINGS.listener is None
    for worker in (0, 1):
        lines = (tmp_path / f"worker{worker}").read_text().splitlines()
        assert len(lines) == 8 and lines[3] == lines[7] == ""


# (width, height); first row and column; mirrored; colours; blur; angle.
DRAWN: dict[str, Any] = {
    "crop": [
        ((54, 41), (21, 19), True, [0.8932, 1.2452, 1.1023], None, -8.7152),
        ((23, 17), (0, 0), True, [1.2554, 0.9644, 1.0922], None, -1.0502),
        ((69, 51), (35, 11), True, [1.0087, 1.1444, 0.8021], None, -0.6737),
        ((39, 29), (9, 11), False, [1.252, 0.7394, 1.2121], None, -2.4843),
    ],
    "aspect": [
        ((53, 40), (20, 1), False, [0.8705, 0.8085, 0.8932], None, 0.0),
        ((53, 40), (18, 7), True, [0.7987, 0.9685, 0.7006], None, 0.0),
        ((32, 24), (1, 3), False, [1.0922, 1.2489, 1.2923], None, 0.0),
        ((53, 40), (11, 15), False, [1.1702, 1.0087, 1.1444], None, 0.0),
    ],
}


@pytest.mark.parametrize("batching", DRAWN)
def test_what_a_seed_draws_stays_as_it_is(
    batching: str,
    tmp_path: Path,
    write_pair: Writer,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run of an earlier version is resumed exactly: the numbers are recorded, not computed."""
    records = [write_pair(f"s{k}", (60, 45)) for k in range(4)]
    (tmp_path / records[2]["fpath_segm"]).unlink()  # the first of the batch
    more = {"crop_size": [16, 24], "color_jitter": 0.3, "imgMaxSize": 200}
    opt = options(imgSizes=[24, 32, 40], on_error="skip", batching=batching, **more)
    data = TrainDataset(tmp_path, records, opt, batch_per_gpu=4)
    plans: list[Plan] = []
    apply = data._style.apply

    def recorded(loaded: LoadedSample, plan: Plan) -> LoadedSample:
        plans.append(plan)
        return apply(loaded, plan)

    monkeypatch.setattr(data._style, "apply", recorded)
    assert len(data[0]["skipped"]) == 1
    seen = [
        (
            plan.size,
            tuple(side.start for side in plan.window),
            plan.flip,
            plan.colors and [round(float(factor), 4) for factor in plan.colors],
            plan.sigma and round(plan.sigma, 4),
            round(plan.angle, 4),
        )
        for plan in plans
    ]
    assert seen == DRAWN[batching]
