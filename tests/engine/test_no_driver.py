"""`--gpus cpu` leaves the driver of GPUs alone: starting it takes seconds, and memory on a GPU."""

import pytest
from jobs import SIZES, Job

# A command in which whoever asks for GPUs ends it, and is named; torch itself may ask whether
# there are any, as some of its optimizers do, but nothing may be started.
REFUSING = """
import os, sys, traceback, torch

def refuse(name):
    answer = getattr(torch.cuda, name)

    def call(*args, **options):
        asks = sys._getframe(1).f_code.co_filename
        if name != "_lazy_init" and asks.startswith(os.path.dirname(torch.__file__)):
            return answer(*args, **options)
        traceback.print_stack()
        print(name, "was called", file=sys.stderr, flush=True)
        os._exit(9)

    return call

for name in ("_lazy_init", "is_available", "device_count"):
    setattr(torch.cuda, name, refuse(name))

if __name__ == "__main__":
    from mit_semseg.cli import main

    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory, make_images):
    job = Job(tmp_path_factory.mktemp("cpu"))
    make_images(job.data, SIZES)
    (job.root / "refusing.py").write_text(REFUSING)
    return job


def run(job, command, *words):
    settings = {"TRAIN__precision": "bf16", "TRAIN__ema": 0.9, "TEST__checkpoint": "epoch_1.pth"}
    config = job.config("trained", TRAIN__workers=1, TEST__result=str(job.root), **settings)
    done = job.run(job.root / "refusing.py", command, *words, "--cfg", config)
    assert done.process.returncode == 0, done.text()


def test_training_evaluation_and_prediction_on_the_cpu_ask_for_no_gpu(job):
    run(job, "train", "--gpus", "cpu")
    run(job, "eval", "--gpus", "cpu", "--workers", "2")
    run(job, "predict", "--gpu", "cpu", "--imgs", job.data / "img" / "part0" / "0.png")


def test_the_guard_notices(job):
    done = job.run(job.root / "refusing.py", "train", "--cfg", job.config("asks"))
    assert done.process.returncode == 9 and "was called" in done.text()
