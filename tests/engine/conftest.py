"""What tests of the engine have in common."""

from __future__ import annotations

import pytest
import torch

from mit_semseg.engine import cpu


@pytest.fixture(autouse=True)
def same_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with as many threads throughout: on a busy machine a run would take fewer, and round
    differently from the one it is compared with."""
    monkeypatch.setattr(cpu, "_fixed_threads", torch.get_num_threads())
