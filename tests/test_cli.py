"""The command line: instant help, one line for each mistake, exit codes."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mit_semseg
from mit_semseg import arguments as shown
from mit_semseg import cli
from mit_semseg.cli import main, split_overrides
from mit_semseg.dataset import FORMATS
from mit_semseg.dataset.downloads import sources

ROOT = Path(__file__).resolve().parents[1]


def run(*words):
    """Standard output of Python with these words, in a process of its own."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, timeout=60, **PIPES)
    assert done.returncode == 0, done.stderr
    return done.stdout


PIPES = {"capture_output": True, "text": True, "env": {**os.environ, "COLUMNS": "100"}}


@pytest.mark.parametrize(
    ("words", "output"),
    [
        *(
            (words, "usage: mit-semseg")
            for words in ("", "train", "eval", "predict", "data", "demo")
        ),
        ("--version", f"mit-semseg {mit_semseg.__version__}\n"),
    ],
)
def test_help_and_version(words, output, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), *([] if "--" in words else ["--help"])])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(output)


def test_scripts_and_the_module_can_be_run():
    for script in ("train.py", "eval_multipro.py", "eval.py", "test.py"):
        assert "--cfg" in run(script, "--help")
    output = run("-m", "mit_semseg.cli", "--help")
    assert all(name in output for name in ("train", "eval", "predict", "pack", "data", "demo"))


HEAVY = "torch", "torchvision", "numpy", "cv2", "scipy", "PIL", "matplotlib", "jinja2"
STATUSES = {
    0: ["--help", "--version", "data --help", "data check --help", "demo --help"],
    2: [
        *("nonsense", "train --nonsense", "train --arch_encoder resnet50"),
        *("train --precision bf17", "train --cfg nowhere.yaml", "eval TRAIN.lr 1", "predict"),
        *("predict --imgs a.jpg TEST.precision half", "pack", "bench --device tpu", "data"),
        *("data nonsense", "data make-odgt --images a", "data check a.odgt --num-class x"),
        *("data check val --cfg nowhere.yaml", "data download", "demo render --size x"),
        *("demo page --images x", "demo page --cfg nowhere.yaml"),
    ],
}


def test_help_and_mistakes_are_instant():
    # All in one process: none may leave a heavy module behind.
    code = f"""
import contextlib, sys, time, mit_semseg
assert not (heavy := set({HEAVY}) & set(sys.modules)), ("the package", heavy)
from mit_semseg.cli import main
for expected, line in {[(k, line) for k, lines in STATUSES.items() for line in lines]}:
    arguments, began = line.split(), time.monotonic()
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == expected, arguments
    assert time.monotonic() - began < 2.0, arguments  # 0.1 s on a quiet machine
    assert not (heavy := set({HEAVY}) & set(sys.modules)), (arguments, heavy)
assert main(["eval", "--gpus", "zero"]) == 2 and "torch" not in sys.modules
import mit_semseg.engine.train, mit_semseg.segmenter, mit_semseg.tools.sweep
slow = {{"torch._dynamo", "matplotlib", "jinja2", "timm"}} & set(sys.modules)
assert not slow, f"{{slow}} are imported before they are used"
"""
    run("-c", code)


@pytest.fixture
def calls(monkeypatch):
    """What train, evaluate and predict would have been called with: configurations and options."""
    calls = []

    def stub(result):
        return lambda cfg, *args, **options: calls.append((cfg, options)) or result

    trained = {"best_mean_iou": None, "checkpoint": "x", "stopped": ""}
    for name, result in (("train", trained), ("evaluate", {"failed": []}), ("predict", [])):
        monkeypatch.setattr(f"mit_semseg.engine.{name}.{name}", stub(result))
    return calls


DEMO = ["--cfg", str(ROOT / "config" / "demo.yaml")]


@pytest.mark.parametrize(
    ("words", "section"),
    [
        ("train --gpus cpu", "TRAIN"),
        ("eval --gpus cpu", "VAL"),
        ("predict --imgs a.jpg --gpu cpu", "TEST"),
    ],
)
def test_precision_option_beats_the_configuration(words, section, calls, tmp_path):
    for option in (["--precision", "bf16"], []):
        configured = [f"{section}.precision", "fp32", "DIR", str(tmp_path)]
        assert main([*words.split(), *option, *DEMO, *configured]) == 0
    found = [cfg for cfg, _ in calls]
    assert [cfg[section].precision for cfg in found] == ["bf16", "fp32"]
    others = {"TRAIN", "VAL", "TEST"} - {section}
    assert all(found[0][x].precision == found[1][x].precision for x in others)


