"""A small model in a checkpoint folder, and a few small images: what tests of runs start from."""

import json
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from download_server import Server
from hypothesis import settings
from PIL import Image
from processes import forkserver

from mit_semseg.config import load_config
from mit_semseg.dataset import ClassTable
from mit_semseg.engine.checkpoint import CheckpointFolder
from mit_semseg.models import ModelBuilder

FIXTURES = Path(__file__).with_name("fixtures")
sys.path.insert(0, str(FIXTURES))  # for `fill`
# Buffers of the published SyncBN, which are dropped when its files are loaded.
BOOKKEEPING = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")

# The same examples in every run, however slow the machine: a red run must mean a change.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_configure(config):
    """Hide GPUs, enable Control-C, and give each of several processes a core.

    Tests without the marker `gpu` run on the CPU whatever the machine has: GPUs are hidden from
    this process and from what it starts, before torch looks for them.

    Control-C is disabled in a shell's background. Where several processes share the tests, each
    keeps itself and what it starts to one core: threads that wait for each other's core make all
    of them slower than one process.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)


def pytest_runtest_setup(item):
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    """What tests log of file names that are no UTF-8 must not stop processes that report it."""
    report = (yield).get_result()
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]


@pytest.fixture
def forked(monkeypatch):
    """What is spawned is forked instead, from a process that has imported torch."""
    get_context = multiprocessing.get_context

    def get(method=None):
        return forkserver() if method == "spawn" else get_context(method)

    monkeypatch.setattr(multiprocessing, "get_context", get)


@pytest.fixture(scope="session")
def make_model():
    """`make_model(folder, names, SECTION__key=value)` -> configuration."""
    return _make_model


@pytest.fixture(scope="session")
def published_shapes():
    """Keys and shapes of every published state dict, without the buffers of its SyncBN."""
    table = json.loads((FIXTURES / "state_dicts.json").read_text())
    return {
        name: {k: v for k, v in shapes.items() if k.rsplit(".", 1)[-1] not in BOOKKEEPING}
        for name, shapes in table.items()
    }


@pytest.fixture(scope="session")
def make_images():
    """`make_images(root, [(height, width), ...])` writes images, masks and `val.odgt`."""
    return _make_images


def _make_model(folder, names, **settings):
    """A checkpoint folder with a small random model, and its configuration."""
    torch.manual_seed(0)
    opts = [
        *("DIR", str(folder), "DATASET.num_class", len(names)),
        *("DATASET.imgSizes", [32, 48], "DATASET.imgMaxSize", 80),
        *("MODEL.arch_encoder", "mobilenetv2dilated", "MODEL.arch_decoder", "c1"),
        *("MODEL.fc_dim", 320, "MODEL.weights_encoder", "none"),
        *("VAL.checkpoint", "best.pth", "TEST.checkpoint", "best.pth"),
    ]
    for key, value in settings.items():
        opts += [key.replace("__", "."), value]
    cfg = load_config(None, opts)
    module = ModelBuilder.from_config(cfg)
    # An untrained network sees almost nothing and prefers one class: take the statistics of some
    # images, and give all classes the same chance on them.
    last = [m for m in module.decoder.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    assert last.bias is not None
    with torch.no_grad():
        images = F.interpolate(torch.randn(4, 3, 6, 8), size=(48, 64), mode="nearest")
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = 1.0
        module.train().logits(images)
        std, mean = torch.std_mean(module.eval().logits(images), dim=(0, 2, 3))
        last.weight.div_(std[:, None, None, None])
        last.bias.copy_((last.bias - mean) / std)
    checkpoints = CheckpointFolder(folder)
    checkpoints.prepare(cfg, ClassTable.of(names))
    checkpoints.save("best.pth", module.encoder.state_dict(), module.decoder.state_dict())
    return cfg


def _make_images(root, sizes):
    """Images with masks (0 ignored, 1.. classes) and their list `val.odgt`."""
    rng = np.random.default_rng(1)
    lines = []
    for k, (height, width) in enumerate(sizes):
        # Blocks, so that resizing keeps something to look at.
        blocks = rng.integers(0, 4, (height // 8, width // 8))
        mask = blocks.repeat(8, 0).repeat(8, 1).astype(np.uint8)
        noise = rng.integers(0, 60, (height, width, 3))
        image = (mask[:, :, None] * 60 + noise).clip(0, 255).astype(np.uint8)
        for name, array in (("img", image), ("ann", mask)):
            path = root / name / f"part{k % 2}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
        image, mask = (f"{name}/part{k % 2}/{k}.png" for name in ("img", "ann"))
        record = {"fpath_img": image, "fpath_segm": mask, "width": width, "height": height}
        lines.append(json.dumps(record))
    (root / "val.odgt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def server(monkeypatch):
    """A server for downloads, without the pauses between attempts."""
    for name in ("MIT_SEMSEG_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mit_semseg.download._PAUSE", 0.01)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def dest(tmp_path):
    """Where a download is to go."""
    return tmp_path / "cache" / "w.pth"
