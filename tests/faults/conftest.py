"""What tests of faults have in common: rendered scenes, and a training that nothing happens to."""

from unittest import mock

import pytest
import torch
from trainings import Training

from mit_semseg.demo import streets
from mit_semseg.engine import cpu
from mit_semseg.engine.train import train


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """`training(name, SECTION__key=value)`: one that has not begun, on 12 small scenes."""
    root = tmp_path_factory.mktemp("faults")
    scenes = streets.write(root / "scenes", 12, 4, size=(96, 128))
    return lambda name, **settings: Training(root / name, scenes, **settings)


@pytest.fixture(scope="module")
def unbroken(training):
    """`unbroken(SECTION__key=value)`: the training to compare with, made at the first call."""
    known = {}

    def unbroken(**settings):
        key = repr(sorted(settings.items()))
        if key not in known:
            known[key] = training(f"unbroken_{len(known)}", **settings)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as the commands have it that are compared with it
            with mock.patch.object(cpu, "_fixed_threads", 1):
                train(known[key].cfg, [torch.device("cpu")], progress=False)
            torch.set_num_threads(threads)
        return known[key]

    return unbroken
