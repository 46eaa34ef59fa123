"""When CUDA graphs are recorded, replayed and dropped; how is for a GPU (`test_predictor`)."""

import random
from types import SimpleNamespace

import pytest
import torch

from mit_semseg.models import graphs
from mit_semseg.models.graphs import GraphedNetwork

CPU = torch.device("cpu")


class Stream:
    def wait_stream(self, other):
        pass


class Replayed(GraphedNetwork):
    """Records by remembering what to compute."""

    fails = None

    def _record(self, image):
        if self.fails:
            raise self.fails
        self.bytes += 100
        static, output = image.clone(), self.network(image)
        graph = SimpleNamespace(replay=lambda: output.copy_(self.network(static)))
        return graphs._Graph(graph, static, output, [])


@pytest.fixture
def graphed(monkeypatch):
    properties = SimpleNamespace(total_memory=10**6)
    for name, value in {
        "get_device_properties": lambda device: properties,
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: Stream(),
        "set_stream": lambda stream: None,
        "graph_pool_handle": lambda: (0, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Replayed(lambda image: 2 * image, CPU)


def visit(network, side, times=1):
    for _ in range(times):
        image = torch.randn(1, 3, side, side)
        assert torch.equal(network(image), 2 * image)


@pytest.mark.parametrize("flip", [False, True])
def test_the_second_image_of_a_shape_is_recorded(graphed, flip):
    graphed.flip = flip
    visit(graphed, 8, times=2 if flip else 1)
    assert not graphed.graphs
    visit(graphed, 8)
    assert len(graphed.graphs) == graphed.recordings == graphed.replays == 1
    kept = graphed(torch.ones(1, 3, 8, 8))
    visit(graphed, 8, times=3)
    assert graphed.recordings == 1 and graphed.replays == 5
    assert torch.equal(kept, torch.full((1, 3, 8, 8), 2.0)), "results are not written over"


def test_shapes_are_equal_for_views_and_copies(graphed):
    for width in (30, 31, 32):
        graphed(torch.randn(1, 3, 20, width)[..., :8, :8])
    assert len(graphed.graphs) == 1


def test_the_least_recently_used_graph_is_dropped(graphed):
    for side in range(1, graphs.MAX_GRAPHS + 1):
        visit(graphed, side, times=3)
    visit(graphed, 1)
    visit(graphed, 99, times=3)
    sides = {key[0][-1] for key in graphed.graphs}
    assert len(sides) == graphs.MAX_GRAPHS and {1, 99} < sides and 2 not in sides


def test_graphs_hold_bounded_memory(graphed):
    graphed.limit = 350
    for side in range(1, 20):
        visit(graphed, side, times=3)
        assert graphed.bytes <= 400


def test_rare_shapes_are_not_recorded_for_ever(graphed):
    generator = random.Random(0)
    for _ in range(6000):
        graphed(torch.zeros(1, 1, 1, generator.randrange(1, 600)))
    assert graphed.recordings <= graphed.replays / 2 + graphs.FREE_RECORDINGS + 1


def test_a_recording_that_runs_out_of_memory_is_given_up(graphed):
    graphed.fails = torch.cuda.OutOfMemoryError("full")
    visit(graphed, 8, times=9)
    graphed.fails = None
    visit(graphed, 8, times=9)
    assert not graphed.graphs, "this shape is left alone"
    visit(graphed, 9, times=3)
    assert len(graphed.graphs) == 1


def test_a_failed_recording_is_reported_once(graphed, caplog):
    graphed.fails = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level("WARNING", logger="mit_semseg"):
        for side in (8, 9):
            visit(graphed, side, times=5)
    assert caplog.text.count("the network cannot be recorded: operation not permitted") == 1
