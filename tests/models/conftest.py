"""Makes the stored references of tests/fixtures available to the model tests."""

import json
import sys
from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))

# Of the published SyncBN; ours needs none, and drops them on loading.
BOOKKEEPING = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")


@pytest.fixture(scope="session")
def published_shapes():
    """Keys and shapes of every published state dict, without the bookkeeping."""
    table = json.loads((FIXTURES / "state_dicts.json").read_text())
    return {
        name: {k: v for k, v in shapes.items() if k.rsplit(".", 1)[-1] not in BOOKKEEPING}
        for name, shapes in table.items()
    }
