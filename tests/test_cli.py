"""The command line: instant help, one line for each mistake, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mit_semseg.cli import main, split_overrides

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["predict"], ["data"], ["demo"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: mit-semseg" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train.py", "eval_multipro.py", "eval.py", "test.py"])
def test_scripts_keep_the_published_names(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "--cfg" in done.stdout
    assert len((ROOT / script).read_text().splitlines()) < 60


def test_help_does_not_import_torch() -> None:
    code = "import sys, mit_semseg.cli as c; c.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--cfg", "config/none.yaml"], "config/none.yaml does not exist"),
        (["train", "--gpus", "cpu", "TRAIN.lr", "1"], "unknown key TRAIN.lr"),
        (["train", "--gpus", "cpu", "MODEL.fc_dim", "512"], "MODEL.fc_dim is 512"),
        (["eval", "--gpus", "zero"], "zero"),
        (["eval", "--gpus", "99"], "--gpus cpu runs without one"),
        (["predict", "--imgs", "nothing.jpg", "--gpu", "cpu"], "nothing.jpg"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    assert main(arguments) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    assert message in err[0]


def test_overrides_after_several_images(tmp_path: Path) -> None:
    assert split_overrides(["a.jpg", "b.jpg", "TEST.result", "out"]) == (
        ["a.jpg", "b.jpg"],
        ["TEST.result", "out"],
    )
    assert split_overrides(["a.jpg", "DIR"]) == (["a.jpg", "DIR"], [])


def test_module_form() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mit_semseg.cli", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0
    for command in ("train", "eval", "predict", "pack", "data", "demo"):
        assert command in done.stdout
