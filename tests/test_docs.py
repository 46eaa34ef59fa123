"""The documentation holds: examples run, commands parse, recipes for contributors work.

A Python block with `<!-- not run: REASON -->` before it is left out.
"""

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from source_tree import ROOT, source_files

from mit_semseg.arguments import build_parser
from mit_semseg.cli import split_overrides
from mit_semseg.config import get_defaults
from mit_semseg.config.node import keys

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted([ROOT / "README.md", CONTRIBUTING, *ROOT.glob("docs/**/*.md")])
CAMVID = ROOT / "weights" / "camvid-mobilenetv2dilated-c1_deepsup"
SCRIPTS = {"train": "train", "eval_multipro": "eval", "eval": "eval", "test": "predict"}
COMMAND = re.compile(r"(?:mit-semseg|(?:^|\s)(?:python )?(?:\./)?(\w+)\.py) (.+)")
# What the recipes add.
ADDED = {*re.findall(r"`([\w/]+\.py)`:\n", CONTRIBUTING.read_text("utf-8"))}
KEYS = {*keys(get_defaults())}


def blocks(page, language):
    found = re.findall(
        rf"(<!-- not run: .+ -->\n)?```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL
    )
    return [code for not_run, code in found if not not_run]


def run(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# ------------------------------------------------------------------------------------- examples
SNIPPETS = {
    page.relative_to(ROOT).as_posix(): code
    for page in PAGES
    if page != CONTRIBUTING and (code := blocks(page, "python"))
}


@pytest.mark.parametrize("page", SNIPPETS)
def test_python_examples_run(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, where checkpoints and photographs are."""
    for checkpoint in ("weights/camvid-mobilenetv2dilated-c1_deepsup", "ckpt/mine"):
        shutil.copytree(CAMVID, tmp_path / checkpoint)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for photo in ("photo.jpg", "scenes/images/validation/0000.png"):
        (tmp_path / photo).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(tmp_path / photo)
        # One scale is as good an example as five.
        file = tmp_path / checkpoint / "config.yaml"
        file.write_text(
            re.sub(r"imgSizes: \S.*|imgSizes:(\n *- \d+)+", "imgSizes: [64]", file.read_text())
        )
    recipe = file.read_text().replace(str(CAMVID), "ckpt/mine")
    (tmp_path / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, "show", lambda self: None)
    names = {"__name__": "example"}
    for code in SNIPPETS[page]:
        exec(compile(code, page, "exec"), names)


# ------------------------------------------------------------------------------------- commands
def commands(page):
    lines = "\n".join(blocks(page, "(?:bash|sh)")).replace("\\\n", " ").splitlines()
    return [line for line in lines if COMMAND.search(line)]


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in commands(page)}))
def test_a_command_parses(line):
    match = COMMAND.search(line)
    assert match
    script, rest = match.groups()
    words = shlex.split(rest.split(";")[0].split("|")[0].rstrip("& "), comments=True)
    if script and script not in SCRIPTS:
        assert (ROOT / f"{script}.py").exists() or script == "my_tool" or "/" in line
        return
    if script:
        words.insert(0, SCRIPTS[script])
    args, rest = build_parser().parse_known_args(words)
    _, overrides = split_overrides([*getattr(args, "opts", []), *rest])
    assert not {key for key in overrides[::2] if key.isupper() and "." in key} - KEYS


def test_make_has_every_target_that_is_named():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text("utf-8"), re.MULTILINE)
        assert set(named) <= targets, page


# ------------------------------------------------------------------------------------- messages
@pytest.fixture(scope="module")
def texts():
    """Every string in the code but docstrings, as what stands between its values."""
    found = []
    for file in (ROOT / "mit_semseg").rglob("*.py"):
        tree = ast.parse(file.read_text("utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
            constants = [p.value for p in pieces if isinstance(p, ast.Constant)]
            parts = [value for value in constants if isinstance(value, str) and value.strip()]
            if id(node) not in docs and any(len(part) >= 10 for part in parts):
                found.append(parts)
    return found


def beyond(message, parts):
    """What is left of a message without the parts of a text, the last of which may be cut short."""
    for part in parts:
        if part in message:
            message = message.replace(part, "\n", 1)
        elif cut := next((n for n in range(len(part), 9, -1) if message.endswith(part[:n])), 0):
            return message[:-cut]
    return message


PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")


@pytest.mark.parametrize("message", re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE))
def test_messages_in_troubleshooting_exist(message, texts):
    """But for values; up to three strings of the code may be put together."""
    for _ in range(3):
        message = min((beyond(message, parts) for parts in texts), key=len)
    assert not re.search(r"[a-z]{2,} [a-z]{2,}", message), message


def test_files_that_are_named_exist():
    """By the end of their path: a page names `state.py` after its folder."""
    files = ["/" + file.as_posix() for file in source_files()]
    for page in PAGES:
        named = set(re.findall(r"`([a-z_/]+\.py)`", page.read_text("utf-8"))) - ADDED
        assert [n for n in named if not any(f.endswith("/" + n) for f in files)] == [], page


# -------------------------------------------------------------------------------------- recipes
OPTIM, BUILD = (f"mit_semseg/engine/training/{name}.py" for name in ("optim", "build"))
# What the recipes say in words: file, text, and what stands there afterwards.
EDITS = [
    ("mit_semseg/models/encoders/__init__.py", "    resnext,\n", "    resnext,\n    tiny,\n"),
    ("mit_semseg/models/decoders/__init__.py", "    pidnet,\n", "    pidnet,\n    pointwise,\n"),
    ("mit_semseg/dataset/__init__.py", "    ade20k,\n", "    ade20k,\n    balls,\n"),
    ("mit_semseg/dataset/__init__.py", '    "ade20k",\n', '    "ade20k",\n    "balls",\n'),
    ("mit_semseg/arguments.py", 'FORMATS = ("colors"', 'FORMATS = ("balls", "colors"'),
    (
        "tests/models/pairs.py",
        "PAIRS = (\n",
        'PAIRS = (\n    Pair("resnet18dilated", "pointwise", 8),\n',
    ),
    ("mit_semseg/config/train.py", "    weight_decay:", "SETTING    weight_decay:"),
    (OPTIM, "beta1: float = 0.9,", "beta1: float = 0.9, beta2: float = 0.999,"),
    (OPTIM, "betas=(beta1, 0.999)", "betas=(beta1, beta2)"),
    (BUILD, "beta1=train.beta1,", "beta1=train.beta1, beta2=train.beta2,"),
]


def recipe_files():
    """How a block is to be written ("w", or "a" at the end), where, and the block."""
    step = r"(Write|[Aa]t the end of)[\w, ]* `([\w/]+\.py)`:\n\n```python\n(.*?)```"
    found = re.findall(step, CONTRIBUTING.read_text("utf-8"), re.DOTALL)
    return [("w" if how == "Write" else "a", path, code) for how, path, code in found]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources with an encoder, a decoder, a loss, a data set and a setting added."""
    copy = tmp_path_factory.mktemp("tree")
    for file in source_files():
        if file.parts[0] != "weights" and file.suffix != ".png":
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, copy / file)
    (setting,) = [code for code in blocks(CONTRIBUTING, "python") if "= key(" in code]
    for path, old, new in EDITS:
        text = (copy / path).read_text()
        assert text.count(old) == 1, path
        (copy / path).write_text(text.replace(old, new.replace("SETTING", setting)))
    for how, path, code in recipe_files():
        with (copy / path).open(how) as file:
            file.write(("\n\n" if how == "a" else "") + code)
    return copy


# One process: it is torch that takes seconds to import.
RENEW_AND_TEST = """
import runpy, sys, pytest
for script in ("test_api_surface", "test_docs_settings"):
    runpy.run_path(f"tests/{script}.py", run_name="__main__")
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_recipes_for_contributors_pass_their_tests(tree):
    tests = [path for _, path, _ in recipe_files() if path.startswith("tests/")]
    assert len(tests) == 3  # loss, data set, setting
    tests += [f"tests/models/test_{name}.py" for name in ("encoders", "decoders", "pairs")]
    tests += [f"tests/{name}.py" for name in ("losses/test_losses", "test_api_surface")]
    tests += ["tests/test_docs_settings.py"]
    names = "tiny or pointwise or brier or balls or surface or beta or TRAIN"
    options = ("-n0", "-p", "no:cacheprovider", "-k", names)
    output = run("-c", RENEW_AND_TEST, *options, *tests, cwd=tree)
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed[1]) > 20, output[-3000:]


def test_recipes_for_contributors_train_and_predict(tree):
    rng = np.random.default_rng(0)
    kinds = {"photos": ("jpg", 256, (32, 48, 3)), "masks": ("png", 3, (32, 48))}
    for folder, (suffix, top, shape) in kinds.items():
        (tree / folder).mkdir()
        for name in "ab":
            image = rng.integers(0, top, shape, np.uint8)
            Image.fromarray(image).save(tree / folder / f"{name}.{suffix}")
    for split in ("train", "val"):
        (tree / f"{split}.txt").write_text("a\nb\n")
    (recipe,) = blocks(ROOT / "docs" / "train.md", "yaml")
    (tree / "mine.yaml").write_text(recipe)
    (command,) = [line for line in commands(CONTRIBUTING) if "MODEL.arch_encoder tiny" in line]
    short = ["DATASET.imgSizes", "(32,)", "TRAIN.num_epoch", "1", "TRAIN.epoch_iters", "2"]
    short += ["TRAIN.workers", "0", "TRAIN.optim", "Adam", "TRAIN.beta2", "0.99"]
    words = [*shlex.split(command)[1:], *short]
    assert "Training done" in run(*words, cwd=tree)

    (tool,) = [code for code in blocks(CONTRIBUTING, "python") if "my_encoder" in code]
    (tree / "my_tool.py").write_text(tool)
    (tree / "my_encoder.py").write_text(
        "from mit_semseg.models.encoders.tiny import Tiny as MyEncoder\n"
    )
    overrides = words[words.index("MODEL.arch_encoder") :]
    overrides[1] = "mine"
    output = run(
        *("my_tool.py", "predict", "--gpu", "cpu", "--imgs", "photos", "--cfg", "mine.yaml"),
        *(*overrides, "TEST.checkpoint", "epoch_1.pth", "TEST.result", "out"),
        cwd=tree,
    )
    assert "2 images segmented" in output


# ----------------------------------------------------------------------------------------- site
def test_the_package_diagram_matches_the_import_contract():
    rooms = runpy.run_path(str(ROOT / "docs" / "rooms.py"))
    assert rooms["PICTURE"].read_text("utf-8") == rooms["picture"](), "run python docs/rooms.py"
    assert not {name for row in rooms["layers"]() for name in row} - rooms["CONTENT"].keys()


def test_the_site_builds_and_its_links_hold(tmp_path):
    pytest.importorskip("mkdocstrings")
    run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path), cwd=ROOT)
    for page in ("index", "guide", "settings", "contributing", "reference/models", "reference/lib"):
        assert (tmp_path / f"{page}.html").is_file()
    assert 'id="mit_semseg.lib.nn.UserScatteredDataParallel"' in (
        tmp_path / "reference" / "lib.html"
    ).read_text("utf-8")
