"""A server under load answers, refuses what is too much, and keeps its memory."""

import importlib.util

import pytest

NEEDED = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{missing[0]} is not installed", allow_module_level=True)

from load import load, model_at, start  # noqa: E402


@pytest.mark.slow
def test_64_clients(tmp_path):
    model = model_at(90, tmp_path)
    command, port = start(
        tmp_path / "log", model, "--queue", "32", "--timeout", "300", "--batch", "8"
    )
    try:
        first = load(port, 64, 3, (320, 240))
        second = load(port, 64, 3, (320, 240))
    finally:
        command.process.terminate()
        assert command.process.wait(120) == 0
    for found in (first, second):
        assert {*found["statuses"]} <= {200, 503}
        assert found["statuses"][200] > 64
        assert found["images_per_pass"] > 2
    # Freed memory that the allocator keeps differs by tens of megabytes.
    assert second["megabytes_after"] - first["megabytes_after"] < 100
