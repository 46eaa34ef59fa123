"""Recomputation: the plain module's results, from less memory."""

import copy

import pytest
import torch
import torch.distributed as dist
from processes import start_ranks
from torch import Tensor, nn

from mit_semseg.lib.nn import SynchronizedBatchNorm2d, UserScatteredDataParallel, sync_function
from mit_semseg.models import ENCODERS, ModelBuilder
from mit_semseg.models.activation_checkpointing import checkpoint_activations, find_blocks

WORLD = 2
Results = tuple[list[Tensor], list[Tensor]]


class Block(nn.Module):
    """A residual block with everything that a second pass could disturb."""

    def __init__(self, momentum=0.1, drop=0.5):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = SynchronizedBatchNorm2d(4, momentum=momentum)
        self.drop = nn.Dropout(drop)
        self.calls = []

    def forward(self, x):
        self.calls.append(None)
        return x + self.drop(torch.relu_(self.norm(self.conv(x))))


class Blocks(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.stage = nn.Sequential(Block(**options), Block(**options))

    def forward(self, x):
        return self.stage(self.stem(x))


def blocks(**options):
    """A float64 module, and its twin that recomputes."""
    torch.manual_seed(0)
    plain = Blocks(**options).double()
    other = copy.deepcopy(plain)
    assert len(checkpoint_activations(other)) == 2
    return plain, other


def inner(other, index):
    """A block of the twin, without its wrapper."""
    return next(m for m in other.stage[index].modules() if isinstance(m, Block))


def run(module, x):
    """Outputs and gradients, always with the same random numbers."""
    torch.manual_seed(1)
    out = module(x, return_feature_maps=True) if hasattr(module, "feature_maps") else module(x)
    maps = out if isinstance(out, list) else [out]
    sum((y.float() * torch.linspace(-1, 1, y.shape[-1])).square().mean() for y in maps).backward()
    return [y.detach() for y in maps], [p.grad for p in module.parameters()]


def assert_same(plain, other, x):
    """The same kernels on the same numbers: equality, but for sums in another order."""
    torch.testing.assert_close(run(other, x), run(plain, x), rtol=1e-10, atol=1e-12)
    given, wanted = other.state_dict(), plain.state_dict()
    assert list(given) == list(wanted)
    assert all(torch.equal(given[key], wanted[key]) for key in wanted)


def test_branches_that_meet_again_give_the_same():
    """Other encoders are compared in test_pairs.py."""
    torch.manual_seed(0)
    plain = ModelBuilder.build_encoder("hrnetv2_w18", weights="none")
    other = copy.deepcopy(plain)
    checkpoint_activations(other)
    assert_same(plain, other, torch.randn(2, 3, 32, 32))


# ResNets keep their stem of three convolutions at half the image's size.
@pytest.mark.parametrize(
    ("arch", "share"),
    [
        ("resnet18dilated", 0.6),
        ("resnet50dilated", 0.4),
        ("mobilenetv2dilated", 0.05),
        pytest.param("hrnetv2", 0.15, marks=pytest.mark.slow),
    ],
)
def test_less_is_stored_for_backward(arch, share, monkeypatch):
    # torch 2.4 looks for a module of the device's name, which has no random state to keep.
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)
    with torch.device("meta"):  # sizes without arithmetic
        encoder = ENCODERS.get(arch)()
        x = torch.zeros(2, 3, 448, 608)
    plain = kept_bytes(encoder, x)
    own = kept_bytes(encoder, x, checkpoint_activations(encoder))
    assert own < share * plain


