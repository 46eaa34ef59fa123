"""Training on random crops: as a user starts it, and resumed."""

import json
import multiprocessing

import pytest
import torch
import yaml

from mit_semseg.cli import main
from mit_semseg.config import load_config
from mit_semseg.engine.checkpoint import CheckpointFolder
from mit_semseg.engine.train import train
from mit_semseg.engine.training import loader
from mit_semseg.engine.training.build import build
from mit_semseg.engine.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path, make_images):
    """A yaml of a small job on four images, two of them upright."""
    root = tmp_path / "data"
    make_images(root, [(48, 64), (64, 48), (48, 64), (64, 48)])
    tree = {
        "DATASET": {
            "root_dataset": str(root),
            "list_train": str(root / "val.odgt"),
            "list_val": str(root / "val.odgt"),
            "num_class": 4,
            "label_offset": 0,
            "imgSizes": [48],
            "segm_downsampling_rate": 4,
            "batching": "crop",
            "crop_size": [32, 40],
            "color_jitter": 0.4,
        },
        "MODEL": {
            "arch_encoder": "mobilenetv2dilated",
            "arch_decoder": "c1_deepsup",
            "fc_dim": 320,
            "weights_encoder": "none",
        },
        "TRAIN": {
            "batch_size_per_gpu": 2,
            "num_epoch": 1,
            "epoch_iters": 3,
            "workers": 0,
            "eval_epochs": 0,
            "disp_iter": 1,
        },
    }
    path = tmp_path / "crops.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def weights(cfg, name):
    files = CheckpointFolder(cfg.DIR).files(name)
    return [v for file in files for v in torch.load(file, weights_only=True).values()]


def test_three_steps_from_the_command_line(recipe, tmp_path, capsys):
    folder = tmp_path / "model"
    common = ["train", "--gpus", "cpu", "--cfg", str(recipe)]
    assert main([*common, "DIR", str(folder), "TRAIN.eval_epochs", "1"]) == 0
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if x["kind"] == "train"]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    assert CheckpointFolder(folder).config().DATASET.batching == "crop"
    capsys.readouterr()
    assert main([*common, "DIR", str(tmp_path / "none"), "DATASET.crop_size", "(30, 40)"]) != 0
    said = capsys.readouterr().err
    assert "DATASET.crop_size is [30, 40]" in said and "Traceback" not in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("cores", "first", "then"), [(2, 1, 1), (16, 3, 2)])
def test_a_resumed_run_is_identical_for_any_number_of_workers(
    recipe, tmp_path, monkeypatch, cores, first, then
):
    """On the CPU there are at most half as many loading processes as cores."""
    monkeypatch.setattr(loader, "cpu_count", lambda: cores)
    begin, started = loader.TrainLoader.__init__, []

    def begun(self, *args, **options):
        begin(self, *args, **options)
        started.append(len(multiprocessing.active_children()))

    monkeypatch.setattr(loader.TrainLoader, "__init__", begun)

    def settings(name, workers):
        opts = ["DIR", str(tmp_path / name), "TRAIN.num_epoch", "2", "TRAIN.epoch_iters", "2"]
        # Dropout draws from the global generator, which crops must leave alone.
        dropout = ["MODEL.arch_decoder", "ppm_deepsup", "TRAIN.workers", str(workers)]
        return load_config(recipe, [*opts, *dropout])

    whole = settings("whole", 0)
    train(whole, [CPU], progress=False)
    cut = settings("cut", first)
    trainer = Trainer(build(cut, [CPU], progress=False))
    finish = trainer._finish_epoch

    def stop(epoch):
        finish(epoch)
        raise KeyboardInterrupt

    trainer._finish_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert "epoch_2.pth" not in CheckpointFolder(cut.DIR).names()
    train(settings("cut", 2), [CPU], resume=True, progress=False)
    assert started == [0, first, then]
    pairs = zip(weights(whole, "epoch_2.pth"), weights(cut, "epoch_2.pth"), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
