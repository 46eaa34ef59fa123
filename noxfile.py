"""Tests on every supported torch: `nox -l` lists the sessions, `make test-versions` runs them all.

A session is one release of torch on one Python, in an environment of its own of 5 GB, which is
removed when the session ends. Pythons that are not on the path are skipped.
"""

from __future__ import annotations

import shutil

import nox

nox.options.error_on_missing_interpreters = False

# Releases that go together. The oldest torch is tested with the NumPy of its time.
TORCH = {
    "2.4": ("torch==2.4.1", "torchvision==0.19.1", "numpy<2", "opencv-python<4.12"),
    "2.8": ("torch==2.8.0", "torchvision==0.23.0"),
    "2.11": ("torch==2.11.0", "torchvision==0.26.0"),
    "2.14": ("torch==2.14.1", "torchvision==0.29.1"),
    "newest": ("torch", "torchvision"),
}
# Those that have wheels for a Python; "newest" takes whatever pip finds.
PYTHON = {
    "3.10": ("2.4", "2.8", "2.11", "2.14"),
    "3.11": ("2.4", "newest"),
    "3.12": ("2.4", "2.8", "2.11", "2.14", "newest"),
    "3.13": ("2.8", "newest"),
    "3.14": ("2.11", "2.14", "newest"),
}
# Without the runs of whole trainings, evaluations and faults, which take most of the time.
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
    """The quick part of the tests; `nox -s tests -- tests` runs them all."""
    # One call for both: pip would replace torch by the one that a newer torchvision asks for.
    session.install(*TORCH[torch], "--editable", ".[dev]")
    session.run("python", "-c", "import torch, numpy; print(torch.__version__, numpy.__version__)")
    try:
        session.run("pytest", "-n", "2", "--dist", "loadfile", *(session.posargs or QUICK))
    finally:
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)
