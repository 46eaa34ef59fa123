"""The drills of `mit-semseg selftest`, in their quick form: what is promised has to hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mit_semseg.dataset.images import image_size
from mit_semseg.dataset.records import read_odgt
from mit_semseg.selftest.command import DRILLS, line, selftest
from mit_semseg.selftest.drills import Outcome
from mit_semseg.selftest.job import Ground, Job, Running
from mit_semseg.selftest.soak import soak

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the drills look at processes in /proc"
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("selftest"), "c1_deepsup")


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    yield
    for running in list(Running.started):
        running.destroy()


# The quick soak does these, too, or other tests do: of checkpoints, of the pool, of torchrun, of
# training (signals).
SLOW = ("damaged", "lost_evaluator", "lost_rank", "signalled")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in DRILLS]
)
def test_what_is_promised_holds(name: str, ground: Ground) -> None:
    outcome = DRILLS[name](ground, True)
    assert outcome.held, line(outcome)
    assert outcome.figures


def test_the_drill_of_memory_evaluates_images_of_several_sizes(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists: list[str] = []

    def start(job: Job, command: str, *options: str) -> Running:
        lists.append(options[options.index("DATASET.list_val") + 1])
        raise InterruptedError

    monkeypatch.setattr(Ground, "unbroken", lambda ground: ground.job("never_trained"))
    monkeypatch.setattr(Job, "start", start)
    with pytest.raises(InterruptedError):
        DRILLS["evaluation_memory"](ground, True)
    records = read_odgt(lists[0])
    sizes = {image_size(ground.data() / str(record["fpath_img"])) for record in records}
    assert len(records) == 200 and len(sizes) >= 2, sizes


@pytest.mark.slow
def test_nothing_is_lost_whatever_happens(ground: Ground) -> None:
    outcome = soak(ground, 0.007, {}, say=lambda text: None)
    assert outcome.held, line(outcome)
    assert outcome.figures["runs completed"] >= 1
    assert outcome.figures["starts"] > outcome.figures["runs completed"]


def test_a_difference_is_found(ground: Ground) -> None:
    job, other = ground.unbroken(), ground.job("other")
    files = {file.name: file for file in Path(job.cfg.DIR).iterdir() if file.is_file()}
    Path(other.cfg.DIR).mkdir()
    for name, file in files.items():
        (Path(other.cfg.DIR) / name).write_bytes(file.read_bytes())
    assert other.differences(job) == 0
    decoder = Path(other.cfg.DIR) / "decoder_best.pth"
    weights = torch.load(decoder, weights_only=True)
    weight = next(iter(weights.values()))
    weight[(0,) * weight.ndim] += 1e-6
    torch.save(weights, decoder)
    journal = Path(other.cfg.DIR) / "metrics.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    assert other.differences(job) == 2


def test_results_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Outcome("a name", "a promise")
    broken.check(False, "what\nhappened")
    broken.check(False, "later")
    monkeypatch.setitem(DRILLS, "fake", lambda ground, quick: broken)
    (outcome,) = selftest(tmp_path, only="fake")
    assert not outcome.held and outcome.complaint == "what\nhappened"
    found = json.loads((tmp_path / "selftest.json").read_text())
    assert found["drills"][0]["name"] == "a name" and not found["drills"][0]["held"]
    assert "| a name | a promise | **no** |" in (tmp_path / "selftest.md").read_text()
    with pytest.raises(ValueError, match="no drill is called 'nothing'; there are killed, "):
        selftest(tmp_path, only="nothing")
    with pytest.raises(ValueError, match="--soak HOURS"):
        selftest(tmp_path, only="soak")


def test_a_collection_copies_no_page_shared_with_loading_processes(ground: Ground) -> None:
    """What the drill of memory would find after some thousand steps, at once."""
    code = (
        "import gc, sys; from mit_semseg.selftest.job import Ground\n"
        "from mit_semseg.engine.training.build import build\n"
        "from mit_semseg.selftest.memory import proportional_mib\n"
        "import os, torch; from mit_semseg.config import load_config\n"
        "parts = build(load_config(sys.argv[1]), [torch.device('cpu')], progress=False)\n"
        "loader = parts.loader(first=0, micro_steps=100)\n"
        "next(iter(loader))\n"
        "before = proportional_mib(os.getpid()); gc.collect()\n"
        "print(proportional_mib(os.getpid()) - before); loader.close()"
    )
    job = ground.job("collection", TRAIN__workers=1)
    grown = subprocess.run(
        [sys.executable, "-c", code, str(job.file)], capture_output=True, text=True, check=True
    )
    assert float(grown.stdout) < 10