def kept_bytes(encoder, x, found=()):
    """Bytes of activations that wait for the backward pass, each storage counted once."""
    kept = {}
    own = {p.untyped_storage()._cdata for p in encoder.parameters()}

    def keep(value):
        if isinstance(value, (list, tuple)):
            for part in value:
                keep(part)
        elif value.untyped_storage()._cdata not in own:
            kept[value.untyped_storage()._cdata] = value.untyped_storage()
        return value

    def keep_inputs(unit, inputs):
        keep(inputs)

    handles = [unit.register_forward_pre_hook(keep_inputs) for unit in found]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        encoder(x, return_feature_maps=True)
    for handle in handles:
        handle.remove()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_second_pass_has_no_effects(momentum):
    plain, other = blocks(momentum=momentum)
    assert_same(plain, other, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    norm = inner(other, 0).norm
    assert int(norm.num_batches_tracked) == 1
    assert "noted" not in vars(norm) and "given" not in vars(norm)
    assert [len(block.calls) for block in (plain.stage[0], inner(other, 0))] == [1, 2]
    # A copy runs its own blocks, and in evaluation there is no second pass.
    assert_same(*(copy.deepcopy(m) for m in blocks()), torch.randn(2, 3, 8, 8).double())
    with torch.no_grad():
        other.eval()(torch.randn(1, 3, 4, 4).double())
    assert len(inner(other, 0).calls) == 3


def test_two_graphs_at_once_and_one_graph_twice():
    plain, other = blocks()
    results = []
    for module in (plain, other):
        torch.manual_seed(3)
        first, second = (module(torch.randn(2, 3, 6, 6).double()) for _ in range(2))
        second.square().sum().backward(retain_graph=True)
        first.square().sum().backward()
        second.square().sum().backward()
        results.append([[p.grad for p in module.parameters()], dict(module.state_dict())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_fixed_batchnorm_and_frozen_weights():
    plain, other = blocks()
    for module in (plain, other):
        module.stage[0].requires_grad_(False)
        next(m for m in module.stage[1].modules() if isinstance(m, nn.BatchNorm2d)).eval()
    before = plain.stage[1].norm.running_var.clone()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    (_, grads), (_, expected) = run(other, x), run(plain, x)
    assert [g is None for g in grads] == [g is None for g in expected]
    pairs = [(g, e) for g, e in zip(grads, expected) if g is not None]
    assert pairs and all(torch.equal(g, e) for g, e in pairs)
    assert torch.equal(inner(other, 1).norm.running_var, before)


def test_autocast_is_respected():
    torch.manual_seed(0)
    plain = Blocks()
    other = copy.deepcopy(plain)
    checkpoint_activations(other)
    x = torch.randn(2, 3, 8, 8)
    results = []
    for module in (plain, other):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        y.float().square().mean().backward()  # outside of autocast, as in training
        results.append([y, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_replicas_in_one_process():
    # Replicas meet in the forward pass and are gone in backward: nothing may be exchanged there.
    plain, other = blocks(drop=0.0)
    xs = [torch.randn(n, 3, 8, 6, dtype=torch.float64) for n in (1, 2)]
    for module in (plain, other):
        y = UserScatteredDataParallel(module, ["cpu", "cpu"])(xs)
        y.square().mean().backward()
    for a, b in zip(plain.parameters(), other.parameters()):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dict(other.state_dict()), dict(plain.state_dict()))


def one_rank(rank, folder):
    torch.set_num_threads(1)
    file = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=WORLD)
    results = []
    exchanges = []
    gather = sync_function._all_gather

    def counted(*args, **options):
        exchanges[-1] += 1
        return gather(*args, **options)

    sync_function._all_gather = counted
    for module in blocks(drop=0.0):
        exchanges.append(0)
        parallel = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(2):
            x = torch.randn(rank + 1, 3, 6, 5, dtype=torch.float64, generator=generator)
            parallel(x).square().sum().backward()
        results.append([[p.grad for p in module.parameters()], dict(module.state_dict())])
    torch.save([*results, exchanges], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_processes_exchange_once(tmp_path):
    start_ranks(one_rank, WORLD, str(tmp_path))
    for rank in range(WORLD):
        plain, other, exchanges = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-12)
        assert exchanges == [4, 4]  # two layers, two passes, and none in backward


class InPlace(nn.Module):
    def forward(self, x):
        return self.scale(x.mul_(2.0))

    def __init__(self):
        super().__init__()
        self.scale = nn.Conv2d(4, 4, 1)


def test_an_input_changed_in_place_is_refused():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ModuleList([InPlace()]))
    checkpoint_activations(module)
    x = module[0](torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="input of a InPlace is changed in place"):
        module[1][0](x)


def test_checkpoint_blocks_of_an_encoder():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Block(), Block()

    odd = Odd()
    with pytest.raises(ValueError, match=r"Odd has no blocks.*checkpoint_blocks\(\)"):
        checkpoint_activations(odd)
    block = odd.b
    odd.checkpoint_blocks = lambda: [block]
    assert checkpoint_activations(odd) == [block]
    assert type(odd.a) is Block and type(odd.b) is not Block


def test_blocks_do_not_overlap():
    inner = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    stage = nn.Sequential(Block(), nn.Sequential(Block()), inner)
    body = nn.Module()
    body.stages = nn.ModuleList([stage])
    body.stem, body.act = inner, nn.ReLU()
    encoder = nn.Module()
    encoder.body = body
    assert list(find_blocks(encoder)) == [stage[0], stage[1][0], inner, inner]
