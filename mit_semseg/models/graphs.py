"""CUDA graphs of a network for the shapes that come again and again."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mit_semseg.errors import one_line
from mit_semseg.matrices import MATRICES

log = logging.getLogger("mit_semseg")

# A shape is recorded at this visit: one image has two with its mirror image.
RECORDED_AT = 3
# Graphs that are held at most, and the share of the GPU's memory that they may take.
MOST_GRAPHS, MOST_MEMORY = 32, 0.1
# Recordings beyond one for every two replays: each takes as long as several images.
SPARE_RECORDINGS = 64

Network = Callable[[Tensor], Tensor]
Key = tuple[torch.Size, torch.dtype, bool]


@dataclass
class _Graph:
    """A recorded call: writing to `image` and replaying leaves the result in `output`."""

    graph: Any  # torch.cuda.CUDAGraph
    image: Tensor
    output: Tensor
    held: list[Tensor]  # constants that the graph reads


class GraphedNetwork:
    """Calls a network, and replays CUDA graphs of it for shapes that have come before.

    Two images of a shape are computed as usual, the third records a graph, and from then on it is
    replayed: one launch in place of hundreds. Recording waits for the GPU. Of more than 32 graphs
    the least recently used is dropped, and all are when they hold more than a tenth of the GPU's
    memory. Where shapes hardly come again nothing more is recorded, and a network that cannot be
    recorded is computed as usual, with one warning.

    Not for several threads at once.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network, self.device = network, device
        self.limit = int(MOST_MEMORY * torch.cuda.get_device_properties(device).total_memory)
        self.stream = torch.cuda.Stream(device)
        self.visits: Counter[Key] = Counter()
        self.recordings = self.replays = 0
        self.recordable = True
        self.release()

    def __call__(self, image: Tensor) -> Tensor:
        key = image.shape, image.dtype, image.is_contiguous(memory_format=torch.channels_last)
        graph = self.graphs.get(key) or self._recorded(key, image)
        if graph is None:
            return self.network(image)
        self.graphs.move_to_end(key)
        self.replays += 1
        graph.image.copy_(image)
        graph.graph.replay()
        # The next replay of any graph may write to the same memory.
        return graph.output.clone()

    def release(self) -> None:
        """Drop all graphs, and with them their memory."""
        self.graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle()
        self.bytes = 0

    def _recorded(self, key: Key, image: Tensor) -> _Graph | None:
        """A new graph, when it is time for one."""
        if not self.recordable or self.recordings > self.replays / 2 + SPARE_RECORDINGS:
            return None
        self.visits[key] += 1
        if self.visits[key] < RECORDED_AT:
            return None
        if self.bytes > self.limit:
            self.release()
        elif len(self.graphs) >= MOST_GRAPHS:
            self.graphs.popitem(last=False)
        current = torch.cuda.current_stream(self.device)
        try:
            self.graphs[key] = self._record(image)
        except torch.cuda.OutOfMemoryError:
            # As usual it may have memory enough; this shape is not tried again soon.
            self.visits[key] = -1000
            self.release()
            return None
        except RuntimeError as error:
            self.recordable = False
            self.release()
            reason = one_line(error, 200)
            log.warning("CUDA graphs are not used, the network cannot be recorded: %s", reason)
            return None
        finally:
            # A recording that fails leaves its stream the current one.
            torch.cuda.set_stream(current)
            current.wait_stream(self.stream)
        self.recordings += 1
        return self.graphs[key]

    def _record(self, image: Tensor) -> _Graph:
        torch.cuda.empty_cache()  # which recording does anyway: what is free is not the graph's
        before = torch.cuda.memory_reserved(self.device)
        static = image.clone(memory_format=torch.preserve_format)
        graph = torch.cuda.CUDAGraph()
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
        self.bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return _Graph(graph, static, output, held)
