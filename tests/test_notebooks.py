"""The notebooks: without outputs in git, and executed by `make notebooks`."""

import io
import json
import os
import re
import shlex
import sys
import time
from contextlib import redirect_stderr

import pytest
from source_tree import ROOT

from mit_semseg import shipped
from mit_semseg.arguments import build_parser
from mit_semseg.cli import split_overrides
from mit_semseg.config import get_defaults
from mit_semseg.config.node import keys

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
KEYS = {*keys(get_defaults())}
SECONDS = 300  # of one cell; a notebook takes less than a minute on an idle core
# Downloads, and what is there instead.
OFFLINE = {
    '"ade20k-resnet50dilated-ppm_deepsup"': f'"{shipped.MODEL}"',
    '(\n    "http://sceneparsing.csail.mit.edu/data/ADEChallengeData2016/images/validation/"\n'
    '    "ADE_val_00001519.jpg"\n)': f'"{ROOT}/docs/images/training.png"',
}


def cells_of(notebook, kind="code"):
    found = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def commands_of(notebook):
    text = "\n".join(cells_of(notebook)).replace("\\\n", " ")
    return re.findall(r"^!mit-semseg (.*)$", text, re.MULTILINE)


def test_there_are_notebooks():
    names = {notebook.stem for notebook in NOTEBOOKS}
    assert {"predict", "train_on_your_masks", "finetune", "export", "demo_segmenter"} <= names


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_what_is_in_git(notebook):
    """No outputs; a badge that opens this file; and a first cell that installs what is missing."""
    content = json.loads(notebook.read_text("utf-8"))
    assert content["nbformat"] == 4 and content["metadata"]["kernelspec"]["name"] == "python3"
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert f"/blob/main/notebooks/{notebook.name})" in cells_of(notebook, "markdown")[0]
    first, *others = cells_of(notebook)
    assert re.search(r"\nif .*None.*:\n    %pip install ", first) and '"mit_semseg"' in first
    assert not [cell for cell in others if "pip install" in cell]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_commands_and_keys_exist(notebook):
    for command in commands_of(notebook):
        words = shlex.split(re.sub(r"\d?>\S+", "", command))
        with redirect_stderr(io.StringIO()) as errors:
            try:
                parsed = build_parser().parse_args(words)
            except SystemExit:
                pytest.fail(f"{command}: {errors.getvalue()}")
        overrides = (
            getattr(parsed, "opts", None) or split_overrides(getattr(parsed, "images", []))[1]
        )
        assert {*overrides[::2]} <= KEYS, command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`mit-semseg` of this tree on the path, as pip installs it."""
    script = tmp_path / "bin" / "mit-semseg"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mit_semseg.cli "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.notebooks
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_runs(notebook, command, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        for online, offline in OFFLINE.items():
            cell.source = cell.source.replace(online, offline)
    place = tmp_path / "place"
    place.mkdir()
    began = time.monotonic()
    client = nbclient.NotebookClient(
        content, timeout=SECONDS, resources={"metadata": {"path": str(place)}}
    )
    try:
        client.execute()
    finally:
        printed = "".join(
            output.get("text", "")
            for cell in content.cells
            for output in cell.get("outputs", ())
            if output.output_type == "stream"
        )
        print(printed, f"\n{notebook.stem}: {time.monotonic() - began:.0f} s", sep="")
    # A command that fails is no error of its cell.
    assert not re.findall(r"^(?:error: |usage: |Traceback|.*not found).*", printed, re.MULTILINE)
    pictures = [
        output
        for cell in content.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert pictures
