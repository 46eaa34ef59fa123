"""What the published scripts do with the package: train on two devices, evaluate in two processes.

The calls are theirs, in the same order; the CPU stands for their GPUs.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import forkserver
from torch import nn
from torch.utils.data import DataLoader

from mit_semseg.dataset import TestDataset, TrainDataset, ValDataset
from mit_semseg.lib.nn import (
    UserScatteredDataParallel,
    async_copy_to,
    patch_replication_callback,
    user_scattered_collate,
)
from mit_semseg.lib.utils import as_numpy
from mit_semseg.models import ModelBuilder, SegmentationModule
from mit_semseg.utils import AverageMeter, accuracy, intersectionAndUnion, setup_logger

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 4
PATIENCE = 120  # seconds, for any one thing that another process is to do


@pytest.fixture
def cfg(tmp_path, make_images):
    """The module-level configuration, as scripts fill it, for three images."""
    from mit_semseg.config import cfg as shared

    cfg = shared.clone()
    make_images(tmp_path, [(40, 48), (48, 40), (40, 40)])
    lists = str(tmp_path / "val.odgt")
    cfg.merge_from_list([
        *("DIR", str(tmp_path / "ckpt"), "DATASET.root_dataset", str(tmp_path)),
        *("DATASET.list_train", lists, "DATASET.list_val", lists),
        *("DATASET.num_class", str(CLASSES), "DATASET.imgSizes", "(24, 32)"),
        *("DATASET.imgMaxSize", "64", "MODEL.arch_encoder", "mobilenetv2dilated"),
        *("MODEL.arch_decoder", "c1_deepsup", "MODEL.fc_dim", "320"),
        *("TRAIN.epoch_iters", "2", "TRAIN.workers", "0", "VAL.checkpoint", "epoch_1.pth"),
    ])  # fmt: skip
    cfg.MODEL.weights_encoder = "none"
    os.makedirs(cfg.DIR)
    return cfg


def nets(cfg, **options):
    """Encoder, decoder and loss by the published calls."""
    encoder = ModelBuilder.build_encoder(
        arch=cfg.MODEL.arch_encoder.lower(),
        fc_dim=cfg.MODEL.fc_dim,
        weights=cfg.MODEL.weights_encoder,
    )
    decoder = ModelBuilder.build_decoder(
        arch=cfg.MODEL.arch_decoder.lower(),
        fc_dim=cfg.MODEL.fc_dim,
        num_class=cfg.DATASET.num_class,
        weights=cfg.MODEL.weights_decoder,
        **options,
    )
    return encoder, decoder, nn.NLLLoss(ignore_index=-1)


def loader(data, batch_size, **options):
    return DataLoader(
        data, batch_size=batch_size, shuffle=False, collate_fn=user_scattered_collate, **options
    )


def decayed(module):
    """Parameter groups found by the kinds of layers, which must find all of them."""
    weights = []
    others = []
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)):
            weights.append(m.weight)
            others += [] if m.bias is None else [m.bias]
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            others += [p for p in (m.weight, m.bias) if p is not None]
    assert len(list(module.parameters())) == len(weights) + len(others)
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


def train(cfg, devices):
    """One epoch, with its checkpoint; the losses."""
    torch.manual_seed(cfg.TRAIN.seed)
    encoder, decoder, crit = nets(cfg)
    module = SegmentationModule(encoder, decoder, crit, cfg.TRAIN.deep_sup_scale)
    data = TrainDataset(
        cfg.DATASET.root_dataset,
        cfg.DATASET.list_train,
        cfg.DATASET,
        batch_per_gpu=cfg.TRAIN.batch_size_per_gpu,
    )
    batches = iter(loader(data, len(devices), num_workers=cfg.TRAIN.workers, drop_last=True))
    if len(devices) > 1:
        module = UserScatteredDataParallel(module, device_ids=devices)
        patch_replication_callback(module)
    optimizers = [
        torch.optim.SGD(decayed(net), lr=cfg.TRAIN.lr_encoder, momentum=cfg.TRAIN.beta1)
        for net in (encoder, decoder)
    ]
    cfg.TRAIN.running_lr_encoder = cfg.TRAIN.lr_encoder  # scripts keep figures there
    losses = AverageMeter()
    seen = []
    module.train(not cfg.TRAIN.fix_bn)
    for _ in range(cfg.TRAIN.epoch_iters):
        batch = next(batches)
        assert len(batch) == len(devices)
        module.zero_grad()
        loss, acc = module(batch)
        assert loss.shape == acc.shape == ((2,) if len(devices) > 1 else ())
        loss.mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.update(loss.mean().item())
        seen.append(loss.mean().item())
    assert losses.average() == pytest.approx(sum(seen) / len(seen))
    torch.save(encoder.state_dict(), f"{cfg.DIR}/encoder_epoch_1.pth")
    torch.save(decoder.state_dict(), f"{cfg.DIR}/decoder_epoch_1.pth")
    return seen


def evaluate(cfg, data, put):
    """Figures of every image of a part of the list."""
    encoder, decoder, crit = nets(cfg, use_softmax=True)
    module = SegmentationModule(encoder, decoder, crit).eval()
    for (batch,) in loader(data, cfg.VAL.batch_size, num_workers=0):
        label = as_numpy(batch["seg_label"][0])
        with torch.no_grad():
            scores = async_copy_to(torch.zeros(1, CLASSES, *label.shape), "cpu")
            for image in batch["img_data"]:
                feed = batch.copy()
                feed["img_data"] = image
                del feed["img_ori"]
                del feed["info"]
                found = module(async_copy_to(feed, "cpu"), segSize=label.shape)
                scores = scores + found / len(cfg.DATASET.imgSizes)
            pred = as_numpy(scores.max(dim=1)[1].squeeze(0).cpu())
        put((*accuracy(pred, label), *intersectionAndUnion(pred, label, CLASSES)))


def work(cfg, start_idx, end_idx, results):
    """One process of two."""
    torch.set_num_threads(1)
    data = ValDataset(
        cfg.DATASET.root_dataset,
        cfg.DATASET.list_val,
        cfg.DATASET,
        start_idx=start_idx,
        end_idx=end_idx,
    )
    evaluate(cfg, data, results.put_nowait)


def summary(results):
    acc, inter, union = AverageMeter(), AverageMeter(), AverageMeter()
    for value, pixels, intersection, total in results:
        acc.update(value, pixels)
        inter.update(intersection)
        union.update(total)
    return inter.sum / (union.sum + 1e-10), acc.average()


@pytest.mark.timeout(3 * PATIENCE)
def test_training_on_two_devices_and_evaluation_by_two_processes(cfg):
    losses = train(cfg, ["cpu", "cpu"])
    assert all(map(math.isfinite, losses))
    cfg.MODEL.weights_encoder = os.path.join(cfg.DIR, f"encoder_{cfg.VAL.checkpoint}")
    cfg.MODEL.weights_decoder = os.path.join(cfg.DIR, f"decoder_{cfg.VAL.checkpoint}")

    count = len(Path(cfg.DATASET.list_val).read_text().splitlines())
    share = math.ceil(count / 2)
    context = forkserver()
    queue = context.Queue(500)
    processes = [
        context.Process(target=work, args=(cfg, k * share, min((k + 1) * share, count), queue))
        for k in range(2)
    ]
    try:
        for process in processes:
            process.start()
        divided = [queue.get(timeout=PATIENCE) for _ in range(count)]
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()

    alone = []
    data = ValDataset(cfg.DATASET.root_dataset, cfg.DATASET.list_val, cfg.DATASET)
    evaluate(cfg, data, alone.append)
    for one, other in zip(summary(divided), summary(alone)):
        np.testing.assert_allclose(one, other, atol=0.01)  # threads round differently
    assert 0 <= summary(alone)[1] <= 1


def test_an_image_is_predicted_from_a_custom_list(cfg, tmp_path):
    cfg.list_test = [{"fpath_img": str(tmp_path / "img" / "part0" / "0.png")}]
    encoder, decoder, crit = nets(cfg, use_softmax=True)
    module = SegmentationModule(encoder, decoder, crit).eval()
    for (batch,) in loader(TestDataset(cfg.list_test, cfg.DATASET), 1, drop_last=True):
        size = batch["img_ori"].shape[:2]
        with torch.no_grad():
            feed = async_copy_to({"img_data": batch["img_data"][0]}, "cpu")
            scores = module(feed, segSize=size)
        assert scores.shape == (1, CLASSES, *size)
        torch.testing.assert_close(scores.sum(1), torch.ones(1, *size))


def test_a_script_writes_no_log_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup_logger(distributed_rank=0).info("Loaded configuration file")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ shell scripts
def shell(script, folder, *arguments, **environment):
    """Runs a copy of a shell script in `folder`, which is where they work."""
    shutil.copy(ROOT / script, folder)
    done = subprocess.run(
        ["bash", str(folder / script), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_a_download_is_made(tmp_path):
    """Into the places from which the published notebook reads."""
    name = "ade20k-resnet50dilated-ppm_deepsup"
    host, folder = tmp_path / "host", tmp_path / "here"
    (host / name).mkdir(parents=True)
    folder.mkdir()
    for part in ("encoder", "decoder"):
        torch.save({part: torch.ones(1)}, host / name / f"{part}_epoch_20.pth")
    (host / "ADE_val_00001519.jpg").write_bytes(b"a photograph")
    shell("demo_test.sh", folder, DOWNLOAD_ONLY="1", MIT_SEMSEG_MIRROR=host.as_uri())
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "ADE_val_00001519.jpg",
        "demo_test.sh",
        f"ckpt/{name}/ADE_val_00001519.jpg",
        f"ckpt/{name}/decoder_epoch_20.pth",
        f"ckpt/{name}/encoder_epoch_20.pth",
    }


def test_ade20k_is_fetched_by_its_published_name(tmp_path):
    output = shell("download_ADE20K.sh", tmp_path, "--to", "elsewhere", PYTHON="echo")
    assert output.split() == [
        *("-m", "mit_semseg.cli", "data", "download", "ade20k", "--to", "elsewhere")
    ]
    assert os.access(ROOT / "download_ADE20K.sh", os.X_OK)
