"""Evaluation: figures against a plain loop, worker counts, and workers that fail or die."""

import csv
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

from mit_semseg.config import Options
from mit_semseg.dataset import ClassTable, ValDataset
from mit_semseg.engine.checkpoint import load_model
from mit_semseg.engine.eval_report import format_report, single_class
from mit_semseg.engine.evaluate import Interrupted, evaluate, evaluate_model, val_dataset
from mit_semseg.engine.pool import run_here
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.scoring import (
    Evaluation,
    Gallery,
    Pictures,
    SavedPredictions,
    Scorer,
    merged,
)
from mit_semseg.metrics import BoundaryScore, ConfusionMatrix, boundary_f
from mit_semseg.models.tiles import Sliding, TiledNetwork

CPU = torch.device("cpu")
NAMES = ("road", "sky", "car", "tree")  # tree occurs nowhere
SIZES = [(48, 64), (48, 64), (64, 48), (40, 72), (48, 64)]  # (height, width)


@pytest.fixture(scope="module")
def setup(tmp_path_factory, make_model, make_images):
    root = tmp_path_factory.mktemp("data")
    make_images(root, SIZES)
    return make_model(
        tmp_path_factory.mktemp("ckpt") / "model",
        NAMES,
        DATASET__root_dataset=str(root),
        DATASET__list_val=str(root / "val.odgt"),
    )


def published(cfg, flip=False):
    """The confusion matrix as the published script would get it: a plain loop, no bands."""
    module = load_model(cfg, "best.pth")
    dataset = val_dataset(cfg)
    counts = np.zeros((4, 4), dtype=np.int64)
    for k in range(len(dataset)):
        sample = dataset[k]
        label = sample["seg_label"][0].numpy()
        total = torch.zeros(1, 4, *label.shape)
        with torch.no_grad():
            for x in sample["img_data"]:
                for y, back in [(x, False), (x.flip(-1), True)][: 2 if flip else 1]:
                    logits = module.logits(y)
                    logits = logits.flip(-1) if back else logits
                    logits = F.interpolate(logits, label.shape, mode="bilinear")
                    total += torch.softmax(logits, dim=1)
        pred = total[0].argmax(0).numpy()
        valid = label >= 0
        np.add.at(counts, (label[valid], pred[valid]), 1)
    return counts


