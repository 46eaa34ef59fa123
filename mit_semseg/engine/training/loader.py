"""Loading of one rank's batches, from any position of the training data."""

from __future__ import annotations

import gc
import itertools
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import connection
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from mit_semseg.dataset import TrainDataset
from mit_semseg.dataset.reading import READINGS
from mit_semseg.engine.cpu import cpu_count, local_ranks, set_threads
from mit_semseg.engine.signals import leave_to_parent
from mit_semseg.engine.watchdog import ReadingFiles
from mit_semseg.errors import exit_cause
from mit_semseg.lib.nn import user_scattered_collate

log = logging.getLogger("mit_semseg")


class RankSampler(Sampler[int]):
    """Batch indices of one rank.

    Each micro-step consumes one batch per device and rank: with R ranks of D devices, a rank takes
    D consecutive batches out of every R x D.

    Args:
        first: index of the first batch of all ranks.
        micro_steps: number of micro-steps.
        devices: number of devices of this rank.
        rank: of this process.
        world: number of ranks.
    """

    def __init__(self, first: int, micro_steps: int, devices: int, rank: int, world: int) -> None:
        self.first, self.micro_steps = first, micro_steps
        self.devices, self.rank, self.world = devices, rank, world

    def __len__(self) -> int:
        return self.micro_steps * self.devices

    def __iter__(self) -> Iterator[int]:
        for step in range(self.micro_steps):
            mine = self.first + (step * self.world + self.rank) * self.devices
            yield from range(mine, mine + self.devices)


class TrainLoader:
    """Loads the batches of one rank for all steps of a run; `close` ends its worker processes.

    Iterating yields one batch dict per device for every micro-step. It raises ChildProcessError
    if a worker process dies, and TimeoutError, with the files, if there is no batch for
    `stall_seconds`. A file that is replaced by another sample is logged once.

    Args:
        data: the training data.
        devices: of this rank.
        rank: of this process.
        world: number of ranks.
        workers: worker processes per device, limited by the number of cores.
        stall_seconds: longest time for a batch.
        first: index of the first batch of all ranks.
        micro_steps: number of micro-steps, each with one batch per device.

    Attributes:
        bad_files: files that could not be used, with the reason.
    """

    def __init__(
        self,
        data: TrainDataset,
        devices: Sequence[torch.device],
        rank: int,
        world: int,
        *,
        workers: int,
        stall_seconds: int,
        first: int,
        micro_steps: int,
    ) -> None:
        self.data, self.stall_seconds = data, stall_seconds
        self.sampler = RankSampler(first, micro_steps, len(devices), rank, world)
        self.bad_files: dict[str, str] = {}
        # On the CPU the loader shares the cores with the network.
        on_cpu = devices[0].type == "cpu"
        cores = cpu_count() // 2 if on_cpu else cpu_count()
        workers = min(workers * len(devices), max(1, cores // local_ranks()))
        self.reading_files = ReadingFiles(workers)
        self.loader = DataLoader(
            data,
            batch_size=len(devices),
            sampler=self.sampler,
            collate_fn=user_scattered_collate,
            num_workers=workers,
            pin_memory=devices[0].type == "cuda",
            timeout=stall_seconds if workers else 0,
            worker_init_fn=partial(_start_worker, self.reading_files),
            # A separate generator: otherwise starting the loader would change the random numbers
            # of dropout, and a resumed run would differ.
            generator=torch.Generator().manual_seed(data.seed),
        )
        # The garbage collector writes to every object, which would copy memory pages shared with
        # the worker processes: 40 MiB for each of them.
        gc.freeze()
        self._batches: Iterator[Any] | None = iter(self.loader)
        self._processes: list[Any] = list(getattr(self._batches, "_workers", ()))
        self._waiting = False
        self._position = 0
        self._earlier_handler: Any = None
        if workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises at the death of a worker wherever the main thread is, even
            # while it writes a checkpoint.
            self._earlier_handler = signal.signal(signal.SIGCHLD, self._on_child)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for position in range(len(self.loader)):
            self._position = position
            if self._batches is None:
                return
            self._waiting = True
            try:
                self._check_processes()
                batch = next(self._batches)
            except (ConnectionError, EOFError):
                # A dying process may break the transfer of its batch before it counts as dead,
                # and its sentinel is ready a little before it can be joined.
                ready = connection.wait([process.sentinel for process in self._processes], 5)
                for process in self._processes:
                    if process.sentinel in ready:
                        process.join(5)
                self._check_processes()
                raise
            except RuntimeError as error:
                self._check_processes()
                if "exited unexpectedly" in str(error):
                    raise ChildProcessError(str(error)) from error
                if "timed out" not in str(error):
                    raise
                files = self.files()
                self.kill()  # a hanging process ignores the usual shutdown
                raise TimeoutError(
                    f"no batch for {self.stall_seconds} s while loading {', '.join(files)}: check "
                    "these files, raise TRAIN.stall_seconds, or lower TRAIN.workers"
                ) from error
            finally:
                self._waiting = False
            for item in batch:
                self._report(item.pop("skipped", []))
            yield batch

    def _report(self, skipped: Sequence[tuple[str, str]]) -> None:
        for file, reason in skipped:
            if file not in self.bad_files:
                log.warning("replaced by another sample: %s", reason)
                self.bad_files[file] = reason

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._check_processes()

    def _check_processes(self) -> None:
        for process in self._processes:
            if not process.is_alive():
                where = (
                    f"while reading {', '.join(files)}"
                    if (files := self.reading())
                    else f"before the batch of {', '.join(self._files(self._position))}"
                )
                raise ChildProcessError(
                    f"a data loader process (pid {process.pid}) died with "
                    f"{exit_cause(process.exitcode)} {where}: if memory ran out, lower "
                    "TRAIN.workers; --resume auto resumes from the newest checkpoint"
                )

    def reading(self) -> list[str]:
        """Files being read in this process and in the worker processes."""
        return [*READINGS.files(), *self.reading_files.files()]

    def files(self) -> list[str]:
        """Files being read; if there are none, the images of the batch being waited for."""
        return self.reading() or (self._files(self._position) if self._waiting else [])

    def kill(self) -> None:
        """Kill the worker processes."""
        self._waiting = False
        for process in self._processes:
            process.kill()
            process.join(1)

    def _files(self, position: int) -> list[str]:
        """Images of a micro-step."""
        indices = itertools.islice(self.sampler, position * self.sampler.devices, None)
        first = itertools.islice(indices, self.sampler.devices)
        return [path for index in first for path in self.data.files(index)]

    def close(self) -> None:
        """End the worker processes."""
        # Not left to the garbage collector: a traceback may hold references to them.
        shutdown = getattr(self._batches, "_shutdown_workers", None)
        self._batches = None
        if shutdown is not None:
            shutdown()
        self.kill()
        gc.unfreeze()
        if self._earlier_handler is not None:
            signal.signal(signal.SIGCHLD, self._earlier_handler)
            self._earlier_handler = None


def _start_worker(files: ReadingFiles, worker: int) -> None:
    set_threads(1)
    leave_to_parent()
    READINGS.listener = files.writer(worker)
