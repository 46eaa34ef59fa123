"""Synchronised batch normalisation over processes, against torch on the concatenated batch."""

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from torch import nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d, UserScatteredDataParallel

WORLD = 3
SIZES = [(2, 4, 5), (1, 7, 3), (3, 2, 2)]  # rank 0, 1, 2: batch, height, width


def feed(rank):
    """Input and output gradient of one rank, (n, 2, h, w) each."""
    n, h, w = SIZES[rank]
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(n, 2, h, w, generator=generator, dtype=torch.float64) + 10 * rank
    return x, torch.randn(n, 2, h, w, generator=generator, dtype=torch.float64)


def rows(x):
    return x.transpose(0, 1).reshape(2, -1).T


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = SynchronizedBatchNorm2d(2).double()

    def forward(self, x):
        return rows(self.norm(x))


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    x, g = feed(rank)
    x.requires_grad_()
    layer = Layer()
    y = layer(x)
    grads = torch.autograd.grad(y, [x, *layer.norm.parameters()], rows(g))

    # Replicas inside each process: this rank's batch cut in two where it can be.
    both = Layer()
    parts = [part.detach() for part in x.chunk(2)]
    model = UserScatteredDataParallel(both, ["cpu", "cpu"])
    parts = [part.requires_grad_() for part in parts]
    z = model(parts)
    z_grads = torch.autograd.grad(z, parts, torch.cat([rows(part) for part in g.chunk(2)]))

    alone = SynchronizedBatchNorm2d(2, process_group=_groups_of_one(rank)).double()
    too_few = None
    if rank == 0:
        try:
            alone(torch.zeros(1, 2, 1, 1, dtype=torch.float64))
        except ValueError as error:
            too_few = str(error)
    torch.save(
        {
            "y": y.detach(),
            "grads": grads,
            "state": layer.norm.state_dict(),
            "both_state": both.norm.state_dict(),
            "both_gx": torch.cat(z_grads),
            "alone": too_few,
        },
        f"{folder}/{rank}.pt",
    )
    dist.barrier()  # gloo aborts a process whose peer goes first
    dist.destroy_process_group()


def _groups_of_one(rank):
    return [dist.new_group([i]) for i in range(WORLD)][rank]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_processes_of_different_sizes_equal_torch_on_their_union(tmp_path):
    start_ranks(one_rank, WORLD, str(tmp_path))
    got = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]

    xs, gs = zip(*(feed(rank) for rank in range(WORLD)), strict=True)
    xs = [x.requires_grad_() for x in xs]
    layer = nn.BatchNorm1d(2).double()
    y = layer(torch.cat([rows(x) for x in xs]))
    want = torch.autograd.grad(y, [*xs, *layer.parameters()], torch.cat([rows(g) for g in gs]))

    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([rank["y"] for rank in got]), y, **exact)
    for rank in range(WORLD):
        torch.testing.assert_close(got[rank]["grads"][0], want[rank], **exact)
        torch.testing.assert_close(got[rank]["both_gx"], want[rank], **exact)
        for state in ("state", "both_state"):
            torch.testing.assert_close(dict(got[rank][state]), dict(layer.state_dict()), **exact)
    for i in (1, 2):  # each process has its share of the parameters' gradients
        torch.testing.assert_close(sum(rank["grads"][i] for rank in got), want[3 + i - 1], **exact)
    assert "more than 1 value per channel" in got[0]["alone"]
