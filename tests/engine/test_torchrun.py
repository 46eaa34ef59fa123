"""Ranks of torchrun: the gradient of one process, one stream of samples, one set of files."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time

import pytest
import scaling
import torch
import torch.distributed as dist
import torch.nn.functional as F
from communication import table, traffic_of
from jobs import SIZES, Job, figures_of, layout, phrases, steps_of
from processes import ROOT, Command, free_port, kill, needs_proc, start_ranks, torchrun
from torch import nn

from mit_semseg.config import load_config
from mit_semseg.demo import streets
from mit_semseg.engine.rendezvous import join_process_group, leave_process_group
from mit_semseg.lib.nn import sync_function
from mit_semseg.models import ModelBuilder

CPU = torch.device("cpu")
WORLD = 3
CLASSES = 5
# Batch, height, width of each rank; and the share of its pixels that are labelled.
BATCHES = [(1, 48, 64), (2, 64, 40), (1, 40, 40)]
LABELLED = [0.9, 0.3, 0.0]
AUXILIARY = 0.4


# ------------------------------------------------------------------------------ the gradient
def network():
    """The same network in every process, in float64, without dropout."""
    torch.manual_seed(5)
    opts = [
        *("MODEL.arch_encoder", "resnet18dilated", "MODEL.arch_decoder", "ppm_deepsup"),
        *("MODEL.fc_dim", 512, "MODEL.weights_encoder", "none"),
        *("DATASET.num_class", CLASSES, "TRAIN.deep_sup_scale", AUXILIARY),
    ]
    module = ModelBuilder.from_config(load_config(None, opts), inference=False).double().train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    return module


def batch_of(rank):
    generator = torch.Generator().manual_seed(rank)
    n, height, width = BATCHES[rank]
    images = torch.randn(n, 3, height, width, generator=generator, dtype=torch.float64)
    size = (n, height // 8, width // 8)
    label = torch.randint(CLASSES, size, generator=generator)
    label[torch.rand(size, generator=generator) >= LABELLED[rank]] = -1
    return {"img_data": images, "seg_label": label}


def one_rank(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    join_process_group([CPU], 60)
    module = network()
    parallel = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
    with counted() as numbers:
        loss, accuracy = parallel(batch_of(rank))
        loss.backward()
    figures = torch.stack([loss.detach(), accuracy.detach().double()])
    dist.all_reduce(figures)
    torch.save(
        {
            "figures": figures / WORLD,
            "grads": {name: p.grad for name, p in module.named_parameters()},
            "buffers": dict(module.named_buffers()),
            "numbers": numbers,
        },
        f"{folder}/{rank}.pt",
    )
    leave_process_group()


@contextlib.contextmanager
def counted():
    """Bytes of every exchange but for the gradients', by kind, while the context lasts."""
    numbers = {"all_reduce": [], "all_gather": []}
    before = dist.all_reduce, sync_function._all_gather

    def reduce(tensor, *args, **options):
        numbers["all_reduce"].append(tensor.nbytes)
        return before[0](tensor, *args, **options)

    def gather(together, own, group):
        numbers["all_gather"].append(own.nbytes)
        before[1](together, own, group)

    dist.all_reduce, sync_function._all_gather = reduce, gather
    try:
        yield numbers
    finally:
        dist.all_reduce, sync_function._all_gather = before


class RaggedBatchNorm(nn.Module):
    """torch's batch norm over the batches of several threads, whatever their sizes.

    The threads meet in every layer, where one of them joins the rows of all.
    """

    def __init__(self, norm, meeting, ranks):
        super().__init__()
        self.norm = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum).double()
        self.norm.load_state_dict(norm.state_dict())
        self.meeting, self.ranks = meeting, ranks
        self.inputs = [torch.empty(0)] * WORLD
        self.outputs = []

    def forward(self, x):
        rank = self.ranks[threading.get_ident()]
        n, c, h, w = x.shape
        self.inputs[rank] = x.permute(0, 2, 3, 1).reshape(-1, c)
        if self.meeting.wait() == 0:
            self.outputs = list(
                self.norm(torch.cat(self.inputs)).split([len(part) for part in self.inputs])
            )
        self.meeting.wait()
        y = self.outputs[rank]
        self.meeting.wait()
        return y.reshape(n, h, w, c).permute(0, 3, 1, 2).clone()  # which ReLU changes in place


