"""A mirror of weights on this machine."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A mirror on this machine and an empty cache."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(served), **kwargs)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for proxy in ("http_proxy", "HTTP_PROXY", "MIT_SEMSEG_OFFLINE"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("MIT_SEMSEG_MIRROR", f"http://127.0.0.1:{server.server_address[1]}/")
    yield served
    server.shutdown()
    thread.join()
    server.server_close()
