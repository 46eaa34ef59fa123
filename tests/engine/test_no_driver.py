"""`--gpus cpu` leaves the driver of GPUs alone: starting it takes seconds, and memory on a GPU."""

from jobs import SIZES, Job

# Commands in which whoever asks for GPUs ends the process, and is named; torch itself may ask
# whether there are any, as some of its optimizers do, but nothing may be started.
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

import small_runs
small_runs.register()

if __name__ == "__main__":
    from mit_semseg.cli import main

    _, config, image = sys.argv
    assert main(["train", "--gpus", "cpu", "--cfg", config]) == 0
    assert main(["eval", "--gpus", "cpu", "--workers", "2", "--cfg", config]) == 0
    assert main(["predict", "--gpu", "cpu", "--imgs", image, "--cfg", config]) == 0
    print("on the CPU alone", flush=True)
    main(["train", "--cfg", config])
"""


def test_commands_on_the_cpu_ask_for_no_gpu(tmp_path, make_images):
    job = Job(tmp_path)
    make_images(job.data, SIZES)
    (job.root / "refusing.py").write_text(REFUSING)
    settings = {"TRAIN__precision": "bf16", "TRAIN__ema": 0.9, "TEST__checkpoint": "epoch_1.pth"}
    config = job.config("trained", TRAIN__workers=1, TEST__result=str(job.root), **settings)
    done = job.run(job.root / "refusing.py", config, job.data / "img" / "part0" / "0.png")
    before, output, after = done.text().partition("on the CPU alone")
    assert output and "was called" not in before, before
    # Without `--gpus cpu` the question is noticed.
    assert done.process.returncode == 9 and "was called" in after, after
