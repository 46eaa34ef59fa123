"""What tests of the engine have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mit_semseg.engine import cpu


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Compute with as many threads throughout: on a busy machine a run would take fewer, and round
    differently from the one it is compared with."""
    with pytest.MonkeyPatch.context() as patch:  # not the one that a test may undo
        patch.setattr(cpu, "_fixed_threads", torch.get_num_threads())
        yield
