"""Training on random crops: as a user starts it, and resumed."""

import multiprocessing
from pathlib import Path

import pytest
from jobs import figures_of
from small_runs import CPU, DROPOUT, assert_same_weights, trainer_of

from mit_semseg.cli import main
from mit_semseg.config import dump_config
from mit_semseg.engine.checkpoint import CheckpointFolder
from mit_semseg.engine.train import train
from mit_semseg.engine.training import loader

CROPS = {"DATASET__batching": "crop", "DATASET__crop_size": [32, 40], "DATASET__color_jitter": 0.4}


def test_three_steps_from_the_command_line(settings, tmp_path, capsys):
    cfg, file = settings(**CROPS, TRAIN__num_epoch=1, TRAIN__epoch_iters=3), tmp_path / "crops.yaml"
    dump_config(cfg, file)
    common = ["train", "--gpus", "cpu", "--cfg", str(file)]
    assert main([*common, "TRAIN.eval_epochs", "1"]) == 0
    losses = [x["loss"] for x in figures_of(Path(cfg.DIR))]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    assert CheckpointFolder(cfg.DIR).config().DATASET.batching == "crop"
    capsys.readouterr()
    assert main([*common, "DIR", str(tmp_path / "none"), "DATASET.crop_size", "(30, 41)"]) != 0
    output = capsys.readouterr().err
    assert "DATASET.crop_size is [30, 41]" in output and "Traceback" not in output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("cores", "first", "then"), [(2, 1, 1), (16, 3, 2)])
def test_a_resumed_run_is_identical_for_any_number_of_workers(
    settings, monkeypatch, cores, first, then
):
    """On the CPU there are at most half as many loading processes as cores."""
    monkeypatch.setattr(loader, "cpu_count", lambda: cores)
    begin, started = loader.TrainLoader.__init__, []

    def begun(self, *args, **options):
        begin(self, *args, **options)
        started.append(len(multiprocessing.active_children()))

    monkeypatch.setattr(loader.TrainLoader, "__init__", begun)
    # Dropout draws from the global generator, which crops must leave alone.
    whole, cut = settings("whole", **CROPS, **DROPOUT), settings("cut", **CROPS, **DROPOUT)
    train(whole, [CPU], progress=False)
    cut.TRAIN.workers = first
    trainer = trainer_of(cut)
    finish = trainer._finish_epoch

    def stop(epoch):
        finish(epoch)
        raise KeyboardInterrupt

    trainer._finish_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert "epoch_2.pth" not in CheckpointFolder(cut.DIR).names()
    cut.TRAIN.workers = 2
    train(cut, [CPU], resume=True, progress=False)
    assert started == [0, first, then]
    assert_same_weights(whole, cut, "epoch_2.pth")
