"""Small trainings in this process: a network of a few thousand weights, on four images."""

import os

import torch
from torch import nn

from mit_semseg.engine.training.build import build
from mit_semseg.engine.training.checkpoints import RunFolder
from mit_semseg.engine.training.step import TrainStep
from mit_semseg.engine.training.trainer import Trainer
from mit_semseg.lib.nn import SynchronizedBatchNorm2d as BatchNorm2d
from mit_semseg.models import ENCODERS, Encoder
from mit_semseg.models.encoders.base import Variant
from mit_semseg.models.encoders.resnet import BasicBlock

CPU = torch.device("cpu")


class Small(Encoder):
    """A convolution and a block at a quarter of the size, with dropout if it is asked for."""

    channels = (16,)
    strides = (4,)

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 5, 4, padding=2, bias=False), BatchNorm2d(16)
        self.stage, self.dropout = nn.Sequential(BasicBlock(16, 16)), nn.Dropout(dropout)

    def feature_maps(self, images):
        return [self.dropout(self.stage(self.norm(self.conv(images)).relu()))]


SMALL = {"small": Small, "small_dropout": Variant(Small, dropout=0.1)}
# With it, random numbers must line up, too.
DROPOUT = {"MODEL__arch_encoder": "small_dropout"}


def register():
    """Register the encoders until this process ends: one without tests of every encoder."""
    ENCODERS._entries.update(SMALL)


def trainer_of(cfg, devices=(CPU,), resume="", job=""):
    """A trainer that has not begun."""
    return Trainer(build(cfg, devices, progress=False, resume=resume, job=job))


def weights(cfg, checkpoint):
    """Tensors of both files of a checkpoint."""
    return {
        f"{file.name[:7]}.{key}": value
        for file in RunFolder(cfg.DIR).files(checkpoint)
        for key, value in torch.load(file, weights_only=True).items()
    }


def state_of(cfg):
    """The newest state of a run."""
    found = RunFolder(cfg.DIR).newest_state()
    assert found is not None
    return found[1]


def assert_same_weights(one, other, checkpoint):
    """Bit by bit."""
    expected, got = weights(one, checkpoint), weights(other, checkpoint)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key


def signal_after(steps, number, monkeypatch):
    """Send this process a signal in the middle of a step."""
    take_step, add = Trainer._step, TrainStep.add
    running = []

    def remember(self, *args):
        running[:] = [self]
        return take_step(self, *args)

    def and_signal(self, batch):
        if running[0].progress.step == steps and not running[0].parts.supervisor.stop_signal:
            os.kill(os.getpid(), number)
        add(self, batch)

    monkeypatch.setattr(Trainer, "_step", remember)
    monkeypatch.setattr(TrainStep, "add", and_signal)