@pytest.mark.parametrize(
    "words", ["train --gpus cpu", "eval --gpus cpu", "predict --imgs a.jpg --gpu cpu", "config"]
)
def test_a_configuration_file_is_parsed_once(words, calls, tmp_path, monkeypatch):
    parsed = []
    load = yaml.load
    monkeypatch.setattr(
        yaml, "load", lambda text, loader: parsed.append(text) or load(text, loader)
    )
    assert main([*words.split(), *DEMO, "DIR", str(tmp_path)]) == 0
    assert len(parsed) == 1


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train", "--gpus", "cpu"], "TRAIN.precision"),
        (["eval", "--gpus", "cpu"], "VAL.precision"),
        (["predict", "--gpu", "cpu", "--imgs", "missing"], "TEST.precision"),
    ],
)
def test_a_precision_for_gpus_is_refused_before_data_is_read(
    words,
    key,
    precision,
    tmp_path,
    capsys,
):
    settings = ["--precision", precision, "DIR", str(tmp_path), "TEST.result", str(tmp_path)]
    file = str(ROOT / "config" / "demo.yaml")
    assert main([*words, "--cfg", file, *settings]) == 2
    message = f"error: {key} {precision} needs a GPU; on the CPU use bf16 or fp32\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("restarts", "asked", "resume"),
    [(None, "", ""), ("0", "", ""), ("1", "", "auto"), ("2", "", "auto"), ("1", "x.pth", "x.pth")],
)
def test_what_torchrun_restarts_resumes(restarts, asked, resume, calls, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    words = ["--resume", asked] if asked else []
    assert main(["train", *words, "--gpus", "cpu", *DEMO, "DIR", str(tmp_path)]) == 0
    assert [options["resume"] for _, options in calls] == [resume]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--cfg", "config/none.yaml"], "config/none.yaml does not exist"),
        (["train", "--gpus", "cpu", "TRAIN.lr", "1"], "unknown key TRAIN.lr"),
        (["train", "--gpus", "cpu", "MODEL.fc_dim", "512"], "MODEL.fc_dim is 512"),
        (["eval", "--gpus", "zero"], "zero"),
        (["eval", "--gpus", "99"], "--gpus cpu runs without one"),
        (["predict", "--imgs", "nothing.jpg", "--gpu", "cpu"], "nothing.jpg"),
        (["data", "check", "a.odgt", "--format", "camvd"], "'camvd'; did you mean 'camvid'?"),
        (["data", "check", "val", "--cfg", "config/demo.yaml", "--format", "x"], "format 'x'"),
        (["data", "download", "cityscape"], "'cityscape' to download; did you mean 'cityscapes'?"),
        (["data", "download", "folder"], "(known: ade20k, camvid, cityscapes, coco, "),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MIT_SEMSEG_OFFLINE", "1")
    assert main(arguments) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(err) == 1
    assert message in err[0]


def test_help_names_every_data_set():
    advice = "name it in mit_semseg/arguments.py, which the help is made from"
    assert sorted(shown.FORMATS) == FORMATS.names(), advice
    assert sorted(shown.SOURCES) == sorted(sources()), advice


def test_a_data_set_of_ones_own_is_accepted(capsys, monkeypatch, tmp_path):
    """Registering is enough: the names in the help are no limit."""

    class Balls(FORMATS.get("cityscapes")):
        """Explains, as its parent does, how to register for the data."""

    monkeypatch.setitem(FORMATS._entries, "balls", Balls)
    assert main(["data", "download", "balls", "--to", str(tmp_path)]) == 1
    assert "which requires a registration or consent" in capsys.readouterr().out


def test_overrides_after_several_images():
    images, pairs = ["a.jpg", "b.jpg"], ["TEST.result", "out"]
    assert split_overrides([*images, *pairs]) == (images, pairs)
    assert split_overrides(["a.jpg", "DIR"]) == (["a.jpg", "DIR"], [])
    globs = ["DIRECTORY/*.jpg", "b/*.jpg"]
    assert split_overrides(globs) == (globs, [])


@pytest.mark.parametrize(
    ("typed", "printed"),
    [
        ("train.py --cfg a.yaml", "python train.py --resume auto --cfg a.yaml"),
        ("train.py --resume x --cfg a.yaml", "python train.py --resume auto --cfg a.yaml"),
        ("x/cli.py train --cfg 'a b.yaml'", "python x/cli.py train --resume auto --cfg 'a b.yaml'"),
        ("bin/mit-semseg train --gpus cpu", "mit-semseg train --resume auto --gpus cpu"),
    ],
)
def test_the_command_to_resume_is_the_one_typed(typed, printed, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(typed))
    assert cli._resume_command() == printed
