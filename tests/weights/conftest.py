"""A mirror of weights on this machine."""

import pytest


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The folder of a mirror on this machine, and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.delenv("MIT_SEMSEG_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", f"{served.as_uri()}/")
    return served