def union():
    """One process with torch's own batch norm and loss: (network, loss, accuracy), after backward.

    The loss is the sum over the labelled pixels of all batches divided by their number.
    """
    module = network()
    meeting, ranks = threading.Barrier(WORLD, timeout=60), {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, RaggedBatchNorm(child, meeting, ranks))
    heads = {}

    def run(rank):
        ranks[threading.get_ident()] = rank
        try:
            batch = batch_of(rank)
            features = module.encoder(batch["img_data"], return_feature_maps=True)
            heads[rank] = module.decoder.logits(features)
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    labels = [batch_of(rank)["seg_label"] for rank in range(WORLD)]
    labelled = sum(int((label >= 0).sum()) for label in labels)

    def mean(head):
        sums = [
            F.cross_entropy(heads[rank][head], labels[rank], ignore_index=-1, reduction="sum")
            for rank in range(WORLD)
        ]
        return torch.stack(sums).sum() / labelled

    loss = mean(0) + AUXILIARY * mean(1)
    loss.backward()
    right = sum(int((heads[r][0].argmax(1) == labels[r]).sum()) for r in range(WORLD))
    return module, loss.detach(), torch.tensor(right / labelled, dtype=torch.float64)


def test_ranks_have_the_gradient_of_one_process_on_all_valid_pixels(tmp_path):
    counts = [int((batch_of(rank)["seg_label"] >= 0).sum()) for rank in range(WORLD)]
    assert counts[2] == 0 and 0 < counts[1] < counts[0] or 0 < counts[0] != counts[1] > 0
    start_ranks(one_rank, WORLD, free_port(), str(tmp_path))
    got = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    module, loss, accuracy = union()

    expected = {name.replace(".norm.", "."): p.grad for name, p in module.named_parameters()}
    buffers = {name.replace(".norm.", "."): value for name, value in module.named_buffers()}
    exact = {"rtol": 1e-8, "atol": 1e-8}
    for rank in got:
        torch.testing.assert_close(rank["figures"], torch.stack([loss, accuracy]), **exact)
        assert rank["grads"].keys() == expected.keys()
        for name, grad in rank["grads"].items():
            torch.testing.assert_close(grad, expected[name], **exact, msg=lambda m, n=name: n + m)
        for name, value in rank["buffers"].items():
            torch.testing.assert_close(value, buffers[name], **exact, msg=lambda m, n=name: n + m)
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    assert largest > 1e-3, "otherwise the tolerance would say nothing"

    # What docs/scaling.md reckons with: gradients in float64 here take twice the bytes of float32.
    traffic = traffic_of(network())
    for rank in got:
        reduced, gathered = rank["numbers"]["all_reduce"], rank["numbers"]["all_gather"]
        assert len(reduced) + len(gathered) + 1 == traffic.exchanges, "the figures are the one more"
        pixels = 16
        sent = (WORLD - 1) * sum(gathered) + 2 * (WORLD - 1) / WORLD * (sum(reduced) - pixels) / 2
        assert sent == pytest.approx(traffic.statistics_sent(WORLD), rel=1e-12)


def test_the_page_on_scaling_holds_the_traffic_of_every_recipe():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    lines = table()
    assert len(lines) > 20
    first = page.index(lines[0])
    assert page[first : first + len(lines)] == lines, "run python tests/engine/communication.py"


