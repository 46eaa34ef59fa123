"""Evaluation: figures against a plain loop, worker counts, and workers that fail or die."""

import csv
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mit_semseg import visualize
from mit_semseg.config import Options
from mit_semseg.dataset import ClassTable, ValDataset
from mit_semseg.engine import eval_report
from mit_semseg.engine.checkpoint import load_model
from mit_semseg.engine.evaluate import Interrupted, evaluate, evaluate_model, val_dataset
from mit_semseg.engine.pool import run_here
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.scoring import (
    FigureWriter,
    SavedPredictions,
    Scorer,
)
from mit_semseg.metrics import ConfusionMatrix, boundary_f
from mit_semseg.models.tiles import Sliding, TiledNetwork

CPU = torch.device("cpu")
NAMES = ("road", "sky", "car", "tree")  # tree occurs nowhere
SIZES = [(48, 64), (48, 64), (64, 48), (40, 72), (48, 64)]  # (height, width)


@pytest.fixture(scope="module")
def setup(tmp_path_factory, make_model, make_images):
    root = tmp_path_factory.mktemp("data")
    make_images(root, SIZES)
    lists = {"DATASET__root_dataset": str(root), "DATASET__list_val": str(root / "val.odgt")}
    return make_model(tmp_path_factory.mktemp("ckpt") / "model", NAMES, **lists)


@pytest.fixture
def cfg(setup):
    return setup.clone()


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    """Charts take longer to draw than these images to score."""
    for name in ("class_bars", "confusion_matrix"):
        monkeypatch.setattr(eval_report, name, lambda *args, **options: None)


@pytest.fixture
def damaged(cfg, tmp_path, make_images):
    """Five images of which the second's mask and the fourth's image cannot be used."""
    make_images(tmp_path, SIZES)
    Image.fromarray(np.full((48, 64), 200, np.uint8)).save(tmp_path / "ann" / "part1" / "1.png")
    image = tmp_path / "img" / "part1" / "3.png"
    image.write_bytes(image.read_bytes()[:200])
    cfg.DATASET.root_dataset, cfg.DATASET.list_val = str(tmp_path), str(tmp_path / "val.odgt")
    return cfg


def loaded(cfg):
    return load_model(cfg, "best.pth"), val_dataset(cfg)


def matrix_of(cfg, module, data, **options):
    return evaluate_model(module, data, cfg, CPU, progress=False, **options).matrix.matrix


def by_hand(cfg, network, flip=False):
    """The confusion matrix as the published script would get it: a plain loop, no bands."""
    dataset, counts = val_dataset(cfg), np.zeros((4, 4), dtype=np.int64)
    for k in range(len(dataset)):
        sample = dataset[k]
        label = sample["seg_label"][0].numpy()
        with torch.no_grad():
            logits = [network(x) for x in sample["img_data"]]
            if flip:
                logits += [network(x.flip(-1)).flip(-1) for x in sample["img_data"]]
        wide = [F.interpolate(x, label.shape, mode="bilinear").softmax(1) for x in logits]
        pred = sum(wide)[0].argmax(0).numpy()
        np.add.at(counts, (label[label >= 0], pred[label >= 0]), 1)
    return counts


