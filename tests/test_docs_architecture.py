"""The examples of docs/architecture.md work as they stand, together, and pass their own tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
# Puts the examples where the page says, but for the files, which stay as they are.
CONFTEST = """
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, MODELS)
for file in sorted(Path(__file__).parent.glob("package/**/*.py")):
    name = ".".join(file.relative_to(Path(__file__).parent / "package").with_suffix("").parts)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        module = ModuleType(name)
    exec(compile(file.read_text(), file, "exec"), vars(module))

shapes = importlib.util.spec_from_file_location("shapes", MODELS + "/conftest.py")
shapes.loader.exec_module(module := importlib.util.module_from_spec(shapes))
published_shapes = module.published_shapes
"""


def examples() -> dict[str, str]:
    """Path -> code."""
    block = r"`((?:mit_semseg|tests)/[\w/]+\.py)`:\n\n```python\n(.*?)```"
    return dict(re.findall(block, PAGE.read_text(), re.DOTALL))


def test_the_examples_pass_their_tests(tmp_path: Path) -> None:
    found = examples()
    tests = [path for path in found if path.startswith("tests/")]
    assert len(tests) == 4  # encoder, decoder, loss, data set
    for path, code in found.items():
        target = tmp_path / (Path(path).name if path in tests else f"package/{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(code)
    models = str(ROOT / "tests" / "models")
    (tmp_path / "conftest.py").write_text(f"MODELS = {models!r}\n{CONFTEST}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 10, done.stdout[-3000:]
