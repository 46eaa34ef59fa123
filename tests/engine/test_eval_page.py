"""`mit-semseg eval --report`: calibration, metrics per image, and the page."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torchmetrics.classification import MulticlassCalibrationError

from mit_semseg.config import DataOptions, Options
from mit_semseg.dataset import build_split
from mit_semseg.engine import eval_page, eval_report
from mit_semseg.engine.checkpoint import load_model
from mit_semseg.engine.evaluate import evaluate, val_dataset
from mit_semseg.engine.image_scores import WORST, ReportCounts
from mit_semseg.engine.pool import run_here
from mit_semseg.engine.predictor import Predictor
from mit_semseg.engine.scoring import Evaluation, Scorer, merged
from mit_semseg.metrics import Calibration, ConfusionMatrix
from mit_semseg.scores import confidence_map, probabilities

CPU = torch.device("cpu")
NAMES = ("road", "sky", "car", "tree")  # tree occurs nowhere
SIZES = [(48, 64), (48, 64), (64, 48), (40, 72)]  # (height, width)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory, make_model, make_images):
    root = tmp_path_factory.mktemp("data")
    make_images(root, SIZES)
    lists = {"DATASET__root_dataset": str(root), "DATASET__list_val": str(root / "val.odgt")}
    return make_model(tmp_path_factory.mktemp("ckpt") / "model", NAMES, **lists)


@pytest.fixture(autouse=True)
def no_charts(monkeypatch):
    for name in ("class_bars", "confusion_matrix"):
        monkeypatch.setattr(eval_report, name, lambda *args, **options: None)


def test_confidences_are_maxima_of_the_probabilities():
    torch.manual_seed(0)
    logits = [torch.randn(2, 5, 4, 6), torch.randn(2, 5, 3, 3)]
    for scales in (logits, logits[:1]):
        expected = probabilities(scales, (17, 23)).amax(dim=1)
        assert torch.equal(confidence_map(scales, (17, 23)), expected)


def by_hand(cfg):
    """Calibration error by torchmetrics, and mean IoU and accuracy of each image."""
    data, model = val_dataset(cfg), load_model(cfg, "best.pth")
    predictor = Predictor.of(model, data.options, Options.read(cfg).VAL, CPU)
    error = MulticlassCalibrationError(4, n_bins=15, norm="l1", ignore_index=-1)
    images = []
    for k in range(len(data)):
        truth = data[k]["seg_label"]
        shares = probabilities(predictor.logits(data[k]["img_data"]), truth.shape[1:])
        error.update(shares, truth)
        matrix = ConfusionMatrix(4)
        matrix.update(shares.argmax(1), truth)
        images.append((matrix.compute()["mean_iou"], matrix.compute()["pixel_accuracy"]))
    return error.compute().item(), images


def test_the_report_says_what_a_plain_loop_finds(cfg, tmp_path, capsys):
    result = evaluate(cfg, [CPU], out_dir=tmp_path, report=True, progress=False)
    ece, images = by_hand(cfg)
    assert result["ece"] == pytest.approx(ece, abs=1e-5)
    assert len(result["calibration"]) == 15
    assert json.loads((tmp_path / "eval.json").read_text())["ece"] == result["ece"]
    assert f"Expected calibration error: {ece:.4f}" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "images.csv").read_text().splitlines()))
    found = [(float(row["mean_iou"]), float(row["accuracy"])) for row in rows]
    assert found == pytest.approx(np.array(images), abs=1e-12)

    page = (tmp_path / "report.html").read_text("utf-8")
    captions = [float(x) for x in re.findall(r"<span>[^<]*: mean IoU (0\.\d+)</span>", page)]
    assert captions == [float(f"{iou:.3f}") for iou in sorted(iou for iou, _ in images)]
    for heading in ("Worst images", "Confusion matrix", "Calibration", "Precision and recall"):
        assert f"<h2>{heading}" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)

    # As with several processes; without the option nothing of it.
    other = evaluate(cfg, [CPU], 2, out_dir=tmp_path / "two", report=True, progress=False)
    assert str(other["calibration"]) == str(result["calibration"])  # some are NaN
    assert (tmp_path / "two/images.csv").read_text() == (tmp_path / "images.csv").read_text()
    plain = evaluate(cfg, [CPU], out_dir=tmp_path / "plain", progress=False)
    assert "ece" not in plain and not (tmp_path / "plain/report.html").exists()


def test_only_the_worst_images_keep_their_class_ids():
    parts = []
    truth = torch.zeros(2, 30, dtype=torch.int64)
    for k in range(30):
        part = ReportCounts(Calibration(2))
        predicted = truth.clone()
        predicted[0, : (7 * k) % 30] = 1  # every number of mistakes once
        part.update(k, predicted, truth, torch.ones(2, 30))
        parts.append(part)
    unlabelled = ReportCounts(Calibration(2))
    unlabelled.update(30, truth, truth - 1, torch.ones(2, 30))
    total = sum(parts[1:], parts[0]) + unlabelled
    expected = sorted(range(30), key=lambda k: -((7 * k) % 30))[:WORST]
    assert total.worst == expected
    assert {k for k, one in total.images.items() if one.labels is not None} == {*expected}
    assert math.isnan(total.images[30].mean_iou) and len(total.images) == 31


def test_large_images_are_shown_small(cfg, monkeypatch):
    monkeypatch.setattr(eval_page, "_SIDE", 32)
    split = build_split(val_dataset(cfg).options, "val")
    report = ReportCounts(Calibration(4))
    report.update(3, torch.zeros(40, 72).long(), torch.zeros(40, 72).long(), torch.ones(40, 72))
    sample = eval_page._sample(report, 3, split, DataOptions())
    assert sample.image.shape == (18, 32, 3) and sample.truth.shape == (18, 32)


def test_a_gpu_is_computed_in_order_with_the_same_report(cfg):
    """The code for a GPU, on the CPU; convolutions round by the number of threads."""
    options, chunks = Options.read(cfg), [range(2), range(2, 4)]
    scorer = Scorer(load_model(cfg, "best.pth"), val_dataset(cfg), options, CPU, report=True)
    found = run_here(scorer.in_order, chunks, lambda scored: None).report
    other = run_here(scorer.side_by_side, chunks, lambda scored: None).report
    assert torch.equal(found.calibration.labelled, other.calibration.labelled)
    for part in (found, other):
        assert sorted(part.images) == [0, 1, 2, 3]
        assert int(part.calibration.counts[0].sum()) == int(part.calibration.labelled.sum())
    assert found.calibration.compute()["ece"] == pytest.approx(
        other.calibration.compute()["ece"], abs=1e-3
    )


def test_reports_of_ranks_are_added(monkeypatch):
    truth = torch.tensor([[0, 1]])
    report = ReportCounts(Calibration(2))
    report.update(0, truth, truth, torch.ones(1, 2))
    part = Evaluation(ConfusionMatrix(2), report=report)
    one = report.images[0]

    def gather(into, own):
        into[:] = [own, {1: one} if isinstance(own, dict) else ({}, 1.0, 1)]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda counts: counts.mul_(2))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    whole = merged(part, CPU).report
    assert whole.images == {0: one, 1: one}
    assert whole.calibration.labelled.tolist() == [2, 2]
    assert torch.equal(whole.calibration.counts, 2 * report.calibration.counts)
