"""CUDA graphs of a network for the shapes that come again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mit_semseg.matrices import MATRICES

log = logging.getLogger("mit_semseg")

# Graphs that are held at most, and the share of the GPU's memory that they may take.
MOST_GRAPHS, MOST_MEMORY = 32, 0.1

Network = Callable[[Tensor], Tensor]
Key = tuple[torch.Size, torch.dtype, tuple[int, ...]]


@dataclass
class _Graph:
    """A recorded call: writing to `image` and replaying leaves the result in `output`."""

    graph: Any  # torch.cuda.CUDAGraph
    image: Tensor
    output: Tensor
    held: list[Tensor]  # constants that the graph reads


class GraphedNetwork:
    """Calls a network, and replays CUDA graphs of it for shapes that have come before.

    The first image of a shape is computed as usual, the second records a graph, and from then on it
    is replayed: one launch in place of hundreds. When graphs hold more than a tenth of the GPU's
    memory, or there are more than 32, all are dropped and recording begins again. A network that
    cannot be recorded is computed as usual, with one warning.

    Not for several threads at once.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network, self.device = network, device
        self.limit = int(MOST_MEMORY * torch.cuda.get_device_properties(device).total_memory)
        self.stream = torch.cuda.Stream(device)
        self.seen: set[Key] = set()
        self._drop()
        self.recordable = True

    def __call__(self, image: Tensor) -> Tensor:
        key = image.shape, image.dtype, image.stride()
        graph = self.graphs.get(key)
        if graph is None and self.recordable and key in self.seen:
            graph = self._record(key, image)
        if graph is None:
            self.seen.add(key)
            return self.network(image)
        graph.image.copy_(image)
        graph.graph.replay()
        # The next replay of any graph may write to the same memory.
        return graph.output.clone()

    def _drop(self) -> None:
        self.graphs: dict[Key, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.bytes = 0

    def _record(self, key: Key, image: Tensor) -> _Graph | None:
        if len(self.graphs) >= MOST_GRAPHS or self.bytes > self.limit:
            self._drop()
        before = torch.cuda.memory_reserved(self.device)
        static = torch.empty_like(image).copy_(image)
        graph = torch.cuda.CUDAGraph()
        try:
            # On the stream that records: libraries allocate workspaces at their first call there.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.network(static)
            with (
                MATRICES.recorded() as held,
                # Other threads may read images and pin memory meanwhile.
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                output = self.network(static)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.recordable = False
            reason = " ".join(str(error).split())[:200]
            log.warning("CUDA graphs are not used, the network cannot be recorded: %s", reason)
            return None
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        self.graphs[key] = _Graph(graph, static, output, held)
        return self.graphs[key]
