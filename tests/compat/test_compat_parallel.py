"""Replicas as the published toolkit had them: callbacks, a master and its slaves, gathering."""

import pytest
import torch
from torch import nn

from mit_semseg.compat import data, parallel
from mit_semseg.lib.nn import UserScatteredDataParallel, patch_replication_callback


class SumOfReplicas(nn.Module):
    """Adds up its input over all replicas, by way of the published master and pipes."""

    def __init__(self):
        super().__init__()
        self.master = parallel.SyncMaster(self.combine)
        self.seen = []

    def combine(self, messages):
        self.seen.append(len(messages))
        total = sum(message for _, message in messages)
        return [(identifier, total) for identifier, _ in messages]

    def __data_parallel_replicate__(self, ctx, copy_id):
        self.copy_id = copy_id
        if copy_id == 0:
            ctx.sync_master = self.master
        else:
            self.pipe = ctx.sync_master.register_slave(copy_id)

    def forward(self, x):
        return self.master.run_master(x) if self.copy_id == 0 else self.pipe.run_slave(x)


def test_a_layer_with_a_custom_sync_master_runs_on_replicas():
    layer = SumOfReplicas()
    model = UserScatteredDataParallel(nn.Sequential(layer, layer), device_ids=["cpu"] * 3)
    patch_replication_callback(model)
    for _ in range(2):  # the second pass makes new replicas
        out = model([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])])
        assert out.tolist() == [21.0] * 3  # 7 from each, and the sum of these
    assert layer.seen == [3] * 4
    assert layer.master.nr_slaves == 2


def test_answers_go_to_the_replica_that_asked():
    master = parallel.SyncMaster(lambda messages: [(i, f"{m}!") for i, m in messages])
    pipe = master.register_slave("b")
    pipe.queue.put(("b", "second"))
    assert master.run_master("first") == "first!"
    assert pipe.result.get() == "second!"
    pipe.queue.put(("b", "left over"))
    with pytest.raises(RuntimeError, match="have not been collected"):
        master.register_slave("c")
    turned = parallel.SyncMaster(lambda messages: [(5, 1)])
    with pytest.raises(ValueError, match="it must be for 0"):
        turned.run_master("x")
    future = parallel.FutureResult()
    future.put(1)
    with pytest.raises(RuntimeError, match="has not been fetched"):
        future.put(2)
    assert future.get() == 1


def test_callbacks_of_modules_share_a_context_and_the_first_comes_first():
    called = []

    class Layer(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def __data_parallel_replicate__(self, ctx, copy_id):
            ctx.members = [*getattr(ctx, "members", []), self.name]
            called.append((ctx.members[0], copy_id))

    copies = [nn.Sequential(Layer("a"), Layer("b")) for _ in range(2)]
    parallel.execute_replication_callbacks(copies)
    assert called == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_default_context_is_a_run_of_one_replica():
    layer, plain = parallel.SynchronizedBatchNorm1d(3), nn.BatchNorm1d(3)
    layer.__data_parallel_replicate__(parallel.CallbackContext(), 0)
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("target", [-1, "cpu"])
def test_outputs_are_gathered_in_dicts(target):
    outputs = [{"x": torch.ones(n, 2), "loss": torch.tensor(float(n)), "no": None} for n in (1, 2)]
    joined = parallel.dict_gather(outputs, target)
    assert joined["x"].shape == (3, 2)
    assert joined["loss"].tolist() == [1, 2]
    assert joined["no"] is None
    model = parallel.DictGatherDataParallel(nn.Linear(2, 1))
    model.dim = 0  # torch sets it where there is a GPU
    assert model.gather([torch.ones(1), torch.zeros(2)], target).tolist() == [1, 0, 0]


def test_batches_are_copied_one_to_a_device():
    batches = [{"x": torch.ones(1)}, {"x": torch.zeros(2)}]
    assert parallel._async_copy(batches, ["cpu", "cpu"]) == tuple(batches)
    assert parallel._async_copy_stream(batches, ["cpu", "cpu"]) == batches
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        parallel._async_copy(batches, ["cpu"])


def test_tensors_are_compared():
    case = parallel.TorchTestCase()
    case.assertTensorClose(torch.tensor([1.0, 100.0]), torch.tensor([1.0005, 100.05]))
    with pytest.raises(AssertionError):
        case.assertTensorClose(torch.tensor([1.0]), torch.tensor([1.01]))


# ------------------------------------------------------------------------------ lib.utils.data
def test_datasets_and_loaders_of_2018():
    x, y = torch.arange(6).float(), torch.arange(6)
    pairs = data.TensorDataset(data_tensor=x, target_tensor=y)
    assert pairs.data_tensor is x
    assert pairs.target_tensor is y
    both = data.ConcatDataset([pairs, pairs])
    assert len(both) == 12
    assert both[7] == (x[1], y[1])
    parts = data.random_split(pairs, [4, 2])
    assert sorted(int(label) for part in parts for _, label in part) == [0, 1, 2, 3, 4, 5]
    loader = data.DataLoader(pairs, batch_size=4, drop_last=True)
    (batch,) = data.DataLoaderIter(loader)
    assert torch.equal(batch[0], x[:4])
    assert data.pin_memory_batch({"a": ["text", None]}) == {"a": ["text", None]}
    assert torch.equal(data.default_collate([1, 2]), torch.tensor([1, 2]))


def test_samplers_of_2018():
    class Backwards(data.Sampler):
        def __init__(self, data_source):
            super().__init__(data_source)
            self.data_source = data_source

        def __iter__(self):
            return iter(range(len(self.data_source))[::-1])

    items = list(range(5))
    batches = data.BatchSampler(Backwards(items), batch_size=2, drop_last=False)
    assert list(batches) == [[4, 3], [2, 1], [0]]
    ranks = [data.DistributedSampler(items, num_replicas=2, rank=rank) for rank in range(2)]
    seen = [set(rank) for rank in ranks]
    assert seen[0] | seen[1] == set(items)
    assert {len(rank) for rank in ranks} == {3}
    assert sorted(data.RandomSampler(items)) == sorted(data.SubsetRandomSampler(items)) == items
    assert list(data.WeightedRandomSampler([0, 1, 0], 3)) == [1, 1, 1]