# ------------------------------------------------------------------------------ figures
def test_figures_are_those_of_a_plain_loop(cfg, tmp_path, capsys, monkeypatch):
    for name in ("class_bars", "confusion_matrix"):
        monkeypatch.setattr(eval_report, name, getattr(visualize, name))
    counts = by_hand(cfg, load_model(cfg, "best.pth").logits)
    assert (counts.sum(0) > 0).sum() >= 2, "the random model must predict more than one class"
    result = evaluate(cfg, [CPU], out_dir=tmp_path / "out", progress=False)

    hits, labelled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        iou = hits / (labelled + predicted - hits)
        dice = 2 * hits / (labelled + predicted)
    accuracy = hits.sum() / counts.sum()
    for name, values in (("iou", iou), ("dice", dice)):
        found = [row[name] for row in result["classes"]]
        assert found == pytest.approx(values.tolist(), nan_ok=True)
        assert result[f"mean_{name}"] == pytest.approx(np.nanmean(values))
    assert result["mean_iou_all_classes"] == pytest.approx(np.nansum(iou) / 4)
    assert result["pixel_accuracy"] == pytest.approx(accuracy)
    assert result["class_accuracy"] == pytest.approx(np.mean(hits[:3] / labelled[:3]))
    assert result["classes"][0]["pixel_share"] == pytest.approx(labelled[0] / counts.sum())
    assert result["pixels"] == counts.sum()

    printed = capsys.readouterr().out
    assert "[Eval Summary]:\nMean IoU: " in printed
    assert f"Mean IoU: {np.nanmean(iou):.4f}, Accuracy: {100 * accuracy:.2f}%" in printed
    assert f"Mean Dice: {np.nanmean(dice):.4f}\n" in printed
    assert all(name in printed for name in NAMES)
    # The files say the same; what is undefined is null in JSON, empty in CSV.
    stored = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert all(stored[key] == result[key] for key in ("mean_iou", "mean_dice"))
    with open(tmp_path / "out" / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(NAMES)
    assert [float(rows[0][k]) for k in ("iou", "dice")] == pytest.approx([iou[0], dice[0]])
    for name in ("class_iou.png", "class_dice.png", "confusion.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 50
    assert "boundary" not in printed and "mean_boundary_f" not in stored


@pytest.mark.usefixtures("forked")
def test_boundaries_are_scored_when_asked_for(cfg, tmp_path, capsys):
    cfg.VAL.boundary = True
    module, dataset = loaded(cfg)
    predictor, scores = Predictor(module, cfg.DATASET, CPU), []
    for k in range(len(dataset)):
        sample = dataset[k]
        label = sample["seg_label"][0]
        pred = predictor.labels(predictor.logits(sample["img_data"]), tuple(label.shape))[0]
        scores.append(boundary_f(pred, label, 4))
    expected = np.nanmean(scores, axis=0)
    means = []
    for workers in (1, 2):
        result = evaluate(cfg, [CPU], workers, out_dir=tmp_path, progress=False)
        means.append(result["mean_boundary_f"])
        assert json.loads((tmp_path / "eval.json").read_text())["mean_boundary_f"] == means[-1]
        found = [row["boundary_f"] for row in result["classes"]]
        assert found == pytest.approx(expected.tolist(), nan_ok=True, abs=1e-9)
    assert means == pytest.approx([np.nanmean(expected)] * 2) and means[0] == means[1]
    assert f", mean boundary F-score: {means[0]:.4f}" in capsys.readouterr().out
    # Training validates without them: nobody would read them.
    assert evaluate_model(module, dataset, cfg, CPU, progress=False).boundary is None


@pytest.mark.usefixtures("forked")
def test_figures_do_not_depend_on_worker_count(cfg, tmp_path):
    # Fewer files than the last run has workers.
    lines = Path(cfg.DATASET.list_val).read_text().splitlines()[:3]
    (tmp_path / "three.odgt").write_text("\n".join(lines))
    cfg.DATASET.list_val = str(tmp_path / "three.odgt")
    texts = set()
    for workers in (1, 2, 5):
        result = evaluate(cfg, [CPU], workers, out_dir=tmp_path / "out", progress=False)
        assert result["images"] == 3 and result["processes"] == min(workers, 3)
        # As text, since NaN is unlike itself.
        drop = ("seconds", "seconds_per_image", "processes")
        texts.add(json.dumps({key: value for key, value in result.items() if key not in drop}))
    assert len(texts) == 1


def test_batches_keep_every_image_and_pictures_never_collide(cfg, tmp_path):
    cfg.VAL.visualize = True
    single = evaluate(cfg, [CPU], out_dir=tmp_path / "a", progress=False)
    cfg.VAL.batch_size = 3
    batched = evaluate(cfg, [CPU], out_dir=tmp_path / "b", progress=False)
    assert batched["pixels"] == single["pixels"]
    assert batched["mean_iou"] == pytest.approx(single["mean_iou"], abs=1e-3)
    folder, root = tmp_path / "b" / "pictures", Path(cfg.DATASET.root_dataset)
    pictures = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert pictures == [f"part{k % 2}/{k}.png" for k in (0, 2, 4, 1, 3)]
    picture = np.asarray(Image.open(folder / "part0" / "2.png"))
    assert picture.shape == (64, 3 * 48, 3)
    source = np.asarray(Image.open(root / "img" / "part0" / "2.png"))
    np.testing.assert_array_equal(picture[:, :48], source)
    # The truth beside it wears the table's colours, and ignored pixels none.
    mask, truth = np.asarray(Image.open(root / "ann" / "part0" / "2.png")), picture[:, 48:96]
    for value in (1, 2, 3):
        assert len(np.unique(truth[mask == value], axis=0)) == 1
    assert (truth[mask == 0] == 0).all()


def test_predicting_a_single_class_warns(cfg, tmp_path, caplog):
    module = load_model(cfg, "best.pth")
    evaluate(cfg, [CPU], model=module, out_dir=tmp_path, progress=False)
    assert "predicted as" not in caplog.text
    module.decoder.conv_last.bias.data[2] += 1e4
    evaluate(cfg, [CPU], model=module, out_dir=tmp_path, progress=False)
    (output,) = [r.getMessage() for r in caplog.records if "predicted as" in r.getMessage()]
    assert output.startswith("all pixels of all images are predicted as class 2: check the masks")


# ------------------------------------------------------------------------------ settings
def test_data_with_the_classes_in_another_order_are_refused(cfg, tmp_path, caplog):
    cfg.DATASET.classes = str(tmp_path / "names.csv")
    ClassTable.of(["sky", "road", "car", "tree"]).save(tmp_path / "names.csv")
    message = "class 0 is 'road' in the checkpoint and 'sky' in DATASET.list_val: use the"
    with pytest.raises(ValueError, match=message):
        evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
    ClassTable.of(["road", "sky", "vehicle", "tree"]).save(tmp_path / "names.csv")
    result = evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
    assert [row["name"] for row in result["classes"]] == list(NAMES)
    assert "class 2 is 'car' in the checkpoint and 'vehicle' in" in caplog.text


def test_evaluation_scales_and_flip_override_the_data_set(cfg, tmp_path):
    cfg.VAL.imgSizes, cfg.VAL.flip = [40], True
    other = cfg.clone()
    other.DATASET.imgSizes, other.VAL.imgSizes = 40, []  # one scale needs no list
    counts = by_hand(other, load_model(cfg, "best.pth").logits, flip=True)
    for one in (cfg, other):
        result = evaluate(one, [CPU], out_dir=tmp_path, progress=False)
        assert result["pixel_accuracy"] == pytest.approx(np.diag(counts).sum() / counts.sum())
        assert result["imgSizes"] == [40]


@pytest.mark.usefixtures("forked")
def test_a_model_in_memory_keeps_its_modes(cfg, tmp_path):
    module, data = loaded(cfg)
    frozen = next(m for m in module.train().modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    matrix = evaluate_model(module, data, cfg, CPU, progress=False).matrix
    expected = by_hand(cfg, load_model(cfg, "best.pth").logits)
    np.testing.assert_array_equal(matrix.matrix.numpy(), expected)
    assert module.training and module.decoder.training and not frozen.training
    result = evaluate(cfg, [CPU], 2, model=module, out_dir=tmp_path, progress=False)
    assert result["mean_iou"] == matrix.compute()["mean_iou"]
    assert result["checkpoint"] == "" and module.training


def test_every_image_is_computed_by_one_thread(cfg):
    """Convolutions round by the number of threads; the figures must not."""
    module, data = loaded(cfg)
    seen, forward, before = set(), module.encoder.forward, torch.get_num_threads()

    def watched(*args, **kwargs):
        seen.add((torch.get_num_threads(), threading.get_ident()))
        return forward(*args, **kwargs)

    module.encoder.forward = watched
    try:
        torch.set_num_threads(3)
        matrix = matrix_of(cfg, module, data)
        assert torch.get_num_threads() == 3
        lanes = {(threads, thread) for threads, thread in seen if thread != threading.get_ident()}
        assert {threads for threads, _ in lanes} == {1}
        assert len({thread for _, thread in lanes}) > 1, "images are computed side by side"
        torch.set_num_threads(1)
        assert torch.equal(matrix, matrix_of(cfg, module, data))
    finally:
        torch.set_num_threads(before)


def test_large_images_are_scored_in_tiles(cfg):
    cfg.DATASET.imgSizes, cfg.DATASET.imgMaxSize = [256], 400
    module, data = loaded(cfg)
    matrices = {}
    for tile in ("auto", "off", 128):
        cfg.VAL.tile = tile
        matrices[tile] = matrix_of(cfg, module, data)
    assert torch.equal(matrices["auto"], matrices["off"]), "these are small"
    moved = int((matrices[128] - matrices["off"]).abs().sum()) / 2
    assert 0 < moved < 0.1 * int(matrices["off"].sum())
    assert torch.equal(matrices[128].sum(1), matrices["off"].sum(1)), "every pixel once"


def test_windows_slide_over_every_scale(cfg, tmp_path, capsys):
    cfg.DATASET.imgSizes, cfg.DATASET.imgMaxSize = [72, 96], 200
    rows = []
    for window, windowed in (([], False), ([64, 96], True)):
        cfg.VAL.window = window
        result = evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
        assert result["window"] == window
        assert (", in windows of 64x96, " in capsys.readouterr().out) is windowed
        rows.append(result["classes"])
    assert rows[0] != rows[1]
    assert len({tuple(row["pixel_share"] for row in table) for table in rows}) == 1
    cfg.VAL.overlap, cfg.VAL.flip = 0.5, True
    module, data = loaded(cfg)
    counts = by_hand(cfg, TiledNetwork(module, window=Sliding(64, 96, 0.5)), flip=True)
    found = matrix_of(cfg, module, data).numpy()
    assert np.abs(found - counts).sum() <= 2e-3 * counts.sum()


# ------------------------------------------------------------------------------ mistakes
def test_what_cannot_be_evaluated_is_refused(cfg, tmp_path, make_images):
    with pytest.raises(FileNotFoundError, match=r"epoch_7\.pth does not exist.*best\.pth"):
        evaluate(cfg, [CPU], 4, checkpoint="epoch_7.pth", out_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="workers is 0"):
        evaluate(cfg, [CPU], 0, out_dir=tmp_path)
    (tmp_path / "empty.odgt").write_text("\n")
    cfg.DATASET.list_val = str(tmp_path / "empty.odgt")
    with pytest.raises(ValueError, match=r"empty\.odgt.*has no records"):
        evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)
    make_images(tmp_path, SIZES[:2])
    for file in (tmp_path / "img").rglob("*.png"):
        file.write_bytes(b"")
    cfg.DATASET.root_dataset, cfg.DATASET.list_val = str(tmp_path), str(tmp_path / "val.odgt")
    message = r"none of the 2 images can be used.*part0/0\.png"
    with pytest.raises(ValueError, match=message) as error:
        evaluate(cfg, [CPU], out_dir=tmp_path / "out", progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (1, 3), (2, 2)])
def test_bad_files_are_reported_and_skipped(workers, batch_size, damaged, tmp_path, capsys, caplog):
    cfg = damaged
    cfg.VAL.batch_size, cfg.VAL.visualize = batch_size, True
    result = evaluate(cfg, [CPU], workers, out_dir=tmp_path / "out", progress=False)
    names = [str(tmp_path / "img" / "part1" / name) for name in ("1.png", "3.png")]
    assert [one["image"] for one in result["failed"]] == names
    assert "label 200 is outside" in result["failed"][0]["error"]
    assert all("\n" not in one["error"] for one in result["failed"])
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["failed"] == result["failed"]
    printed = capsys.readouterr().out
    assert f"2 of 5 images failed:\n  {names[0]}: " in printed and "3 images, " in printed
    reports = [record.getMessage() for record in caplog.records if "skipped" in record.message]
    assert sorted(line.split(": ")[1] for line in reports) == names
    drawn = {path.name for path in (tmp_path / "out" / "pictures").rglob("*.png")}
    assert drawn == {"0.png", "2.png", "4.png"}
    # The figures are those of a list that never held the two.
    lines = Path(cfg.DATASET.list_val).read_text().splitlines()
    (tmp_path / "rest.odgt").write_text("\n".join(lines[i] for i in (0, 2, 4)))
    cfg.DATASET.list_val, cfg.VAL.batch_size = str(tmp_path / "rest.odgt"), 1
    clean = evaluate(cfg, [CPU], out_dir=tmp_path / "rest", progress=False)
    assert clean["failed"] == [] and result["images"] == clean["images"] == 3
    assert result["pixels"] == clean["pixels"]
    rounding = 1e-3 if batch_size > 1 else 0.0
    assert abs(result["pixel_accuracy"] - clean["pixel_accuracy"]) <= rounding


def test_programming_errors_end_the_evaluation(cfg, tmp_path, monkeypatch):
    def broken(self, index):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ValDataset, "__getitem__", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        evaluate(cfg, [CPU], out_dir=tmp_path, progress=False)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_shares_of_ranks_partition_the_images(batch_size, damaged):
    damaged.VAL.batch_size = batch_size
    module, data = loaded(damaged)
    whole = evaluate_model(module, data, damaged, CPU, progress=False)
    assert len(whole.failed) == 2
    seen = []

    class Watched(ValDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    data.__class__ = Watched
    for world in (1, 2, 3, 7):
        seen.clear()
        parts = [
            evaluate_model(module, data, damaged, CPU, progress=False, share=(rank, world))
            for rank in range(world)
        ]
        assert sorted(seen) == [0, 1, 2, 3, 4]
        together = sum(parts[1:], parts[0])
        assert torch.equal(together.matrix.matrix, whole.matrix.matrix)
        assert together.failed == whole.failed


# ------------------------------------------------------------------------------ ends
def test_an_evaluation_stops_when_asked_to(cfg):
    module, data = loaded(cfg)
    threads = threading.active_count()
    for answers, count in (([False, False, True], 3), ([True], 1)):
        asked = []

        def stop(answers=answers, asked=asked):
            asked.append(1)
            return answers[len(asked) - 1]

        with pytest.raises(Interrupted):
            matrix_of(cfg, module, data, stop=stop)
        assert len(asked) == count, "before the first image and after every one"
        assert threading.active_count() == threads


@pytest.mark.usefixtures("forked")
def test_a_killed_worker_ends_the_evaluation(cfg, tmp_path):
    killed = []

    def kill_one():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        killed.append(time.monotonic())
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ChildProcessError, match=r"worker \d .*SIGKILL"):
        evaluate(cfg, [CPU], 2, out_dir=tmp_path, progress=False)
    assert time.monotonic() - killed[0] < 10
    killer.join()
    assert not multiprocessing.active_children()


# ------------------------------------------------------------------------------ as on a GPU
def test_one_thread_computes_and_counts_are_fetched_once(damaged, tmp_path, monkeypatch):
    """The way of a GPU, on the CPU, against the way of the CPU."""
    damaged.VAL.batch_size = 2
    module, data = loaded(damaged)
    saved = SavedPredictions(tmp_path / "labels", (0, 4))
    figures = FigureWriter(data, tmp_path / "pictures", ClassTable.of(NAMES).colors)
    threads, checks, fetched, reports = set(), [], [], []
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
    options = {"boundary": True, "figures": figures, "saved": saved}
    scorer = Scorer(module, data, Options.read(damaged), CPU, 2, **options)
    found = run_here(scorer.in_order, chunks, reports.append)
    assert threads == {threading.get_ident()} and len(fetched) == 1 and set(checks) == {False}
    assert [count for count, _ in reports] == [2, 2, 1] and found.processes == 1
    assert [sorted(bad) for _, bad in reports] == [[1], [3], []] and found.seconds > 0
    pictures = sorted(path.name for path in tmp_path.glob("pictures/*/*.png"))
    assert pictures == ["0.png", "2.png", "4.png"]
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["0.npy", "4.npy"]

    other = run_here(scorer.side_by_side, chunks, reports.append)
    assert found.failed == other.failed and len(other.failed) == 2
    # Convolutions round by the number of threads.
    counts = found.matrix.matrix, other.matrix.matrix
    assert torch.equal(counts[0].sum(1), counts[1].sum(1))
    assert int((counts[0] - counts[1]).abs().sum()) <= 1e-3 * int(counts[0].sum())
    assert torch.equal(found.boundary.images, other.boundary.images)


@pytest.mark.gpu
def test_validations_on_a_gpu_leave_host_memory_as_it_was(cfg, tmp_path, make_images):
    make_images(tmp_path, [(48 + 8 * (k % 7), 64 + 8 * (k % 5)) for k in range(60)])
    cfg.DATASET.root_dataset, cfg.DATASET.list_val = str(tmp_path), str(tmp_path / "val.odgt")
    module, data = loaded(cfg)
    on_cpu, memory = matrix_of(cfg, module, data), []
    for _ in range(4):
        found = evaluate_model(module, data, cfg, torch.device("cuda:0"), progress=False)
        status = Path("/proc/self/status").read_text()
        memory.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
        assert torch.equal(found.matrix.matrix.sum(1), on_cpu.sum(1)) and found.seconds > 0
        assert int((found.matrix.matrix - on_cpu).abs().sum()) <= 2e-2 * int(on_cpu.sum())
    # The first one starts CUDA and meets every shape.
    assert max(memory[1:]) - memory[0] < 40, memory
