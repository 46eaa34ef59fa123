"""The house rules that no linter knows."""

import ast
import doctest
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from source_tree import ROOT, source_files

import mit_semseg

FILES = source_files()
PYTHON = [file for file in FILES if file.suffix == ".py"]
SCRIPTS = [file for file in PYTHON if len(file.parts) == 1 and file.name != "noxfile.py"]
MEGABYTE = 2**20

# A folder of somebody's machine, not the end of some longer path or url.
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:work|root|home/\w+|Users/\w+)/")
# Where some place gets its packages from is its own affair.
PACKAGE_HOST = re.compile(r"pypi\.|pythonhosted|artifactory|/simple/", re.IGNORECASE)


def dotted(file):
    """`lib/nn/x.py` -> `mit_semseg.lib.nn.x`, as which it is imported."""
    parts = [*(["mit_semseg"] if file.parts[0] == "lib" else []), *file.with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def has_example(file):
    lines = (ROOT / file).read_text().splitlines()
    shown = [line for line in lines if line.lstrip().startswith(">>> ") and "+SKIP" not in line]
    return file.parts[0] in ("mit_semseg", "lib") and bool(shown)


def test_the_files_are_found():
    assert {"train.py", "eval.py", "eval_multipro.py", "test.py"} <= {p.name for p in SCRIPTS}
    assert len(PYTHON) > 100


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_only_hands_over(script):
    assert len((ROOT / script).read_text().splitlines()) < 60


def test_every_module_says_what_it_is_for():
    silent = [
        str(file) for file in PYTHON if not ast.get_docstring(ast.parse((ROOT / file).read_text()))
    ]
    assert not silent


def test_no_file_is_large():
    large = [
        str(file)
        for file in FILES
        if file.parts[0] != "weights" and (ROOT / file).stat().st_size > MEGABYTE
    ]
    assert not large


def test_no_file_knows_the_machine_it_was_written_on():
    output = []
    for file in FILES:
        data = (ROOT / file).read_bytes()
        # This file spells out what it looks for; what holds a zero byte is no text.
        if file.name == Path(__file__).name or b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if found := MACHINE_PATH.search(line) or PACKAGE_HOST.search(line):
                output.append(f"{file}:{number}: {found[0]}")
    assert not output


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cd /root/x", True),
        ('"/home/me/a.jpg"', True),
        ("https://example.org/home/me/", False),
        ("a/work/b", False),
        ("/data/root/x", False),
    ],
)
def test_what_a_machine_path_is(line, found):
    assert bool(MACHINE_PATH.search(line)) is found


def test_no_file_is_a_link():
    """Clones on Windows, and some archives, have text files in their place."""
    assert not [str(file) for file in FILES if (ROOT / file).is_symlink()]


def test_lib_begins_with_nothing():
    """Installed, `lib/__init__.py` is run; in a checkout the package's own in its place."""
    body = ast.parse((ROOT / "lib/__init__.py").read_text()).body
    assert not [
        ast.unparse(node) for node in body[1:] if "__name__ == 'lib'" not in ast.unparse(node)
    ]


def test_lib_is_not_imported_twice():
    with pytest.raises(ImportError, match="import mit_semseg.lib instead of lib"):
        importlib.import_module("lib")


def test_continuous_integration_runs_what_there_is():
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec and spec.loader
    noxfile = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(noxfile)
    assert not [path for path in noxfile.QUICK if not (ROOT / path).exists()]
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    pairs = yaml.safe_load(text)["jobs"]["tests"]["strategy"]["matrix"]["include"]
    ends = [(p, t) for p, torch in noxfile.PYTHON.items() for t in (torch[0], torch[-1])]
    assert [(pair["python"], pair["torch"]) for pair in pairs] == ends
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"\bmake ([\w-]+)", text + hooks)} <= {*targets}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mit_semseg.__version__


def test_the_readme_begins_with_what_to_type():
    top = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40]
    for command in ("make demo", "make test"):
        assert any(command in line for line in top), command


@pytest.mark.parametrize("module", [dotted(file) for file in PYTHON if has_example(file)])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed
