"""The drills: each breaks a job in one way, and says whether what was promised held."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mit_semseg.engine.training.checkpoints import load_state
from mit_semseg.models import ModelBuilder
from mit_semseg.precision import Precision
from mit_semseg.selftest.job import Finished, Ground, Job, Running, environment

# Seconds within which a broken command has to end.
SOON = 10.0


@dataclass
class Outcome:
    """What one drill found.

    Attributes:
        name: of the drill.
        promise: what it put to the test.
        held: whether it did.
        figures: what was measured.
        complaint: what went wrong, "" when nothing did.
    """

    name: str
    promise: str
    held: bool = True
    figures: dict[str, Any] = field(default_factory=dict)
    complaint: str = ""

    def check(self, condition: bool, complaint: str) -> None:
        """The promise does not hold unless `condition` does."""
        if not condition:
            self.held = False
            self.complaint = self.complaint or complaint

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


Drill = Callable[[Ground, bool], Outcome]


# ------------------------------------------------------------------------------ exact resume
def killed(ground: Ground, quick: bool) -> Outcome:
    """SIGKILL at random moments, with and without loading processes."""
    outcome = Outcome("SIGKILL at random moments", "resumed runs end bit-identical")
    reference = ground.unbroken()
    rng = random.Random(304)
    wanted = 3 if quick else 50
    kills = rounds = different = unfinished = resumed = 0
    while kills < wanted:
        rounds += 1
        job = ground.job("killed")
        done = False
        while not done:
            begun = bool(job.folder.states())
            running = job.resume("TRAIN.workers", str(rng.choice((0, 1, 2))))
            if kills < wanted and _killed_in_time(running, job, rng):
                kills += 1
                unfinished += len(list(job.folder.path.glob(".state_step_*")))
            else:
                finished = running.wait()
                outcome.check(not finished.code, f"a resumed run failed: {finished.output[-500:]}")
                done = True
            outcome.check(running.resumed(), f"it did not go on: {running.text()[:1000]}")
            resumed += begun and running.expected in running.text()
        outcome.check(not job.was_set_aside, "a run was taken for an earlier one")
        different += job.differences(reference)
    outcome.check(not different, f"{different} tensors or figures differ")
    outcome.check(resumed > 0, "no start had a state to go on from")
    outcome.figures = {
        "kills": kills,
        "starts that went on from a state": resumed,
        "kills during a write": unfinished,
        "runs completed": rounds,
        "tensors or figures that differ": different,
    }
    return outcome


def _killed_in_time(running: Running, job: Job, rng: random.Random) -> bool:
    """Kill a run somewhere between its first step and its end; False when it was done before."""
    state = {file.name for file in job.folder.states()}
    # Mostly while it works, now and then while it starts.
    if rng.random() < 0.8:
        while running.process.poll() is None:
            if {file.name for file in job.folder.states()} - state:
                break
            time.sleep(0.02)
    time.sleep(rng.random() * 3)
    if running.process.poll() is not None:
        return False
    running.kill()
    running.wait()
    return True


def signalled(ground: Ground, quick: bool) -> Outcome:
    """SIGTERM and SIGINT to the whole session, as Slurm and a terminal send them."""
    outcome = Outcome(
        "SIGTERM and SIGINT", "the step is finished and saved; exit 0, resume command printed"
    )
    reference = ground.unbroken()
    job = ground.job("signalled", TRAIN__checkpoint_minutes=0)
    seconds = []
    # In the first epoch, while it is being validated, and in the second.
    for number, moment in (
        (signal.SIGTERM, _until_stepping),
        (signal.SIGTERM, _until_validating),
        (signal.SIGINT, _until_stepping),
    ):
        before = job.folder.states()[:1]
        running = job.resume()
        moment(running)
        running.mark()
        os.killpg(running.process.pid, number)
        finished = running.wait()
        seconds.append(finished.seconds)
        outcome.check(finished.code == 0, f"exit status {finished.code}: {finished.output[-500:]}")
        outcome.check("--resume auto" in finished.output, "no resume command")
        outcome.check(not finished.has_traceback, finished.output[-500:])
        outcome.check(not finished.left, f"processes left: {finished.left}")
        outcome.check(job.folder.states()[:1] != before, "no state was saved")
        outcome.check(running.resumed(), f"it did not go on: {running.text()[:1000]}")
    outcome.check(not job.train("--resume", "auto").code, "the resumed run failed")
    outcome.check(not job.was_set_aside, "a run was taken for an earlier one")
    different = job.differences(reference)
    outcome.check(not different, f"{different} tensors or figures differ")
    outcome.check(max(seconds) < SOON, f"it took {max(seconds):.1f} s")
    outcome.figures = {
        "seconds from signal to exit": round(max(seconds), 2),
        "tensors or figures that differ": different,
    }
    return outcome


def _until_stepping(running: Running) -> None:
    """Until its bar shows a step that was not there when it appeared."""
    end = time.monotonic() + 120
    while len(set(re.findall(r"epoch \d+/\d+: .*?(\d+)/\d+ \[", running.text()))) < 2:
        if running.process.poll() is not None or time.monotonic() > end:
            raise ChildProcessError(f"the job takes no step:\n{running.text()[-2000:]}")
        time.sleep(0.02)


def _until_validating(running: Running) -> None:
    end = time.monotonic() + 120
    while "validating" not in running.text():
        if running.process.poll() is not None or time.monotonic() > end:
            raise ChildProcessError(f"the job validates nothing:\n{running.text()[-2000:]}")
        time.sleep(0.002)


# ------------------------------------------------------------------------------ files
def damaged(ground: Ground, quick: bool) -> Outcome:
    """The newest state is cut short, or a bit of it flipped, before the run goes on."""
    outcome = Outcome("damaged checkpoints", "named, passed over; the run ends bit-identical")
    reference = ground.unbroken()
    rng = random.Random(305)
    job = ground.job("damaged")
    for hurt in (cut_short, flip_bit):
        running = job.start("train", "--resume", "auto")
        first = job.folder.states()[:1]
        while running.process.poll() is None and len(_newer(job, first)) < 2:
            time.sleep(0.02)
        running.kill()
        running.wait()
        file = job.folder.states()[0]
        hurt(file, rng)
        before = job.folder.states()[1]
        running = job.start("train", "--resume", "auto")
        while running.process.poll() is None and "INFO] training " not in running.text():
            time.sleep(0.02)
        said = running.text()
        outcome.check(f"{file} is damaged" in said, f"{file.name} was not found damaged")
        outcome.check(f"resuming from {before}:" in said, f"{before.name} was not taken")
        running.kill()
        running.wait()
    outcome.check(not job.train("--resume", "auto").code, "the resumed run failed")
    different = job.differences(reference)
    outcome.check(not different, f"{different} tensors or figures differ")
    outcome.figures = {"damaged files": 2, "tensors or figures that differ": different}
    return outcome


def _newer(job: Job, than: list[Path]) -> list[Path]:
    states = job.folder.states()
    return states[: states.index(than[0])] if than and than[0] in states else states


def cut_short(file: Path, rng: random.Random) -> None:
    """Take away the end of a file."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip_bit(file: Path, rng: random.Random) -> None:
    """Flip one bit in the middle half of a file, where the weights are."""
    size = file.stat().st_size
    with file.open("r+b") as handle:
        at = size // 4 + rng.randrange(size // 2)
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 1 << rng.randrange(8)]))


def full(ground: Ground, quick: bool) -> Outcome:
    """From some moment on no file can grow beyond a megabyte, as on a full disk."""
    outcome = Outcome("a full disk", "one line names the file; earlier states stay valid")
    reference = ground.unbroken()
    job = ground.job("full")
    running = job.start("train")
    running.wait_for(job.folder.path, "state_step_*.pth")
    no_room(running)
    finished = running.wait()
    outcome.check(finished.code == 2, f"exit status {finished.code}: {finished.output[-500:]}")
    outcome.check("cannot write" in finished.error, f"no clear line: {finished.output[-500:]}")
    outcome.check(not finished.has_traceback, finished.output[-500:])
    outcome.check(bool(job.folder.states()), "no state is left")
    running = job.resume()
    outcome.check(not running.wait().code, "the resumed run failed")
    outcome.check(running.resumed(), f"it did not go on: {running.text()[:1000]}")
    different = job.differences(reference)
    outcome.check(not different, f"{different} tensors or figures differ")
    outcome.figures = {
        "line": finished.error.replace(str(ground.folder), ""),
        "tensors or figures that differ": different,
    }
    return outcome


def no_room(running: Running) -> None:
    """Let no file of a running command grow beyond a megabyte from now on."""
    resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


# ------------------------------------------------------------------------------ fail fast
def lost_loader(ground: Ground, quick: bool) -> Outcome:
    """SIGKILL one of the loading processes, as the system does when memory runs out."""
    job = ground.job("lost_loader", TRAIN__epoch_iters=10000, TRAIN__workers=2)
    return _lost_worker(job, "train", "a loading process killed", "ended with signal SIGKILL")


def lost_evaluator(ground: Ground, quick: bool) -> Outcome:
    """SIGKILL one of the processes of an evaluation."""
    job = ground.job("lost_evaluator")
    shutil.copytree(ground.unbroken().cfg.DIR, job.cfg.DIR, dirs_exist_ok=True)
    lines = Path(job.cfg.DATASET.list_val).read_text() * 200
    many = job.file.with_suffix(".odgt")
    many.write_text(lines)
    return _lost_worker(
        job,
        "eval",
        "an evaluation process killed",
        "died with signal SIGKILL",
        *("--workers", "2", "DATASET.list_val", str(many)),
    )


