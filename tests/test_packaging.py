"""What pip installs: whole, standing alone, and built without the network."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image
from source_tree import ROOT, source_files

import mit_semseg

# pip neither asks an index nor the user's settings.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if not k.startswith("PIP_") and k != "PYTHONPATH"},
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
SHIPPED = (
    "config/*.yaml",
    "weights/camvid-mobilenetv2dilated-c1_deepsup/config.yaml",
    "weights/camvid-mobilenetv2dilated-c1_deepsup/classes.csv",
    "weights/camvid-mobilenetv2dilated-c1_deepsup/*.pth",
)
INSTALLED = ["wheel", pytest.param("sdist", marks=pytest.mark.slow)]


def run(*command, cwd, **environment):
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, since building writes beside them."""
    copy = tmp_path_factory.mktemp("tree")
    for file in source_files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="module")
def dist(checkout, tmp_path_factory):
    """A folder with the sdist, and the wheel that was made from it."""
    dest = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dest, checkout, cwd=dest)
    return dest


@pytest.fixture(scope="module")
def wheel(dist):
    (file,) = dist.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def sdist(dist):
    (file,) = dist.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def place(request, tmp_path_factory):
    """A new environment with the package; in that of "checkout" it is found where it is written.

    It sees torch and the rest of this environment, but no package that is installed here in
    editable form: such a package's .pth file works in its own folder alone.
    """
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    lines = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    source = request.getfixturevalue(request.param)
    if request.param == "checkout":
        lines.insert(0, str(source))
    (site_packages(environment) / "others.pth").write_text("\n".join(lines) + "\n")
    if request.param != "checkout":
        run(
            *(sys.executable, "-m", "pip", "--python", python(environment), "install", "--quiet"),
            *("--no-deps", "--no-build-isolation", "--ignore-installed", "--no-compile", source),
            cwd=environment,
        )
    return environment


def python(environment):
    return environment / "bin" / "python"


def site_packages(environment):
    (folder,) = environment.glob("lib/*/site-packages")
    return folder


def test_the_wheel_holds_every_module_and_table_and_nothing_else(wheel):
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
        elif any(map(file.match, SHIPPED)):
            expected.add(f"mit_semseg/assets/{file.as_posix()}")
    assert held == expected
    assert wheel.stat().st_size < 6e6
    assert "mit_semseg/py.typed" in held
    assert {
        "mit_semseg/dataset/tables/ade20k.csv",
        "mit_semseg/visualize/templates/report.html",
    } <= set(held)
    assert "mit_semseg/lib/nn/batchnorm.py" in held


def test_the_wheel_says_what_it_is(wheel):
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


def test_every_place_names_the_same_version():
    (latest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert latest == cited[1] == mit_semseg.__version__


def test_the_release_is_published_without_a_token():
    text = (ROOT / ".github/workflows/release.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"] == "pypi"
    assert "secrets" not in text and "password" not in text
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert len(used) == 5 and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name) for name in used)


def test_the_index_will_take_both(wheel, sdist, tmp_path):
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"lib/nn/batchnorm.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not {name for name in names if name.startswith("tests")}  # would be only a part of them


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


@pytest.mark.parametrize("place", ["checkout", *INSTALLED], indirect=True)
def test_the_package_stands_alone(place, checkout, tmp_path):
    (tmp_path / "main.py").write_text(STANDS_ALONE)
    output = run(python(place), "main.py", cwd=tmp_path)
    files, classes, has_lib, segmenter = json.loads(output)
    lib = Path(files["mit_semseg.lib.nn"])
    if lib == checkout / "lib/nn/__init__.py":
        home = checkout
    else:
        home = site_packages(place)
        assert lib == home / "mit_semseg/lib/nn/__init__.py"
    strangers = {n: f for n, f in files.items() if not f.startswith(f"{home}{os.sep}")}
    assert not strangers, "imported from elsewhere"
    assert len(files) > 40
    assert not has_lib, "importing lib directly makes a second copy of every class"
    assert len(classes) == 150
    assert classes[0] == "wall"
    assert segmenter == "mit_semseg.segmenter"


@pytest.mark.parametrize("place", INSTALLED, indirect=True)
def test_the_installed_command_runs(place, tmp_path):
    """In any folder: it says its version, and parses an image with the shipped model."""
    command = place / "bin" / "mit-semseg"
    assert run(command, "--version", cwd=tmp_path) == f"mit-semseg {mit_semseg.__version__}\n"
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "gray.png")
    output = run(command, "predict", "gray.png", "--gpu", "cpu", "TEST.result", "out", cwd=tmp_path)
    assert "the shipped model" in output and "1 image segmented" in output
    assert "DATASET.num_class = 10 " in run(
        command, "config", "--cfg", "demo", "--only", "num_class", cwd=tmp_path
    )
    assert list((tmp_path / "out").glob("gray*.png"))
