"""Simultaneous requests share a forward pass."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mit_semseg.errors import one_line
from mit_semseg.result import Result
from mit_semseg.serving.limits import Limits

log = logging.getLogger("mit_semseg")


@dataclass(eq=False)
class Job:
    """A request that waits for its answer.

    Attributes:
        size: (width, height) in pixels, which jobs of a batch have in common.
        load: returns the image, (H, W, 3) uint8 RGB.
        answer: makes the body of the answer.
        future: the answer, or the error.
    """

    size: tuple[int, int]
    load: Callable[[], np.ndarray]
    answer: Callable[[Result], bytes]
    future: Future[bytes] = field(default_factory=Future)


class Batches:
    """Computes jobs in one thread, oldest first, several of one size at a time.

    Images are decoded when their batch is computed, and answers are encoded while the next batch
    is: the pixels of two batches are in memory, of all other jobs only the uploaded bytes.

    Args:
        segment: returns the results of a list of images, (H, W, 3) uint8 RGB.
        limits: `batch`, `window` and `megapixels` are used.
        on_batch: called with the number of images of each batch.
    """

    def __init__(
        self,
        segment: Callable[[list[Any]], Sequence[Result]],
        limits: Limits,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._segment, self._limits, self._on_batch = segment, limits, on_batch
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.seconds = 0.1  # per image, a moving average
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "images")
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """The number of jobs that wait."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether jobs are accepted and computed."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> Future[bytes]:
        """Append a job; returns its future, which may be cancelled.

        Raises:
            RuntimeError: closed.
        """
        with self._changed:
            if not self.alive:
                raise RuntimeError("no more jobs: closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Compute what waits, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        encoding: list[Future[None]] = []
        try:
            while jobs := self._collect():
                started = time.monotonic()
                done = self._compute(jobs)
                wait(encoding)
                encoding = [self._pool.submit(_answer, *pair) for pair in done]
                per_image = (time.monotonic() - started) / len(jobs)
                self.seconds = 0.9 * self.seconds + 0.1 * per_image
        finally:
            wait(encoding)
            with self._changed:
                self._closed = True
                for job in self._jobs:
                    if job.future.set_running_or_notify_cancel():
                        job.future.set_exception(RuntimeError("the server has failed"))
                self._jobs.clear()

    def _collect(self) -> list[Job]:
        """The jobs of the next batch; none when closed and done."""
        with self._changed:
            jobs: list[Job] = []
            while not jobs:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return []
                width, height = size = self._jobs[0].size
                most = max(1, min(self._limits.batch, self._limits.pixels // (width * height)))

                def full(size: tuple[int, int] = size, most: int = most) -> bool:
                    return self._closed or sum(job.size == size for job in self._jobs) >= most

                self._changed.wait_for(full, self._limits.window / 1000)
                same = [job for job in self._jobs if job.size == size][:most]
                for job in same:
                    self._jobs.remove(job)
                # False for jobs that have been cancelled, by a time-out.
                jobs = [job for job in same if job.future.set_running_or_notify_cancel()]
        return jobs

    def _compute(self, jobs: list[Job]) -> list[tuple[Job, Result]]:
        """The results of the jobs; errors are set as those of their futures."""
        loaded: list[tuple[Job, np.ndarray]] = []
        for job, image in [(job, self._pool.submit(job.load)) for job in jobs]:
            try:
                loaded.append((job, image.result()))
            except (ValueError, OSError, MemoryError) as error:
                job.future.set_exception(error)
        if not loaded:
            return []
        self._on_batch(len(loaded))
        try:
            results = self._segment([image for _, image in loaded])
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            log.error("a batch failed: %s", one_line(error, named=True))
            for job, _ in loaded:
                job.future.set_exception(RuntimeError("the image could not be computed"))
            return []
        return [(job, result) for (job, _), result in zip(loaded, results)]


def _answer(job: Job, result: Result) -> None:
    try:
        job.future.set_result(job.answer(result))
    except (ValueError, OSError, MemoryError) as error:
        log.error("an answer failed: %s", one_line(error, named=True))
        job.future.set_exception(RuntimeError("the answer could not be encoded"))