def test_figures_are_those_of_a_plain_loop(setup, tmp_path, capsys):
    counts = published(setup)
    assert (counts.sum(0) > 0).sum() >= 2, "the random model must predict more than one class"
    result = evaluate(setup, [CPU], out_dir=tmp_path / "out", progress=False)

    hits, labelled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    union = labelled + predicted - hits
    iou = [h / u if u else math.nan for h, u in zip(hits, union, strict=True)]
    present = [x for x in iou if not math.isnan(x)]
    assert [row["iou"] for row in result["classes"]] == pytest.approx(iou, nan_ok=True)
    assert result["mean_iou"] == pytest.approx(np.mean(present))
    assert result["mean_iou_all_classes"] == pytest.approx(np.sum(present) / 4)
    assert result["pixel_accuracy"] == pytest.approx(hits.sum() / counts.sum())
    assert result["class_accuracy"] == pytest.approx(np.mean(hits[:3] / labelled[:3]))
    assert result["classes"][0]["pixel_share"] == pytest.approx(labelled[0] / counts.sum())
    assert result["pixels"] == counts.sum()

    printed = capsys.readouterr().out
    accuracy = 100 * hits.sum() / counts.sum()
    assert "[Eval Summary]:\nMean IoU: " in printed
    assert f"Mean IoU: {np.mean(present):.4f}, Accuracy: {accuracy:.2f}%" in printed
    for name in NAMES:
        assert name in printed
    # The files say the same; what is undefined is null in JSON, empty in CSV.
    stored = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert stored["mean_iou"] == result["mean_iou"]
    with open(tmp_path / "out" / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(NAMES)
    assert float(rows[0]["iou"]) == pytest.approx(iou[0])
    for name in ("class_iou.png", "class_dice.png", "confusion.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 50

    dice = [
        2 * h / n if (n := labelled[k] + predicted[k]) else math.nan for k, h in enumerate(hits)
    ]
    assert [row["dice"] for row in result["classes"]] == pytest.approx(dice, nan_ok=True)
    assert result["mean_dice"] == stored["mean_dice"] == pytest.approx(np.nanmean(dice))
    assert float(rows[0]["dice"]) == pytest.approx(dice[0])
    assert f"Mean Dice: {np.nanmean(dice):.4f}\n" in printed
    assert Image.open(tmp_path / "out" / "class_dice.png").size[0] > 50
    assert "boundary" not in printed and "mean_boundary_f" not in stored


def test_outlines_are_scored_when_asked_for(setup, tmp_path, capsys):
    cfg = setup.clone()
    cfg.VAL.boundary = True
    module, dataset = load_model(cfg, "best.pth"), val_dataset(cfg)
    predictor = Predictor(module, cfg.DATASET, CPU)
    scores = []
    for k in range(len(dataset)):
        sample = dataset[k]
        label = sample["seg_label"][0]
        logits = predictor.logits(sample["img_data"])
        pred = predictor.labels(logits, (label.shape[0], label.shape[1]))[0]
        scores.append(boundary_f(pred, label, 4))
    expected = np.nanmean(scores, axis=0)

    results = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        results.append(evaluate(cfg, [CPU], workers, out_dir=out, progress=False))
        stored = json.loads((out / "eval.json").read_text())
        assert stored["mean_boundary_f"] == results[-1]["mean_boundary_f"]
    first = results[0]
    assert [row["boundary_f"] for row in first["classes"]] == pytest.approx(
        expected.tolist(), nan_ok=True, abs=1e-9
    )
    assert first["mean_boundary_f"] == pytest.approx(np.nanmean(expected))
    assert results[1]["mean_boundary_f"] == first["mean_boundary_f"], "whoever counts what"
    assert f", mean boundary F-score: {first['mean_boundary_f']:.4f}" in capsys.readouterr().out
    assert (tmp_path / "1" / "class_boundary_f.png").is_file()
    # Training validates without them: nobody would read them.
    assert evaluate_model(module, dataset, cfg, CPU, progress=False).boundary is None


def test_counts_of_ranks_add_up(monkeypatch):
    """`merged` in a process group whose other rank has the same counts."""
    part = Evaluation(ConfusionMatrix(2), {3: ("x", "y")}, 2.0, boundary=BoundaryScore(2))
    part.matrix.update([0, 1, 1], [0, 0, 1])
    assert part.boundary is not None
    part.boundary.update(np.eye(8, dtype=int), np.eye(8, dtype=int))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda counts: counts.mul_(2))

    def gather(into, own):
        into[:] = [own, ({1: ("z", "y")}, 1.0, 1)]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    whole = merged(part, CPU)
    assert whole.boundary is not None
    assert whole.matrix.matrix.tolist() == [[2, 2], [0, 2]]
    assert whole.boundary.images.tolist() == [2, 2] and whole.processes == 2
    assert torch.equal(whole.boundary.sums, 2 * part.boundary.sums)
    assert whole.failed == [("z", "y"), ("x", "y")] and whole.seconds == 3.0
    assert part.matrix.matrix.tolist() == [[1, 1], [0, 1]]


def test_class_that_occurs_nowhere_is_not_available():
    row = {"index": 0, "name": "road", "iou": 0.5, "accuracy": 0.25, "pixel_share": 1.0}
    row["dice"] = 2 / 3
    none = {"index": 1, "name": "tree", "iou": math.nan, "accuracy": math.nan, "pixel_share": 0.0}
    none["dice"] = math.nan
    text = format_report(
        {
            "mean_iou": 0.4126,
            "pixel_accuracy": 0.79731,
            "seconds_per_image": 0.0421,
            "mean_iou_all_classes": 0.2,
            "class_accuracy": 0.5,
            "fw_iou": 0.4,
            "mean_dice": 0.6,
            "images": 1,
            "failed": [],
            "pixels": 7,
            "imgSizes": [300],
            "flip": False,
            "seconds": 1.0,
            "processes": 1,
            "classes": [row, none],
        }
    )
    lines = text.splitlines()
    assert lines[1].split() == ["0", "road", "0.5000", "0.6667", "25.00%", "100.00%"]
    assert lines[2].split() == ["1", "tree", "n/a", "n/a", "n/a", "0.00%"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert "Mean IoU: 0.4126, Accuracy: 79.73%, Inference Time: 0.0421s" in lines


def test_figures_do_not_depend_on_worker_count(setup, tmp_path):
    # Fewer files than the last run has workers.
    lines = Path(setup.DATASET.list_val).read_text().splitlines()[:3]
    (tmp_path / "three.odgt").write_text("\n".join(lines))
    cfg = setup.clone()
    cfg.DATASET.list_val = str(tmp_path / "three.odgt")
    drop = ("seconds", "seconds_per_image", "processes")

    def figures(workers):
        result = evaluate(cfg, [CPU], workers, out_dir=tmp_path / str(workers), progress=False)
        assert result["images"] == 3 and result["processes"] == min(workers, 3)
        return {key: value for key, value in result.items() if key not in drop}

    # As text, since NaN is unlike itself.
    one, two, five = (json.dumps(figures(workers)) for workers in (1, 2, 5))
    assert one == two == five


def test_batches_keep_every_image_and_pictures_never_collide(setup, tmp_path):
    cfg = setup.clone()
    cfg.VAL.visualize = True
    single = evaluate(cfg, [CPU], out_dir=tmp_path / "a", progress=False)
    cfg.VAL.batch_size = 3
    batched = evaluate(cfg, [CPU], out_dir=tmp_path / "b", progress=False)
    assert batched["pixels"] == single["pixels"]
    assert batched["mean_iou"] == pytest.approx(single["mean_iou"], abs=1e-3)
    pictures = sorted((tmp_path / "b" / "pictures").rglob("*.png"))
    assert [p.relative_to(tmp_path / "b" / "pictures").as_posix() for p in pictures] == [
        *("part0/0.png", "part0/2.png", "part0/4.png", "part1/1.png", "part1/3.png")
    ]
    picture = np.asarray(Image.open(pictures[1]))
    assert picture.shape == (64, 3 * 48, 3)
    source = np.asarray(Image.open(Path(cfg.DATASET.root_dataset) / "img" / "part0" / "2.png"))
    np.testing.assert_array_equal(picture[:, :48], source)
    # The truth beside it wears the table's colours, and ignored pixels none.
    mask = np.asarray(Image.open(Path(cfg.DATASET.root_dataset) / "ann" / "part0" / "2.png"))
    colors = ClassTable.of(NAMES).colors  # only to show that two classes differ
    assert len(colors) == 4
    truth = picture[:, 48:96]
    for value in (1, 2, 3):
        assert len(np.unique(truth[mask == value], axis=0)) == 1
    assert (truth[mask == 0] == 0).all()


def test_one_class_everywhere_is_pointed_out(setup, tmp_path, caplog):
    module = load_model(setup, "best.pth")
    last = [m for m in module.decoder.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    assert last.bias is not None
    evaluate(setup, [CPU], model=module, out_dir=tmp_path, progress=False)
    assert "predicted as" not in caplog.text
    with torch.no_grad():
        last.bias[2] += 1e4
    evaluate(setup, [CPU], model=module, out_dir=tmp_path, progress=False)
    (said,) = [r.getMessage() for r in caplog.records if "predicted as" in r.getMessage()]
    assert said.startswith("every pixel of all images is predicted as class 2: look at the masks")


def test_one_class_in_figures_by_hand():
    classes = ClassTable.of(["floor", "crack"])
    matrix = ConfusionMatrix(2)
    assert single_class(matrix, classes) == ""  # nothing was labelled
    matrix.update([0, 0, 0], [0, 0, -1])
    assert single_class(matrix, classes).startswith(
        "every labelled pixel is floor, and every one is predicted as floor: check DATASET.label_m"
    )
    matrix.update([0, 1], [1, -1])  # predicted where nothing is labelled: not counted
    assert single_class(matrix, classes).startswith("every pixel of all images is predicted as flo")
    matrix.update([1], [0])
    assert single_class(matrix, classes) == ""
    alone = ConfusionMatrix(1)
    alone.update([0], [0])
    assert single_class(alone, ClassTable.of(["floor"])) == ""


def test_data_with_the_classes_in_another_order_are_refused(setup, tmp_path, caplog):
    cfg = setup.clone()
    cfg.DATASET.classes = str(tmp_path / "names.csv")
    ClassTable.of(["sky", "road", "car", "tree"]).save(tmp_path / "names.csv")
    message = "class 0 of the checkpoint is 'road', of DATASET.list_val 'sky': number the"
    with pytest.raises(ValueError, match=message):
        evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
    ClassTable.of(["road", "sky", "vehicle", "tree"]).save(tmp_path / "names.csv")
    result = evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
    assert [row["name"] for row in result["classes"]] == list(NAMES)
    assert "class 2 of the checkpoint is 'car', of DATASET.list_val 'vehicle'" in caplog.text


def test_scales_and_flip_of_the_evaluation_are_its_own(setup, tmp_path):
    cfg = setup.clone()
    cfg.VAL.imgSizes = [40]
    cfg.VAL.flip = True
    result = evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
    other = cfg.clone()
    other.DATASET.imgSizes = [40]
    other.VAL.imgSizes = []
    counts = published(other, flip=True)
    assert result["pixel_accuracy"] == pytest.approx(np.diag(counts).sum() / counts.sum())
    assert result["imgSizes"] == [40]
    for section in (cfg.VAL, other.DATASET):  # one scale needs no list
        section.imgSizes = 40
    other.VAL.flip = True
    for number in (cfg, other):
        again = evaluate(number, [CPU], out_dir=tmp_path, progress=False)
        assert again["imgSizes"] == [40] and again["mean_iou"] == result["mean_iou"]


def test_model_in_memory_keeps_its_modes(setup, tmp_path):
    module = load_model(setup, "best.pth").train()
    frozen = next(m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    matrix = evaluate_model(module, val_dataset(setup), setup, CPU, progress=False).matrix
    np.testing.assert_array_equal(matrix.matrix.numpy(), published(setup))
    assert module.training and module.decoder.training and not frozen.training
    result = evaluate(setup, [CPU], 2, model=module, out_dir=tmp_path, progress=False)
    assert result["mean_iou"] == matrix.compute()["mean_iou"]
    assert result["checkpoint"] == "" and module.training


def test_every_image_is_computed_by_one_thread(setup):
    """Convolutions round by the number of threads; the figures must not."""
    module, data = load_model(setup, "best.pth"), val_dataset(setup)
    seen = set()
    forward = module.encoder.forward

    def watched(*args, **kwargs):
        seen.add((torch.get_num_threads(), threading.get_ident()))
        return forward(*args, **kwargs)

    module.encoder.forward = watched
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        matrix = evaluate_model(module, data, setup, CPU, progress=False).matrix
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    lanes = {(threads, thread) for threads, thread in seen if thread != threading.get_ident()}
    assert {threads for threads, _ in lanes} == {1}
    assert len({thread for _, thread in lanes}) > 1, "several images are computed side by side"
    torch.set_num_threads(1)
    try:
        alone = evaluate_model(module, data, setup, CPU, progress=False).matrix
    finally:
        torch.set_num_threads(before)
    assert torch.equal(matrix.matrix, alone.matrix)


def test_missing_checkpoint_lists_what_is_there(setup, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"epoch_7\.pth does not exist.*best\.pth"):
        evaluate(setup, [CPU], 4, checkpoint="epoch_7.pth", out_dir=tmp_path, progress=False)


def test_empty_list_is_one_clear_line(setup, tmp_path):
    empty = tmp_path / "empty.odgt"
    empty.write_text("\n")
    cfg = setup.clone()
    cfg.DATASET.list_val = str(empty)
    with pytest.raises(ValueError, match=r"empty\.odgt.*holds no records"):
        evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="workers is 0"):
        evaluate(setup, [CPU], 0, out_dir=tmp_path)


def damaged(setup, root, make_images):
    """Five images of which the second's mask and the fourth's image cannot be used."""
    make_images(root, SIZES)
    mask = np.full((48, 64), 200, dtype=np.uint8)
    Image.fromarray(mask).save(root / "ann" / "part1" / "1.png")
    image = root / "img" / "part1" / "3.png"
    image.write_bytes(image.read_bytes()[:200])
    cfg = setup.clone()
    cfg.DATASET.root_dataset, cfg.DATASET.list_val = str(root), str(root / "val.odgt")
    return cfg


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (1, 3), (2, 2)])
def test_bad_files_are_named_counted_and_left_out(
    workers, batch_size, setup, tmp_path, make_images, capsys, caplog
):
    cfg = damaged(setup, tmp_path, make_images)
    cfg.VAL.batch_size = batch_size
    cfg.VAL.visualize = True
    result = evaluate(cfg, [CPU], workers, out_dir=tmp_path / "out", progress=False)
    names = [str(tmp_path / "img" / "part1" / name) for name in ("1.png", "3.png")]
    assert [one["image"] for one in result["failed"]] == names
    assert "label 200 is outside" in result["failed"][0]["error"]
    assert all("\n" not in one["error"] for one in result["failed"])
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["failed"] == result["failed"]
    printed = capsys.readouterr().out
    assert f"2 of 5 images failed:\n  {names[0]}: " in printed and "3 images, " in printed
    told = [record.getMessage() for record in caplog.records if "left out" in record.message]
    assert sorted(line.split(": ")[1] for line in told) == names
    drawn = {path.name for path in (tmp_path / "out" / "pictures").rglob("*.png")}
    assert drawn == {"0.png", "2.png", "4.png"}

    # The figures are those of a list that never held the two.
    lines = Path(cfg.DATASET.list_val).read_text().splitlines()
    (tmp_path / "rest.odgt").write_text("\n".join(lines[i] for i in (0, 2, 4)))
    rest = cfg.clone()
    rest.DATASET.list_val = str(tmp_path / "rest.odgt")
    rest.VAL.batch_size = 1
    clean = evaluate(rest, [CPU], out_dir=tmp_path / "rest", progress=False)
    assert clean["failed"] == [] and result["images"] == clean["images"] == 3
    assert result["pixels"] == clean["pixels"]
    rounding = 1e-3 if batch_size > 1 else 0.0
    expected = pytest.approx(clean["pixel_accuracy"], rel=0, abs=rounding)
    assert result["pixel_accuracy"] == expected


def test_nothing_usable_is_an_error_that_names_the_first(setup, tmp_path, make_images):
    make_images(tmp_path, SIZES[:2])
    for file in (tmp_path / "img").rglob("*.png"):
        file.write_bytes(b"")
    cfg = setup.clone()
    cfg.DATASET.root_dataset, cfg.DATASET.list_val = str(tmp_path), str(tmp_path / "val.odgt")
    with pytest.raises(
        ValueError, match=r"none of the 2 images can be used.*part0/0\.png"
    ) as error:
        evaluate(cfg, [CPU], out_dir=tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)


def test_other_errors_than_a_files_end_the_evaluation(setup, tmp_path, monkeypatch):
    def broken(self, index):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ValDataset, "__getitem__", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        evaluate(setup, [CPU], out_dir=tmp_path, progress=False)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_have_nothing_in_common_and_together_everything(
    world, batch_size, setup, tmp_path, make_images
):
    cfg = damaged(setup, tmp_path, make_images)
    cfg.VAL.batch_size = batch_size
    module, data = load_model(cfg, "best.pth"), val_dataset(cfg)
    whole = evaluate_model(module, data, cfg, CPU, progress=False)
    seen = []

    class Watched(ValDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    data.__class__ = Watched
    parts = [
        evaluate_model(module, data, cfg, CPU, progress=False, share=(rank, world))
        for rank in range(world)
    ]
    assert sorted(seen) == [0, 1, 2, 3, 4]
    together = sum(parts[1:], parts[0])
    assert torch.equal(together.matrix.matrix, whole.matrix.matrix)
    assert together.failed == whole.failed and len(whole.failed) == 2
    assert merged(whole, CPU) is whole, "outside a process group there is nothing to merge"


def test_large_images_are_scored_in_tiles(setup):
    cfg = setup.clone()
    cfg.DATASET.imgSizes, cfg.DATASET.imgMaxSize = [256], 400
    module, data = load_model(cfg, "best.pth"), val_dataset(cfg)
    matrices = {}
    for tile in ("auto", "off", 128):
        cfg.VAL.tile = tile
        matrices[tile] = evaluate_model(module, data, cfg, CPU, progress=False).matrix.matrix
    assert torch.equal(matrices["auto"], matrices["off"]), "these are small"
    moved = int((matrices[128] - matrices["off"]).abs().sum()) / 2
    assert 0 < moved < 0.1 * int(matrices["off"].sum())
    assert torch.equal(matrices[128].sum(1), matrices["off"].sum(1)), "every pixel once"


def test_windows_slide_over_every_scale(setup, tmp_path, capsys):
    cfg = setup.clone()
    cfg.DATASET.imgSizes, cfg.DATASET.imgMaxSize = [72, 96], 200
    matrices = []
    for window in ([], [64, 96]):
        cfg.VAL.window = window
        result = evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
        assert result["window"] == window
        printed = capsys.readouterr().out
        assert (
            (f", in windows of {window[0]}x{window[1]}, " in printed)
            if window
            else ("in windows of" not in printed)
        )
        matrices.append(result["classes"])
    assert matrices[0] != matrices[1]
    assert len({tuple(row["pixel_share"] for row in rows) for rows in matrices}) == 1
    # By hand, at two scales.
    cfg.VAL.window, cfg.VAL.overlap, cfg.VAL.flip = [64, 96], 0.5, True
    module, data = load_model(cfg, "best.pth"), val_dataset(cfg)
    found = evaluate_model(module, data, cfg, CPU, progress=False).matrix.matrix
    counts = np.zeros((4, 4), dtype=np.int64)
    slide = TiledNetwork(module, window=Sliding(64, 96, 0.5))
    for sample in (data[k] for k in range(len(data))):
        label = sample["seg_label"][0].numpy()
        images = list(sample["img_data"])
        logits = [slide(x) for x in images] + [slide(x.flip(-1)).flip(-1) for x in images]
        wide = [F.interpolate(x, label.shape, mode="bilinear").softmax(1) for x in logits]
        pred = sum(wide)[0].argmax(0).numpy()
        np.add.at(counts, (label[label >= 0], pred[label >= 0]), 1)
    assert np.abs(found.numpy() - counts).sum() <= 2e-3 * counts.sum()


def test_an_evaluation_stops_when_it_is_asked_to(setup):
    module, data = load_model(setup, "best.pth"), val_dataset(setup)
    asked = [0]

    def stop():
        asked[0] += 1
        return asked[0] > 2

    threads = threading.active_count()
    with pytest.raises(Interrupted):
        evaluate_model(module, data, setup, CPU, progress=False, stop=stop)
    assert asked[0] == 3, "before the first image and after every one"
    assert threading.active_count() == threads
    with pytest.raises(Interrupted):
        evaluate_model(module, data, setup, CPU, progress=False, stop=lambda: True)
    assert evaluate_model(module, data, setup, CPU, progress=False, stop=lambda: False).matrix


def test_killed_worker_ends_the_evaluation(setup, tmp_path):
    killed = []

    def kill_one():
        while not multiprocessing.active_children():
            time.sleep(0.05)
        time.sleep(0.5)
        killed.append(time.monotonic())
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ChildProcessError, match=r"worker \d .*SIGKILL"):
        evaluate(setup, [CPU], 2, out_dir=tmp_path, progress=False)
    assert time.monotonic() - killed[0] < 10
    killer.join()
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------ as on a GPU
def test_one_thread_computes_and_counts_are_fetched_once(setup, tmp_path, make_images, monkeypatch):
    """The way of a GPU, on the CPU, against the way of the CPU."""
    cfg = damaged(setup, tmp_path, make_images)
    cfg.VAL.batch_size = 2
    module, data = load_model(cfg, "best.pth"), val_dataset(cfg)
    saved = SavedPredictions(tmp_path / "labels", (0, 4))
    gallery = Gallery(data, Pictures(tmp_path / "pictures", ClassTable.of(NAMES).colors))
    threads = set()
    checks = []
    fetched = []
    logits, update, cpu = Predictor.logits, ConfusionMatrix.update, ConfusionMatrix.cpu

    def watched(self, scales):
        threads.add(threading.get_ident())
        return logits(self, scales)

    def counted(self, pred, label, check=True):
        checks.append(check)
        update(self, pred, label, check)

    def fetch(self):
        fetched.append(self)
        return cpu(self)

    monkeypatch.setattr(Predictor, "logits", watched)
    monkeypatch.setattr(ConfusionMatrix, "update", counted)
    monkeypatch.setattr(ConfusionMatrix, "cpu", fetch)
    chunks = [range(2), range(2, 4), range(4, 5)]
    told = []
    scorer = Scorer(
        module, data, Options.read(cfg), CPU, 2, boundary=True, gallery=gallery, saved=saved
    )
    found = run_here(scorer.in_order, chunks, told.append)
    assert threads == {threading.get_ident()} and len(fetched) == 1 and set(checks) == {False}
    assert [count for count, _ in told] == [2, 2, 1] and found.processes == 1
    assert [sorted(bad) for _, bad in told] == [[1], [3], []] and found.seconds > 0
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("pictures/*/*.png")}
    assert sorted(pictures) == ["0.png", "2.png", "4.png"]
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["0.npy", "4.npy"]

    other = run_here(scorer.side_by_side, chunks, told.append)
    assert found.failed == other.failed and len(other.failed) == 2
    # Convolutions round by the number of threads.
    counts = found.matrix.matrix, other.matrix.matrix
    assert torch.equal(counts[0].sum(1), counts[1].sum(1))
    assert int((counts[0] - counts[1]).abs().sum()) <= 1e-3 * int(counts[0].sum())
    assert found.boundary is not None and other.boundary is not None
    assert torch.equal(found.boundary.images, other.boundary.images)


@pytest.mark.gpu
def test_validations_on_a_gpu_leave_host_memory_as_it_was(setup, tmp_path, make_images):
    sizes = [(48 + 8 * (k % 7), 64 + 8 * (k % 5)) for k in range(60)]
    make_images(tmp_path, sizes)
    cfg = setup.clone()
    cfg.DATASET.root_dataset, cfg.DATASET.list_val = str(tmp_path), str(tmp_path / "val.odgt")
    module, data = load_model(cfg, "best.pth"), val_dataset(cfg)
    device = torch.device("cuda:0")
    on_cpu = evaluate_model(module, data, cfg, CPU, progress=False).matrix.matrix
    memory = []
    for _ in range(4):
        found = evaluate_model(module, data, cfg, device, progress=False)
        status = Path("/proc/self/status").read_text()
        memory.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
        assert torch.equal(found.matrix.matrix.sum(1), on_cpu.sum(1)) and found.seconds > 0
        moved = int((found.matrix.matrix - on_cpu).abs().sum())
        assert moved <= 2e-2 * int(on_cpu.sum())
    # The first one starts CUDA and meets every shape.
    assert max(memory[1:]) - memory[0] < 40, memory