# ------------------------------------------------------------------------------ the commands
@pytest.fixture(scope="module")
def job(tmp_path_factory, make_images):
    """A training by one process and one by two ranks, both done: the job and what they said."""
    job = Job(tmp_path_factory.mktemp("job"))
    make_images(job.data, SIZES)
    output = []
    for ranks in (1, 2):
        words = ("train", "--gpus", "cpu", "--cfg", job.config(f"ranks_{ranks}"))
        codes, text = job.run_forked(*words, ranks=ranks)
        assert codes == [0] * ranks, text
        output.append(text)
    return job, output


def test_ranks_never_see_the_same_sample_in_one_pass(job):
    root = job[0].root
    seen = [(root / f"seen_of_2_{rank}").read_text().splitlines() for rank in range(2)]
    everything = sorted((root / "seen_of_1_0").read_text().splitlines())
    assert len(set(everything)) == len(everything) == len(SIZES)
    assert [len(one) for one in seen] == [len(SIZES) // 2] * 2
    assert sorted(seen[0] + seen[1]) == everything


def test_ranks_leave_the_files_and_figures_of_one_process(job):
    job, output = job
    folders = [job.root / f"ranks_{ranks}" for ranks in (1, 2)]
    assert layout(folders[0]) == layout(folders[1]) >= {"encoder_epoch_1.pth"}
    for folder, steps, who in zip(folders, (6, 3), ("", " rank 0")):
        assert steps_of(folder) == list(range(1, steps + 1)), "one writer"
        assert [one["epoch"] for one in figures_of(folder, "val")] == [1]
        for line in (folder / "log.txt").read_text().splitlines():
            assert re.match(rf"\[[-\d]+ [:\d]+{who} [A-Z]+\] ", line), line
    for kind in ("train", "val"):
        keys = [{tuple(one) for one in figures_of(folder, kind)} for folder in folders]
        assert keys[0] == keys[1]
    assert phrases(folders[0]) == phrases(folders[1])
    assert [text.count("Training done: ") for text in output] == [1, 1]


def test_ranks_evaluate_exactly_as_one_process(job):
    job, _ = job
    image = job.data / "img" / "part1" / "3.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    words = ["eval", "--gpus", "cpu", "--cfg", job.config("ranks_2"), "--out"]
    figures, tables = [], []
    for ranks in (1, 2):
        out = job.root / f"scores_{ranks}"
        codes, output = job.run_forked(*words, out, "VAL.boundary", "True", ranks=ranks)
        assert codes == [1] * ranks, output  # an image was left out
        assert output.count("[Eval Summary]:") == 1, "rank 0 alone prints"
        assert output.count("1 of 6 images failed:") == 1
        stored = json.loads((out / "eval.json").read_text())
        assert stored.pop("processes") == ranks and stored["images"] == 5
        assert 0 <= stored["mean_boundary_f"] <= 1
        figures.append({k: v for k, v in stored.items() if "seconds" not in k})
        tables.append((out / "eval.csv").read_bytes())
        bars = [f"class_{figure}.png" for figure in ("boundary_f", "dice", "iou")]
        names = sorted(path.name for path in out.iterdir())
        assert names == [*bars, "confusion.png", "eval.csv", "eval.json"]
    image.write_bytes(whole)
    assert figures[0] == figures[1], "to the last digit"
    assert tables[0] == tables[1]


# ------------------------------------------------------------------------------ hosts
class Hosts:
    """Hosts of one training: each an agent of torchrun, with one rank and one core."""

    def __init__(self, job):
        self.job, self.port, self.commands = job, free_port(), []

    def start(
        self, name, config, *options, address="127.0.0.1", inside=(), resume=(), **environment
    ):
        cores = sorted(os.sched_getaffinity(0))
        core = str(cores[len(self.commands) % len(cores)])
        start = torchrun(
            *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", f"job{self.port}"),
            *("--rdzv-endpoint", f"{address}:{self.port}", *options),
        )
        words = [*inside, "taskset", "-c", core, *start, "train.py", "--gpus", "cpu"]
        words += ["--cfg", config, *resume]
        self.commands.append(Command(words, self.job.root / f"{name}.txt", **environment))
        return self.commands[-1]

    def until_step(self, step, name):
        """Wait until the first host has written figures of that step."""
        folder = self.job.root / name
        self.commands[0].until(lambda: max(steps_of(folder), default=0) >= step, 120)


NETWORK = {"MODEL__arch_encoder": "resnet18dilated", "MODEL__fc_dim": 512}
LONG = {**NETWORK, "TRAIN__num_epoch": 200, "TRAIN__eval_epochs": 0, "TRAIN__keep": 1}
LOST = r"rank \d: error: .*lost the connection to another rank in step \d+.*--resume auto resumes"


@pytest.fixture
def hosts(tmp_path, make_images):
    hosts = Hosts(Job(tmp_path))
    make_images(hosts.job.data, SIZES)
    yield hosts
    for command in hosts.commands:
        command.destroy()


def kill_all(command):
    for pid in command.members():
        kill(pid)


@needs_proc
@pytest.mark.slow
def test_a_lost_host_ends_the_others_with_one_line(hosts):
    config = hosts.job.config("lost", **{**LONG, "TRAIN__stall_seconds": 20})
    first, second = (
        hosts.start(name, config, "--nnodes", "2", "--rdzv-conf", f"is_host={is_host}")
        for name, is_host in (("a", "true"), ("b", "false"))
    )
    hosts.until_step(3, "lost")
    began = time.monotonic()
    kill_all(second)
    code = first.code(25)
    seconds = time.monotonic() - began
    first.assert_nothing_left(2)
    print(f"ended {seconds:.1f} s after the kill: {code}")
    assert code != 0, first.text()
    assert len(re.findall(LOST, first.text())) == 1, first.text()
    assert seconds < 10, "a closed connection is noticed at once"
    assert not second.members()


@needs_proc
@pytest.mark.slow
def test_a_terminated_job_saves_and_resumes(hosts):
    config = hosts.job.config("job", **{**LONG, "TRAIN__num_epoch": 3, "TRAIN__epoch_iters": 6})
    options = ("--nnodes", "1", "--nproc-per-node", "2")
    first = hosts.start("a", config, *options)
    hosts.until_step(3, "job")
    first.process.terminate()  # as Slurm does: the agents of torchrun, not the ranks
    first.code(30)
    first.assert_nothing_left(2)
    (stopped,) = re.findall(r"Stopped by SIGTERM after step (\d+) of 18", first.text())
    second = hosts.start("b", config, *options, resume=("--resume", "auto"))
    assert second.code(120) == 0, second.text()
    assert f"resuming from {hosts.job.root / 'job'}/state_step_{stopped}.pth" in second.text()
    assert steps_of(hosts.job.root / "job") == list(range(1, 19))


@needs_proc
@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_the_run_resumes(hosts):
    config = hosts.job.config("elastic", **{**LONG, "TRAIN__num_epoch": 4})
    options = ("--nnodes", "1:2", "--max-restarts", "3", "--rdzv-conf", "last_call_timeout=1")
    command = hosts.start("a", config, *options, "--nproc-per-node", "2")
    hosts.until_step(5, "elastic")
    ranks = [pid for pid in command.members("train.py") if pid != command.process.pid]
    assert len(ranks) == 2
    kill(ranks[1])
    assert command.code(120) == 0, command.text()
    (resumed,) = re.findall(r"resuming from \S+: step (\d+) of 12", command.text())
    assert int(resumed) >= 3
    assert steps_of(hosts.job.root / "elastic") == list(range(1, 13)), "every step once"
    assert command.text().count("Training done: ") == 1
    command.assert_nothing_left(2)


def ip(*words):
    """Whether `ip` did what was asked."""
    return subprocess.run(["ip", *words], capture_output=True, timeout=20).returncode == 0


@pytest.fixture
def two_machines():
    """Two network namespaces, a and b, with 10.77.0.1 and 10.77.0.2 at the ends of a cable."""
    names = tuple(f"semseg{os.getpid()}{end}" for end in "ab")
    if not shutil.which("ip") or not ip("netns", "add", names[0]):
        pytest.skip("network namespaces need root and the kernel's leave")
    try:
        assert ip("netns", "add", names[1])
        cable = ("link", "add", "cable", "netns", names[0], "type", "veth")
        assert ip(*cable, "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            assert ip("-n", name, "link", "set", "cable", "up")
            assert ip("-n", name, "link", "set", "lo", "up")
            assert ip("netns", "exec", name, "sysctl", "-w", "net.ipv4.tcp_retries2=5")
        yield names[0], names[1]
    finally:
        for name in names:
            ip("netns", "delete", name)


@needs_proc
@pytest.mark.slow
def test_a_cut_cable_ends_both_hosts_within_the_time_out(two_machines, hosts):
    """No connection is closed and nothing answers: only clocks tell that the other is gone.

    The ranks look at theirs. The agent of torchrun on the second host, which speaks to the first
    one's store without a limit, waits for the kernel to give the connection up: that takes a
    quarter of an hour, or what docs/scaling.md says to set.
    """
    config = hosts.job.config("cut", **{**LONG, "TRAIN__stall_seconds": 10})
    for number, machine in enumerate(two_machines, 1):
        settings = f"is_host={number == 1},read_timeout=10".lower()
        here = ("--nnodes", "2", "--local-addr", f"10.77.0.{number}", "--rdzv-conf", settings)
        where = {"address": "10.77.0.1", "inside": ("ip", "netns", "exec", machine)}
        hosts.start(machine, config, *here, **where, GLOO_SOCKET_IFNAME="cable")
    hosts.until_step(3, "cut")
    assert ip("-n", two_machines[0], "link", "set", "cable", "down")
    began = time.monotonic()
    for command, seconds in zip(hosts.commands, (30, 60)):
        code = command.code(seconds - (time.monotonic() - began))
        print(f"ended {time.monotonic() - began:.1f} s after the cut: {code}")
        assert code != 0
        command.assert_nothing_left(2)
        assert re.search(rf"{LOST}|rank \d: error: no progress for 1\d s", command.text())


@needs_proc
@pytest.mark.slow
def test_the_rest_of_an_elastic_job_resumes_without_a_lost_host(hosts):
    config = hosts.job.config("shrunk", **{**LONG, "TRAIN__num_epoch": 8})
    quick = "last_call_timeout=15,keep_alive_interval=2,keep_alive_max_attempt=5"
    for name, is_host in (("a", "true"), ("b", "false")):
        settings = f"is_host={is_host},{quick}"
        options = ("--nnodes", "1:2", "--max-restarts", "3", "--rdzv-conf", settings)
        hosts.start(name, config, *options)
    first, second = hosts.commands
    hosts.until_step(8, "shrunk")
    kill_all(second)
    assert first.code(200) == 0, first.text()
    assert "Training done: " in first.text()
    resumed = re.findall(r"resuming from \S+: step (\d+) of (\d+)", first.text())
    assert len(resumed) >= 1 and int(resumed[-1][0]) > 0, first.text()


def test_the_table_of_scaling_by_hand():
    found = {
        (ranks, fix_bn): [(images / ranks, cpu) for images, cpu in ((8, 20), (10, 30))]
        for ranks, fix_bn in scaling.FORMS
    }
    rows = scaling.table(found)
    assert rows[3] == "| 2 ranks of torchrun, batch 2 each | 4.0, 5.0 | 20, 30 |"
    line = "TRAIN.fix_bn False: two ranks are 0.50 times as fast (0.50 to 0.50), with 0.89 s a step"
    assert line in rows


@pytest.mark.slow
def test_scaling_is_measured(tmp_path):
    scenes = streets.write(tmp_path, 8, 1, size=(64, 96))
    for ranks in (1, 2):
        images, cpu = scaling.measure(ranks, False, scenes, steps=2)
        assert images > 0 and cpu > 1