def _lost_worker(job: Job, command: str, name: str, said: str, *options: str) -> Outcome:
    outcome = Outcome(name, f"the command ends within {SOON:g} s and says why; no process is left")
    running = job.start(command, *options)
    end = time.monotonic() + 120
    while not (running.children() and "img/s" in _bar(running)) and time.monotonic() < end:
        if command == "train" and running.children() and "loss" in running.text():
            break
        time.sleep(0.05)
    workers = running.children()
    if not workers:
        raise ChildProcessError(f"the job has no workers:\n{running.text()[-2000:]}")
    os.kill(workers[-1], signal.SIGKILL)
    running.mark()
    finished = running.wait(60)
    _ended(outcome, finished, said)
    outcome.check(not finished.has_traceback, finished.output[-800:])
    return outcome


def _bar(running: Running) -> str:
    """The bar once it has moved."""
    moved = [line for line in re.split(r"[\r\n]", running.text()) if "img/s" in line]
    return "".join(line for line in moved if " 0/" not in line)


def _ended(outcome: Outcome, finished: Finished, said: str) -> None:
    outcome.check(finished.code > 0, f"exit status {finished.code}")
    outcome.check(finished.seconds < SOON, f"it took {finished.seconds:.1f} s")
    outcome.check(said in finished.error, f"no cause in: {finished.output[-800:]}")
    outcome.check(not finished.left, f"processes left: {finished.left}")
    outcome.figures = {"seconds to the end": round(finished.seconds, 2), "exit": finished.code}


def lost_rank(ground: Ground, quick: bool) -> Outcome:
    """SIGKILL one of two ranks of torchrun."""
    outcome = Outcome("a rank killed", f"torchrun ends within {SOON:g} s; no process is left")
    job = ground.job("lost_rank", TRAIN__epoch_iters=10000, TRAIN__workers=1)
    running = job.start(
        "train",
        launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
    )
    running.wait_for(job.folder.path, "state_step_*.pth")
    ranks = [pid for pid in running.members() if "LOCAL_RANK=1" in environment(pid)]
    os.kill(min(ranks), signal.SIGKILL)
    running.mark()
    finished = running.wait(60)
    # What the other rank says; that the first died of SIGKILL is in torchrun's own table.
    _ended(outcome, finished, "lost the connection to another rank")
    outcome.check("Signal 9 (SIGKILL)" in finished.output, "torchrun does not name the cause")
    return outcome


def stalled(ground: Ground, quick: bool) -> Outcome:
    """The loading process stops answering, as on a disk that hangs."""
    limit = 8
    outcome = Outcome("a stall", "TRAIN.stall_seconds later the run ends and names the file")
    job = ground.job("stalled", TRAIN__epoch_iters=10000, TRAIN__stall_seconds=limit)
    running = job.start("train")
    running.wait_for(job.folder.path, "state_step_*.pth")
    for pid in running.children():
        os.kill(pid, signal.SIGSTOP)
    running.mark()
    finished = running.wait(60)
    outcome.check(finished.code > 0, f"exit status {finished.code}")
    outcome.check(finished.seconds < limit + SOON, f"it took {finished.seconds:.1f} s")
    outcome.check(
        bool(re.search(r"no (batch|progress) for .*\.png", finished.error)), finished.output[-500:]
    )
    outcome.check(not finished.left, f"processes left: {finished.left}")
    outcome.figures = {"limit in s": limit, "seconds to the end": round(finished.seconds, 2)}
    return outcome


def not_finite(ground: Ground, quick: bool) -> Outcome:
    """A learning rate at which the loss becomes infinite."""
    outcome = Outcome("a loss that is not finite", "files named, batch saved, loss reproduced")
    job = ground.job("not_finite", TRAIN__lr_encoder=1e30, TRAIN__lr_decoder=1e30, TRAIN__ema=0.0)
    finished = job.train()
    outcome.check(finished.code == 2, f"exit status {finished.code}: {finished.output[-500:]}")
    outcome.check(
        bool(re.search(r"the loss of step \d+ is .*\.(jpg|png)", finished.error)), finished.error
    )
    saved = next(iter(job.folder.path.glob("nonfinite_step_*.pth")), None)
    outcome.check(saved is not None, "no batch was saved")
    if saved is not None:
        loss = replay(job, saved)
        outcome.check(not torch.isfinite(loss).item(), f"replayed, the loss is {loss.item()}")
        outcome.figures = {"replayed loss": str(loss.item())}
    return outcome


def replay(job: Job, file: Path) -> torch.Tensor:
    """The loss of a saved batch, with the weights it met."""
    saved = load_state(file)
    module = ModelBuilder.from_config(job.cfg, inference=False)
    module.encoder.load_state_dict(saved["encoder"])
    module.decoder.load_state_dict(saved["decoder"])
    with torch.no_grad(), Precision.of(job.cfg.TRAIN.precision, torch.device("cpu")).autocast():
        loss, _ = module.train()(saved["batch"][0])
    return loss
