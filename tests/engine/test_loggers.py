"""Loggers of a training: what they were given can be read back with their own means."""

import json
import logging
import math
import signal
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CPU, signal_after, trainer_of

from mit_semseg.config import Options, load_options
from mit_semseg.engine.train import train
from mit_semseg.engine.training import loggers as module
from mit_semseg.engine.training.loggers import LOGGERS, Logger, Loggers
from mit_semseg.engine.training.pictures import ValidationPictures

CURVES = {"loss": "train/loss", "lr_encoder": "lr/encoder", "data_wait": "speed/data_wait"}


def records(cfg, kind):
    lines = (Path(cfg.DIR) / "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if x["kind"] == kind]


def expected_of(cfg):
    """name -> [(step, value), ...] by the file of the same run."""
    found = {
        name: [(x["step"], x[key]) for x in records(cfg, "train")] for key, name in CURVES.items()
    }
    found["val/mean_iou"] = [(x["step"], x["mean_iou"]) for x in records(cfg, "val")]
    for k in range(4):
        found[f"iou/class {k}"] = [(x["step"], x["iou"][k]) for x in records(cfg, "val")]
    return found


def events_of(folder):
    tensorboard = pytest.importorskip("tensorboard")
    assert tensorboard
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return found.Reload()


def curves_of(events):
    return {
        tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def agree(found, expected):
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        # TensorBoard stores float32.
        assert [v for _, v in found[name]] == pytest.approx([v for _, v in points], rel=1e-6), name


# ------------------------------------------------------------------------------ TensorBoard
def test_tensorboard_has_curves_pictures_and_settings(settings):
    pytest.importorskip("tensorboard")
    cfg = settings(TRAIN__logger="tensorboard", TRAIN__eval_epochs=1)
    train(cfg, [CPU], progress=False)
    events = events_of(Path(cfg.DIR) / "tensorboard")
    agree(curves_of(events), expected_of(cfg))
    pictures = {f"images/{k}" for k in range(4)}
    assert set(events.Tags()["images"]) == pictures
    image = events.Images("images/0")
    # Image, ground truth and prediction side by side, (48, 64) each.
    assert [(x.step, x.height, x.width) for x in image] == [(2, 48, 3 * 64), (4, 48, 3 * 64)]
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "arch_encoder: small" in text
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"TRAIN.lr_encoder" in content and b"MODEL.arch_encoder" in content


def test_a_resumed_run_is_the_same_curve(settings, monkeypatch):
    pytest.importorskip("tensorboard")
    cfg = settings(TRAIN__logger=["tensorboard"], TRAIN__eval_epochs=1)
    with monkeypatch.context() as patch:
        signal_after(2, signal.SIGTERM, patch)
        assert train(cfg, [CPU], progress=False)["step"] == 3
    train(cfg, [CPU], resume="auto", progress=False)
    agree(curves_of(events_of(Path(cfg.DIR) / "tensorboard")), expected_of(cfg))
    # A new training in the same folder begins with nothing.
    train(cfg, [CPU], progress=False)
    assert (Path(cfg.DIR) / "earlier_1" / "tensorboard").is_dir()
    agree(curves_of(events_of(Path(cfg.DIR) / "tensorboard")), expected_of(cfg))


def logged(folder, name, *parts):
    """Log parts of a run, each (first step, last step, loss), as after a kill; no settings."""
    options = load_options(None, ["DIR", str(folder)])
    for first, last, loss in parts:
        found = Loggers([name], folder, options, "recipe: 1", ["road"])
        found.open(first - 1)
        for step in range(first, last + 1):
            found.add({"kind": "train", "step": step, "loss": loss, "accuracy": math.nan}, {})
        found.close()


def test_what_a_killed_run_logged_after_its_state_is_replaced(tmp_path):
    pytest.importorskip("tensorboard")
    logged(tmp_path, "tensorboard", (1, 5, 1.0), (4, 6, 2.0))
    curves = curves_of(events_of(tmp_path / "tensorboard"))
    assert curves == {"train/loss": [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]}


# ------------------------------------------------------------------------------ W&B
def wandb_records(folder):
    """The records of the files that W&B's offline mode writes: a log of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # the rest of a block is padding
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4) and at <= len(data):  # whole, or the last part
                yield Record.FromString(whole)
                whole = b""


def test_wandb_offline(settings, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "streets")
    cfg = settings(TRAIN__logger="wandb", TRAIN__eval_epochs=1)
    with monkeypatch.context() as patch:
        signal_after(2, signal.SIGTERM, patch)
        train(cfg, [CPU], progress=False)
    train(cfg, [CPU], resume="auto", progress=False)
    assert wandb.run is None
    runs, config, curves, pictures = [], {}, {}, 0
    end = time.monotonic() + 30  # W&B's own process writes the files
    while [x.WhichOneof("record_type") for x in wandb_records(Path(cfg.DIR))].count("exit") < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    for record in wandb_records(Path(cfg.DIR)):
        if record.WhichOneof("record_type") == "run":
            runs.append((record.run.run_id, record.run.project, record.run.display_name))
            config |= {x.key: json.loads(x.value_json) for x in record.run.config.update}
        elif record.WhichOneof("record_type") == "history":
            row = {x.key or x.nested_key[0]: json.loads(x.value_json) for x in record.history.item}
            pictures += sum(key.startswith("images/") for key in row)
            for key, value in row.items():
                if isinstance(value, (int, float)):
                    curves.setdefault(key, []).append((row["step"], value))
    assert len(set(runs)) == 1 and runs[0][1:] == ("streets", "model")
    assert config["TRAIN.lr_encoder"] == 0.02 and config["MODEL.arch_encoder"] == "small"
    agree(curves, expected_of(cfg))
    assert pictures >= 8


def test_wandb_without_login_is_left_out(settings, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    logged(Path(settings().DIR), "wandb", (1, 2, 1.0))
    assert "run `wandb login`, or set WANDB_MODE=offline" in caplog.text


# ------------------------------------------------------------------------------ MLflow
def test_mlflow_store(settings, monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    cfg = settings(TRAIN__logger="mlflow", TRAIN__eval_epochs=1)
    with monkeypatch.context() as patch:
        signal_after(2, signal.SIGTERM, patch)
        train(cfg, [CPU], progress=False)
    train(cfg, [CPU], resume="auto", progress=False)
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mit_semseg").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "model"
    assert run.data.params["TRAIN.lr_encoder"] == "0.02"
    curves = {
        name: [(x.step, x.value) for x in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    agree(curves, expected_of(cfg))
    artifacts = {x.path for x in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"recipe.yaml", "images"}
    pictures = [x.path for x in client.list_artifacts(run.info.run_id, "images/0")]
    assert pictures == ["images/0/step_2.png", "images/0/step_4.png"]


# ------------------------------------------------------------------------------ failures
class Fake(Logger):
    """Fails in one of its methods, or waits in it."""

    package = "json"
    fails = ""
    waits = None
    seen = ()

    def open(self, run):
        self.act("open")

    def log(self, step, values, images):
        Fake.seen += (step,)
        self.act("log")

    def close(self):
        self.act("close")

    def act(self, method):
        if method == self.fails:
            raise OSError(28, "No space left on device")
        if self.waits is not None:
            self.waits.wait(60)


@pytest.fixture
def fake(monkeypatch):
    for name, value in (("fails", ""), ("waits", None), ("seen", ())):
        monkeypatch.setattr(Fake, name, value)
    monkeypatch.setitem(LOGGERS, "tensorboard", Fake)
    return Fake


@pytest.mark.parametrize("method", ["open", "log", "close"])
def test_a_failing_logger_is_warned_of_once(settings, fake, caplog, method):
    fake.fails = method
    cfg = settings(TRAIN__logger="tensorboard", TRAIN__eval_epochs=1)
    result = train(cfg, [CPU], progress=False)
    assert result["stopped"] == "" and len(records(cfg, "train")) == 4
    warnings = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    (line,) = [x for x in warnings if "TRAIN.logger" in x]
    assert line.startswith("TRAIN.logger tensorboard is left out (OSError: [Errno 28] No space")
    steps = [x["step"] for x in records(cfg, "train")]
    assert sorted({*fake.seen}) == {"open": [], "log": [1], "close": steps}[method]


def test_a_waiting_logger_does_not_slow_the_training(settings, fake, caplog, monkeypatch):
    fake.waits = threading.Event()
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    monkeypatch.setattr(module, "LAST_SECONDS", 0.3)
    cfg = settings(TRAIN__logger="tensorboard", TRAIN__num_epoch=4)
    began = time.monotonic()
    train(cfg, [CPU], progress=False)
    assert time.monotonic() - began < 20
    assert len(records(cfg, "train")) == 8
    text = caplog.text
    assert text.count("cannot keep up: some records are not logged") == 1
    assert text.count("does not end: its last records may be missing") == 1
    fake.waits.set()


def test_one_of_two_goes_on(tmp_path, fake, monkeypatch):
    pytest.importorskip("tensorboard")
    fake.fails = "log"
    monkeypatch.setitem(LOGGERS, "tensorboard", module.TensorBoard)
    monkeypatch.setitem(LOGGERS, "mlflow", Fake)
    found = Loggers(["mlflow", "tensorboard"], tmp_path, Options(), "", ["road"])
    found.open(0)
    for step in (1, 2):
        found.add({"kind": "train", "step": step, "loss": 0.5}, {})
    found.close()
    assert curves_of(events_of(tmp_path / "tensorboard"))["train/loss"] == [(1, 0.5), (2, 0.5)]
    assert fake.seen == (1,)


def test_only_rank_0_logs(settings, fake):
    from mit_semseg.engine.training.build import build

    cfg = settings(TRAIN__logger="tensorboard")
    assert trainer_of(cfg).parts.metrics.loggers is not None
    assert build(cfg, [CPU], rank=1, progress=False).metrics.loggers is None


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_an_error_before_the_data_is_read(settings, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    cfg = settings(TRAIN__logger=name, DATASET__list_train="nothing.odgt")
    with pytest.raises(ValueError, match=rf"{name} needs {name}: pip install 'mit_semseg\[{name}"):
        trainer_of(cfg)


def test_an_unknown_logger_is_refused():
    with pytest.raises(ValueError, match="TRAIN.logger is .*; give tensorboard, wandb, mlflow"):
        load_options(None, ["TRAIN.logger", "csv"])
    options = load_options(None, ["TRAIN.logger", "wandb,tensorboard"])
    assert options.TRAIN.logger == ("wandb", "tensorboard")


def test_pictures_of_large_images_and_of_a_rank():
    colors = np.zeros((2, 3), np.uint8)
    pictures = ValidationPictures(100, 2, 3, colors)
    assert len(pictures.numbers) == 4
    assert all(k // 2 % 3 == 0 for k in pictures.numbers)
    maps = torch.zeros(1100, 600, dtype=torch.int64)
    for number in (*pictures.numbers, 2):
        pictures.add(number, np.zeros((1100, 600, 3), np.uint8), maps, maps)
    drawn = pictures.take()
    assert [*drawn] == [f"images/{k}" for k in pictures.numbers]
    assert drawn["images/0"].shape == (367, 3 * 200, 3)
    assert pictures.take() == {}
