"""A training that a GPU has too little memory for: one line with advice, and the exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from mit_semseg.cli import main; sys.exit(main(sys.argv[1:]))"
# What the allocator says, raised in the place of a step.
FAKED = """
import torch
from mit_semseg.models import SegmentationModule
def forward(self, *args, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore.")
SegmentationModule.forward = forward
"""
LIMITED = """
import torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction((512 << 20) / total)
"""


@pytest.mark.parametrize(
    ("device", "before", "size"),
    [
        ("cpu", FAKED, (48, 64)),
        pytest.param("0", LIMITED, (600, 800), marks=pytest.mark.gpu),
    ],
)
def test_a_training_without_memory_ends_in_one_line(tmp_path, make_images, device, before, size):
    make_images(tmp_path / "data", [size] * 4)
    listed = str(tmp_path / "data" / "val.odgt")
    settings = {
        "DIR": tmp_path / "model",
        "DATASET.root_dataset": tmp_path / "data",
        "DATASET.list_train": listed,
        "DATASET.list_val": listed,
        "DATASET.num_class": 4,
        "DATASET.label_offset": 0,
        "DATASET.imgSizes": [size[0]],
        "MODEL.arch_encoder": "resnet18dilated",
        "MODEL.arch_decoder": "c1",
        "MODEL.fc_dim": 512,
        "MODEL.weights_encoder": "none",
        "TRAIN.batch_size_per_gpu": 8,
        "TRAIN.num_epoch": 1,
        "TRAIN.epoch_iters": 2,
        "TRAIN.eval_epochs": 0,
        "TRAIN.workers": 0,
        "TRAIN.precision": "fp32",
    }
    opts = [str(x) for pair in settings.items() for x in pair]
    command = [sys.executable, "-c", before + RUN, "train", "--gpus", device, *opts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert errors[0].startswith("error: CUDA out of memory. Tried to allocate")
    assert "lower TRAIN.batch_size_per_gpu (and raise TRAIN.accumulate)" in errors[0]
    assert "TRAIN.precision bf16" in errors[0]
