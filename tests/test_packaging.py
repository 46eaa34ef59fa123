"""What pip installs: whole, standing alone, and built without the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_tree import ROOT, source_files

# pip neither asks an index nor the user's settings.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith("PIP_") and k != "PYTHONPATH"},
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


def run(*arguments: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, kind: str, dest: Path) -> Path:
    """The wheel or sdist of a tree, as a build front end would make it."""
    dest.mkdir(exist_ok=True)
    code = "import setuptools.build_meta as b, sys; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    run("-c", code, kind, dest, cwd=source)
    (file,) = dest.iterdir()
    return file


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, since building writes beside them."""
    copy = tmp_path_factory.mktemp("tree")
    for file in source_files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("wheel")
    run(
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", dest, tree),
        cwd=dest,
    )
    (file,) = dest.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed."""
    target = tmp_path_factory.mktemp("site")
    run(
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", target),
        wheel,
        cwd=target,
    )
    return target


def test_the_wheel_holds_every_module_and_table_and_nothing_else(wheel: Path) -> None:
    """A package left out of pyproject's list, or a test let in, shows here."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for file in source_files():
        # This folder beside the package is part of it.
        if file.parts[0] == "lib":
            expected.add(f"mit_semseg/{file.as_posix()}")
        elif file.parts[0] == "mit_semseg":
            expected.add(file.as_posix())
    assert held == expected
    assert "mit_semseg/py.typed" in held
    assert "mit_semseg/dataset/tables/ade20k.csv" in held
    assert "mit_semseg/lib/nn/batchnorm.py" in held


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl"), "pure Python: one wheel for all"
    with zipfile.ZipFile(wheel) as archive:
        files = {name.split(".dist-info/")[-1]: name for name in archive.namelist()}
        metadata = archive.read(files["METADATA"]).decode()
        entry_points = archive.read(files["entry_points.txt"]).decode()
    assert "mit-semseg = mit_semseg.cli:main" in entry_points
    assert any(name.endswith("LICENSE") for name in files)
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    # Upper limits are what keeps people on old versions of everything else.
    assert not [line for line in needed if "<" in line or "==" in line.split(";")[0]]


STANDS_ALONE = """
import json, multiprocessing, sys
import mit_semseg, mit_semseg.lib.nn, mit_semseg.lib.utils
from mit_semseg import Segmenter
from mit_semseg.config import load_config
from mit_semseg.dataset import class_table
from mit_semseg.lib.nn import SynchronizedBatchNorm2d

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (there,) = pool.map(type, [SynchronizedBatchNorm2d(1)])
    assert there is SynchronizedBatchNorm2d
    files = {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "mit_semseg"}
    classes = class_table(load_config().DATASET).names
    print(json.dumps([files, classes, "lib" in sys.modules, Segmenter.__module__]))
"""


@pytest.mark.parametrize("place", ["installed", "tree"])
def test_the_package_stands_alone(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Installed, and in a checkout without links."""
    folder: Path = request.getfixturevalue(place)
    (tmp_path / "main.py").write_text(STANDS_ALONE)
    told = run("main.py", cwd=tmp_path, PYTHONPATH=str(folder))
    files, classes, has_lib, segmenter = json.loads(told)
    strangers = {n: f for n, f in files.items() if not f.startswith(f"{folder}{os.sep}")}
    assert not strangers, "imported from elsewhere"
    assert len(files) > 40
    inside = "mit_semseg" if place == "installed" else ""
    assert Path(files["mit_semseg.lib.nn"]) == folder / inside / "lib/nn/__init__.py"
    assert not has_lib, "importing lib directly makes a second copy of every class"
    assert len(classes) == 150
    assert classes[0] == "wall"
    assert segmenter == "mit_semseg.segmenter"


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    out = run("-m", "mit_semseg.cli", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "usage: mit-semseg" in out


def test_the_sdist_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert {"lib/nn/batchnorm.py", "lib/utils/convert.py", "pyproject.toml", "LICENSE"} <= names
    assert "mit_semseg/dataset/tables/ade20k.csv" in names
    (unpacked,) = (path for path in tmp_path.iterdir() if path.name.startswith("mit_semseg-"))
    again = build(unpacked, "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        # RECORD lists the digest of every file.
        record = next(name for name in one.namelist() if name.endswith(".dist-info/RECORD"))
        assert sorted(one.read(record).splitlines()) == sorted(other.read(record).splitlines())
