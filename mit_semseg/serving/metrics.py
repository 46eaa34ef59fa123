"""Figures of a running server, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prometheus_client as prometheus

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST


class Metrics:
    """Counters and histograms of one server.

    Args:
        admitted: returns the number of requests that are read, waiting or computed.
        waiting: returns the number of requests that wait to be computed.

    Attributes:
        requests: counter of requests by `status`.
        seconds: histogram of the times of requests with status 200.
        images: histogram of the images of a forward pass.
    """

    def __init__(self, admitted: Callable[[], float], waiting: Callable[[], float]) -> None:
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)
        of: dict[str, Any] = {"namespace": "mit_semseg", "registry": self._registry}
        self.requests = prometheus.Counter("requests", "Requests to /predict", ["status"], **of)
        about = "Time from a request to its answer, of status 200"
        self.seconds = prometheus.Histogram("request_seconds", about, **of)
        sizes = (1, 2, 4, 8, 16, 32)
        about = "Images of a forward pass"
        self.images = prometheus.Histogram("batch_images", about, buckets=sizes, **of)
        gauge = prometheus.Gauge("admitted", "Requests read, waiting or computed", **of)
        gauge.set_function(admitted)
        gauge = prometheus.Gauge("waiting", "Requests that wait to be computed", **of)
        gauge.set_function(waiting)

    def text(self) -> bytes:
        """All figures, of the media type `CONTENT_TYPE`."""
        return prometheus.generate_latest(self._registry)
