"""Tests with every supported torch and Python: `nox -l` lists them, `make test-versions` runs them.

Each combination has its own environment of 5 GB, which is removed at the end. Pythons that are not
on the path are skipped.
"""

from __future__ import annotations

import shutil

import nox

nox.options.error_on_missing_interpreters = False

# Matching releases. The oldest torch is tested with an older NumPy.
TORCH = {
    "2.4": ("torch==2.4.1", "torchvision==0.19.1", "numpy<2", "opencv-python<4.12"),
    "2.8": ("torch==2.8.0", "torchvision==0.23.0"),
    "2.11": ("torch==2.11.0", "torchvision==0.26.0"),
    "2.14": ("torch==2.14.1", "torchvision==0.29.1"),
    "newest": ("torch", "torchvision"),
}
# Releases with wheels for a Python; "newest" is whatever pip finds.
PYTHON = {
    "3.10": ("2.4", "2.8", "2.11", "2.14"),
    "3.11": ("2.4", "newest"),
    "3.12": ("2.4", "2.8", "2.11", "2.14", "newest"),
    "3.13": ("2.8", "newest"),
    "3.14": ("2.11", "2.14", "newest"),
}
# Extras whose libraries are tested in their oldest and newest versions, and without any.
EXTRAS = (
    "app",
    "geo",
    "hf",
    "hub",
    "lora",
    "mlflow",
    "onnx",
    "openvino",
    "serve",
    "smp",
    "tensorboard",
    "timm",
    "wandb",
)
OF_EXTRAS = (
    "tests/models/test_timm.py",
    "tests/models/test_external_eomt.py",
    "tests/models/test_external_hf.py",
    "tests/models/test_external_mmseg.py",
    "tests/models/test_external_smp.py",
    "tests/models/test_lora.py",
    "tests/dataset/test_rasters.py",
    "tests/engine/test_bands_run.py",
    "tests/engine/test_external_run.py",
    "tests/engine/test_loggers.py",
    "tests/engine/test_lora_run.py",
    "tests/engine/test_share.py",
    "tests/export",
    "tests/losses/test_mask_classification.py",
    "tests/serving",
    "tests/weights/test_safetensors.py",
    "tests/test_recipes.py",
)
# Without trainings, evaluations and fault injection, which take most of the time.
QUICK = (
    "tests/lib",
    "tests/compat",
    "tests/engine/test_optim.py",
    "tests/engine/test_threads.py",
    "tests/test_segmenter.py",
    "tests/models",
    "tests/losses",
    "tests/dataset",
    "tests/test_scores.py",
    "tests/test_fused_scores.py",
)


@nox.session
@nox.parametrize(
    "python,torch", [(python, torch) for python, names in PYTHON.items() for torch in names]
)
def tests(session: nox.Session, torch: str) -> None:
    """The quick tests; `nox -s tests -- tests` runs all."""
    # In one call: otherwise pip would replace torch by the version for a newer torchvision.
    session.install(*TORCH[torch], "--editable", ".[dev]")
    session.run("python", "-c", "import torch, numpy; print(torch.__version__, numpy.__version__)")
    try:
        session.run("pytest", "-n", "2", "--dist", "loadfile", *(session.posargs or QUICK))
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


@nox.session(python="3.12")
@nox.parametrize("libraries", ["none", "oldest", "newest"])
def extras(session: nox.Session, libraries: str) -> None:
    """The tests of the extras; "oldest" are the lower bounds of pyproject.toml."""
    optional = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
    needed = sorted({requirement for name in EXTRAS for requirement in optional[name]})
    pinned = [requirement.replace(">=", "==") for requirement in needed]
    session.install(
        *TORCH["newest"], "--editable", ".[dev]", *(pinned if libraries == "oldest" else [])
    )
    if libraries == "none":
        names = [requirement.partition(">=")[0] for requirement in needed]
        session.run("python", "-m", "pip", "uninstall", "--yes", *names)
    session.run("python", "-m", "pip", "list")
    try:
        session.run("pytest", "-n", "2", "--dist", "loadfile", *(session.posargs or OF_EXTRAS))
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)
