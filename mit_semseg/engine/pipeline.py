"""Stages of a pipeline in threads, with ordered results and bounded memory."""

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
    """Call a function with each task in threads; yields the tasks in order with their futures.

    Args:
        function: called with a task.
        tasks: consumed as needed.
        threads: number of threads.
        ahead: tasks submitted beyond the one that is yielded.
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


class OrderedCalls(Generic[R]):
    """Calls in threads, with results in the order of the calls.

    Args:
        threads: number of threads.
        most: calls whose result has not been returned yet, at most.
        initializer: called once in each thread.
    """

    def __init__(
        self, threads: int, most: int, initializer: Callable[[], None] | None = None
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, initializer=initializer)
        self._held: deque[Future[R]] = deque()
        self.most = most

    def __enter__(self) -> OrderedCalls[R]:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def add(self, function: Callable[..., R], *args: object) -> Iterator[R]:
        """Call `function` in a thread; yields results of earlier calls.

        Yields the oldest results that are available, and waits for results while there are `most`
        calls or more.

        Raises:
            Exception: raised by a call, in place of its result.
        """
        self._held.append(self._executor.submit(function, *args))
        while self._held and (len(self._held) >= self.most or self._held[0].done()):
            yield self._held.popleft().result()

    def rest(self) -> Iterator[R]:
        """Wait for the remaining results."""
        while self._held:
            yield self._held.popleft().result()


class Budget:
    """Limits memory in use; requests are granted in the order of their numbers.

    Any other order could deadlock: a later task could hold the memory that an earlier one needs,
    while its result has to wait for that of the earlier one.

    Args:
        total: largest amount in use, in any unit. A larger request is granted when nothing else is
            in use.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._turn = 0
        self._closed = False
        self._changed = threading.Condition()

    def acquire(self, number: int, amount: int) -> int:
        """Wait until `amount` is available.

        Args:
            number: of the request, counted from 0 without gaps.
            amount: requested.

        Returns:
            The amount to release, at most `total`.
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

    def release(self, amount: int) -> None:
        """Release an amount returned by `acquire`."""
        with self._changed:
            self.used -= amount
            self._changed.notify_all()

    def close(self) -> None:
        """Grant all requests from now on, to end waiting threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
