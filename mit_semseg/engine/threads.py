"""Choosing the number of compute threads while other programs use the cores."""

from __future__ import annotations

import contextlib
import glob
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from mit_semseg.engine.cpu import fixed_threads

log = logging.getLogger("mit_semseg")

# A step is disturbed if its threads wait for a core for more than a share _WAITING of their time,
# or, on systems that do not report this, if it takes _SLOW times the median of the last _WINDOW
# steps. _DISTURBED such steps among the last _RECENT start a comparison.
_SLOW, _WAITING, _DISTURBED, _RECENT, _WINDOW = 2.0, 0.2, 3, 10, 50
# Steps per number of threads in a comparison, and the largest relative time that is worth a change.
_ROUNDS, _GAIN = 5, 0.9
# Seconds before more threads are tried again, and after a comparison without a change; doubled each
# time, up to _LONGEST_PAUSE.
_PAUSE, _LONGEST_PAUSE = 30.0, 960.0


class ThreadTuner:
    """Uses fewer compute threads while that is faster.

    The threads of an operation wait for each other at its end. If another program uses one of the
    cores, all threads wait for the one on that core, and fewer threads are faster. When threads
    wait for cores (as reported by Linux; on other systems when steps take much longer than their
    median), a few steps are measured with different numbers of threads, and the fastest is used.
    From time to time a few steps with all threads show whether the other program has ended.

    Sums are rounded differently with each number of threads, so results differ by rounding.
    `--threads N` fixes the number.

    Args:
        enabled: False on a GPU, and with compiled code, which is recompiled for each number of
            threads.
        clock: returns seconds, as `time.monotonic`.
        usage: returns the seconds for which threads of this process have computed and have waited
            for a core; zeros if the system does not report them.
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
        self._plan: list[int] = []  # numbers of threads of the next steps of a comparison
        self._compared: dict[int, list[float]] = {}
        self._pause = _PAUSE
        self._next_down = self._next_up = clock()
        self._warned = False

    @contextlib.contextmanager
    def step(self, work: float) -> Iterator[None]:
        """Use the best number of threads within this context, and measure it.

        Args:
            work: amount of work, in any unit, such as pixels.
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
        pace, busy = (self.clock() - began) / work, computed + waited
        waiting = waited > _WAITING * busy if busy else None
        self._measured(threads, pace, waiting)

    def _measured(self, threads: int, pace: float, waiting: bool | None) -> None:
        if self._plan:
            del self._plan[0]
            self._compared[threads].append(pace)
            if waiting and threads > self.threads:
                # The other program is still running.
                self._plan = []
                del self._compared[threads]
            if not self._plan:
                self._decide()
            return
        self._paces.append(pace)
        slow = pace > _SLOW * statistics.median(self._paces)
        self._disturbed.append(slow if waiting is None else waiting)
        now, disturbed = self.clock(), sum(self._disturbed) >= _DISTURBED
        if disturbed and self.threads > 1 and now >= self._next_down:
            # Alternating, so that all numbers are measured under the same load.
            self._plan = sorted({self.threads // 2, self.threads - 1, self.threads}) * _ROUNDS
            self._compared = {number: [] for number in self._plan}
        elif self.threads < self.most and now >= self._next_up:
            self._plan = [self.most] * _ROUNDS
            self._compared = {self.threads: list(self._paces), self.most: []}

    def _decide(self) -> None:
        """Use the fastest number of threads, if it is faster by enough."""
        mean = {number: statistics.fmean(paces) for number, paces in self._compared.items()}
        best = min(mean, key=mean.__getitem__)
        gain, fewer = mean[self.threads] / mean[best], best < self.threads
        changed = gain * _GAIN > 1
        if changed:
            self.threads = best
            self._paces.clear()
        self._disturbed.clear()
        if changed and fewer and not self._warned:
            self._warned = True
            log.warning(
                "other programs use the cores of this machine: steps are %.1f times as fast with "
                "fewer threads; using %d instead of %d threads until that changes. Results may "
                "differ by rounding; --threads N fixes the number",
                *(gain, self.threads, self.most),
            )
        if changed and not fewer:
            return  # no pause: it may have been too early
        self._next_up = self.clock() + self._pause
        # Even fewer threads may be faster.
        self._next_down = self.clock() if changed else self._next_up
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def thread_usage() -> tuple[float, float]:
    """Seconds for which the threads of this process have computed and have waited for a core.

    Zeros on systems other than Linux.
    """
    computed = waited = 0
    for file in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # the thread has ended
            with open(file, encoding="ascii") as stream:
                on_cpu, in_queue, _ = map(int, stream.read().split())
            computed, waited = computed + on_cpu, waited + in_queue
    return computed / 1e9, waited / 1e9


def pixels(images: Iterable[torch.Tensor]) -> int:
    """Number of pixels of (N, C, H, W) tensors."""
    return sum(x.shape[0] * x.shape[-2] * x.shape[-1] for x in images)
