"""Fewer compute threads while other programs use this machine's cores."""

from __future__ import annotations

import contextlib
import glob
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from mit_semseg.engine.launch import fixed_threads

log = logging.getLogger("mit_semseg")

# A step is disturbed when it takes so many times the median of the last _WINDOW steps, or when its
# threads wait for a core for this share of their time. So many disturbed steps among the last
# _RECENT start a comparison.
_SLOW, _WAITING, _DISTURBED, _RECENT, _WINDOW = 2.0, 0.2, 3, 10, 50
# Steps of each number of threads in a comparison, and what a change has to gain.
_ROUNDS, _GAIN = 5, 0.9
# Seconds until the next comparison, doubled after each, up to the second.
_PAUSE, _LONGEST_PAUSE = 30.0, 960.0


class ThreadTuner:
    """Computes with fewer threads where that is faster, and with all of them again afterwards.

    The threads of an operation wait for each other at its end. Where another program uses one of
    the cores, all of them wait for the thread that shares it, and fewer threads are faster. Whether
    they are is measured: when steps take far longer than their median, or their threads wait for
    cores (which Linux tells), a few steps are computed with each number of threads in turn, and the
    fastest number is kept. From time to time a step with all threads shows whether the other
    program has gone.

    Sums are rounded differently with every number of threads: a run with such a change equals
    another one up to rounding only. `--threads N` fixes the number.

    Args:
        enabled: False where it would measure something else, such as on a GPU.
        clock: seconds, as `time.monotonic` gives them.
        usage: seconds that the threads of this process have computed, and waited for a core.
    """

    def __init__(
        self,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        usage: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        self.most = self.threads = torch.get_num_threads()
        self.enabled = enabled and self.most > 1 and not fixed_threads()
        self.clock, self.usage = clock, usage or thread_usage
        self._paces: deque[float] = deque(maxlen=_WINDOW)  # seconds per unit of work
        self._disturbed: deque[bool] = deque(maxlen=_RECENT)
        self._plan: list[int] = []  # threads of the next steps, while numbers are compared
        self._compared: dict[int, list[float]] = {}
        self._pause = _PAUSE
        self._next = clock()
        self._told = False

    @contextlib.contextmanager
    def step(self, work: float) -> Iterator[None]:
        """Compute what is inside with the number of threads that is best now.

        Args:
            work: how much it is, in units of any kind, such as pixels.
        """
        if not self.enabled:
            yield
            return
        threads = self._plan[0] if self._plan else self.threads
        torch.set_num_threads(threads)
        began, before = self.clock(), self.usage()
        try:
            yield
        finally:
            torch.set_num_threads(self.most)
        computed, waited = (max(0.0, b - a) for a, b in zip(before, self.usage()))
        waiting = waited / (computed + waited) if waited else 0.0
        self._measured(threads, (self.clock() - began) / work, waiting > _WAITING)

    def _measured(self, threads: int, pace: float, waiting: bool) -> None:
        if self._plan:
            del self._plan[0]
            self._compared[threads].append(pace)
            if waiting and threads > self.threads:
                # The other program is still there; no need to look any longer.
                self._plan = []
                del self._compared[threads]
            if not self._plan:
                self._decide()
            return
        self._paces.append(pace)
        slow = pace > _SLOW * statistics.median(self._paces)
        self._disturbed.append(slow or waiting)
        if self.clock() < self._next:
            return
        if sum(self._disturbed) >= _DISTURBED and self.threads > 1:
            # In turn, so that all of them meet the same load.
            self._plan = sorted({self.threads // 2, self.threads - 1, self.threads}) * _ROUNDS
            self._compared = {number: [] for number in self._plan}
        elif self.threads < self.most:
            self._plan = [self.most] * _ROUNDS
            self._compared = {self.threads: list(self._paces), self.most: []}

    def _decide(self) -> None:
        """Keep the number of threads that was fastest, if it is worth the change."""
        mean = {number: statistics.fmean(paces) for number, paces in self._compared.items()}
        best = min(mean, key=mean.__getitem__)
        gain, fewer = mean[self.threads] / mean[best], best < self.threads
        self._disturbed.clear()
        if gain * _GAIN > 1:
            self.threads = best
            self._paces.clear()
            if fewer:
                self._say(gain)
            else:
                return  # and without a pause, if that was too early
        self._next = self.clock() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _say(self, gain: float) -> None:
        if not self._told:
            log.warning(
                "other programs use the cores of this machine, and steps are %.1f times as fast "
                "with fewer threads: computing with %d instead of %d until that changes. Results "
                "may differ by rounding; --threads N fixes the number",
                *(gain, self.threads, self.most),
            )
        self._told = True


def thread_usage() -> tuple[float, float]:
    """Seconds that the living threads of this process have computed and have waited for a core.

    Zeros where the system does not tell (elsewhere than on Linux).
    """
    computed = waited = 0
    for file in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # the thread has ended
            with open(file, encoding="ascii") as stream:
                on_cpu, in_queue, _ = map(int, stream.read().split())
            computed, waited = computed + on_cpu, waited + in_queue
    return computed / 1e9, waited / 1e9


def pixels(images: Iterable[torch.Tensor]) -> int:
    """Pixels of (N, C, H, W) batches, the unit of work of a step."""
    return sum(x.shape[0] * x.shape[-2] * x.shape[-1] for x in images)
