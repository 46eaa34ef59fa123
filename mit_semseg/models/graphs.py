"""CUDA graphs of a network, for input shapes that repeat."""

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

# Limits of the number of graphs, and of their share of the GPU's memory.
MAX_GRAPHS, MAX_MEMORY = 32, 0.1
# A recording takes as long as several images, so there is at most one for every two replays,
# beyond this number.
FREE_RECORDINGS = 64

Network = Callable[[Tensor], Tensor]
Key = tuple[torch.Size, torch.dtype, bool]


@dataclass
class _Graph:
    """A recorded call: a replay reads `image` and writes `output`."""

    graph: Any  # torch.cuda.CUDAGraph
    image: Tensor
    output: Tensor
    constants: list[Tensor]  # read by the graph, so they must stay allocated


class GraphedNetwork:
    """Calls a network, and replays CUDA graphs of it for input shapes that repeat.

    The second image of a shape records a graph, which later calls replay: one launch instead of
    hundreds. Recording synchronises with the GPU. At most 32 graphs are kept, the least recently
    used is dropped first; all are dropped if they take more than a tenth of the GPU's memory. If
    shapes rarely repeat, recording stops. A network that cannot be recorded is called directly,
    with one warning.

    Not thread-safe.

    Args:
        network: called with an image.
        device: the GPU.
        flip: whether each image is followed by its flipped copy, which has the same shape.
    """

    def __init__(self, network: Network, device: torch.device, flip: bool = False) -> None:
        self.network, self.device, self.flip = network, device, flip
        self.limit = int(MAX_MEMORY * torch.cuda.get_device_properties(device).total_memory)
        self.stream = torch.cuda.Stream(device)
        self.calls: Counter[Key] = Counter()
        self.recordings = self.replays = 0
        self.recordable = True
        self.release()

    def __call__(self, image: Tensor) -> Tensor:
        key = image.shape, image.dtype, image.is_contiguous(memory_format=torch.channels_last)
        graph = self.graphs.get(key) or self._record_if_due(key, image)
        if graph is None:
            return self.network(image)
        self.graphs.move_to_end(key)
        self.replays += 1
        graph.image.copy_(image)
        graph.graph.replay()
        # All graphs share a memory pool: the next replay of any of them may overwrite the output.
        return graph.output.clone()

    def release(self) -> None:
        """Drop all graphs and free their memory."""
        self.graphs: OrderedDict[Key, _Graph] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle()
        self.bytes = 0

    def _record_if_due(self, key: Key, image: Tensor) -> _Graph | None:
        if not self.recordable or self.recordings > self.replays / 2 + FREE_RECORDINGS:
            return None
        self.calls[key] += 1
        if self.calls[key] <= 1 + self.flip:
            return None
        if self.bytes > self.limit:
            self.release()
        elif len(self.graphs) >= MAX_GRAPHS:
            self.graphs.popitem(last=False)
        current = torch.cuda.current_stream(self.device)
        try:
            self.graphs[key] = self._record(image)
        except torch.cuda.OutOfMemoryError:
            # Without a graph the memory may suffice; do not try this shape again soon.
            self.calls[key] = -1000
            self.release()
            return None
        except RuntimeError as error:
            self.recordable = False
            self.release()
            reason = one_line(error, 200)
            log.warning("CUDA graphs are not used, the network cannot be recorded: %s", reason)
            return None
        finally:
            # A failed recording leaves its stream as the current one.
            torch.cuda.set_stream(current)
            current.wait_stream(self.stream)
        self.recordings += 1
        return self.graphs[key]

    def _record(self, image: Tensor) -> _Graph:
        torch.cuda.empty_cache()  # as recording does, so that cached memory is not counted
        before = torch.cuda.memory_reserved(self.device)
        static = image.clone(memory_format=torch.preserve_format)
        graph = torch.cuda.CUDAGraph()
        # Warm up on the recording stream, as libraries allocate workspaces at their first call.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.network(static)
        with (
            MATRICES.recorded() as constants,
            # Other threads may load images and pin memory in the meantime.
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            output = self.network(static)
        self.bytes += max(0, torch.cuda.memory_reserved(self.device) - before)
        return _Graph(graph, static, output, constants)
