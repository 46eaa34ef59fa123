"""Stages of a pipeline in threads: reading ahead, work handed on, bounded memory, order kept."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_threads(
    function: Callable[[T], R],
    tasks: Iterable[T],
    threads: int = 2,
    ahead: int = 2,
    initializer: Callable[[], None] | None = None,
) -> Generator[tuple[T, Future[R]], None, None]:
    """Tasks in order with what `function` makes of them, computed in threads meanwhile.

    Args:
        function: called with each task in one of the threads.
        tasks: taken one by one as there is room.
        threads: calls that run side by side.
        ahead: tasks taken beyond the one that is yielded.
        initializer: called once in each thread.
    """
    with ThreadPoolExecutor(threads, initializer=initializer) as executor:
        held: deque[tuple[T, Future[R]]] = deque()
        try:
            for task in tasks:
                held.append((task, executor.submit(function, task)))
                if len(held) > ahead:
                    yield held.popleft()
            while held:
                yield held.popleft()
        finally:
            for _, future in held:
                future.cancel()


class HandedOn(Generic[R]):
    """Calls handed on to threads; results come back in the order of the calls.

    Args:
        threads: calls that run side by side.
        most: calls that may be unfinished, or finished with their result not yet taken.
        initializer: called once in each thread.
    """

    def __init__(
        self, threads: int, most: int, initializer: Callable[[], None] | None = None
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, initializer=initializer)
        self._held: deque[Future[R]] = deque()
        self.most = most

    def __enter__(self) -> HandedOn[R]:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def add(self, function: Callable[..., R], *args: object) -> Iterator[R]:
        """Call `function` in a thread; yields the results that are due.

        Those are the oldest ones as far as they are there, and as many as it takes to hold fewer
        than `most`, which are waited for.

        Raises:
            Exception: what a call raised, in place of its result.
        """
        self._held.append(self._executor.submit(function, *args))
        while self._held and (len(self._held) >= self.most or self._held[0].done()):
            yield self._held.popleft().result()

    def rest(self) -> Iterator[R]:
        """Wait for the results of all calls."""
        while self._held:
            yield self._held.popleft().result()


class Budget:
    """Bounds what is in memory at a time; it is granted in the order of the requests' numbers.

    Without that order a later task could hold what an earlier one waits for, while its own result
    waits for the earlier one's.

    Args:
        total: amount that is granted at a time, in any unit. A larger request is granted alone.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._turn = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, number: int, amount: int) -> int:
        """Wait until `amount` is free; requests are numbered from 0, without a gap.

        Returns:
            What has to be given back, at most `total`.
        """
        amount = min(amount, self.total)
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._turn == number and self.used + amount <= self.total)
            )
            self._turn += 1
            self.used += amount
            self._changed.notify_all()
        return amount

    def give(self, amount: int) -> None:
        """Give back what `take` returned."""
        with self._changed:
            self.used -= amount
            self._changed.notify_all()

    def close(self) -> None:
        """Grant everything from now on: the work is being ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
