"""Worker processes that take tasks one at a time; a death or an error in any ends the run.

Every worker has a pipe of its own to the parent, which hands it a new task for each result.
There is no shared queue whose lock a dying worker could take with it, and the parent sleeps
until a pipe or the end of a process wakes it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

# What runs in a worker: (its setup, its tasks) -> one result per task, then one final value.
Work = Callable[[Any, Iterator[Any]], Generator[Any, None, Any]]

# Mistakes in the user's files stay what they are, so that callers can treat them as such.
USER_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "FileNotFoundError": FileNotFoundError,
}


class WorkerError(RuntimeError):
    """A worker process failed in a way that is not the user's; the message holds its traceback."""


def run_here(
    work: Callable[[Iterator[Any]], Generator[Any, None, Any]],
    tasks: Iterable[Any],
    on_result: Callable[[Any], None],
) -> Any:
    """Run tasks in this process; returns the final value of `work`."""
    return _drain(work(iter(tasks)), on_result)


def run_pool(
    work: Work,
    setups: Sequence[Any],
    tasks: Iterable[Any],
    on_result: Callable[[Any], None],
    describe: Callable[[Any], str] = str,
    ahead: int = 2,
    timeout: float | None = None,
) -> list[Any]:
    """Share tasks among one new process per setup.

    Args:
        work: a module-level generator function; called in each process with its setup and an
            iterator of tasks, it yields one result per task and returns a final value.
        setups: one picklable setup per process.
        tasks: small picklable values, handed out in order to whichever process is free.
        on_result: called in this process with every result, in the order of completion.
        describe: what a task is called in error messages.
        ahead: tasks a process is given beyond the one it has yet to answer, at least as many as
            `work` asks for before its first result.
        timeout: seconds without an answer from any process until the run is given up; None
            waits as long as they live.

    Returns:
        The final value of every process, in the order of `setups`.

    Raises:
        ValueError: raised by a worker, with the worker's traceback as its cause.
        FileNotFoundError: likewise.
        ChildProcessError: a worker died.
        TimeoutError: all of them hang.
        WorkerError: a worker raised anything else.
    """
    context = multiprocessing.get_context("spawn")
    pending = deque(tasks)
    workers: list[_Worker] = []
    try:
        for index, setup in enumerate(setups):
            workers.append(_Worker(context, work, setup, index))
        # In turns, so that few tasks are spread over all the workers.
        for _ in range(ahead + 1):
            for worker in workers:
                worker.give(pending)
        return _collect(workers, pending, on_result, describe, timeout)
    finally:
        _end(workers)


class _Worker:
    """The parent's end of one process."""

    def __init__(
        self, context: multiprocessing.context.SpawnContext, work: Work, setup: Any, index: int
    ) -> None:
        self.index = index
        self.tasks: deque[Any] = deque()  # given and not yet answered
        self.final: Any = None
        self.told_to_end = False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, setup, theirs), daemon=True)
        self.process.start()
        # Only the worker may hold its end: then its death closes the pipe.
        theirs.close()

    def give(self, pending: deque[Any]) -> None:
        """Send the next task, or once the word that there are no more."""
        # A worker that has just died is noticed by its sentinel; writing to it must not raise.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if pending:
                self.tasks.append(pending.popleft())
                self.pipe.send(self.tasks[-1])
            elif not self.told_to_end:
                self.told_to_end = True
                self.pipe.send(None)

    def receive(self) -> tuple[str, Any] | None:
        """The next message, None when the process died without one."""
        try:
            if self.pipe.poll():
                message: tuple[str, Any] = pickle.loads(self.pipe.recv_bytes())
                return message
        except (EOFError, ConnectionResetError):
            return None
        return None


def _end(workers: list[_Worker]) -> None:
    """End the processes, by force those that do not go by themselves; all within seconds."""
    for worker in workers:
        if worker.final is None:
            worker.process.terminate()
    deadline = time.monotonic() + 3
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(3)
        worker.pipe.close()


def _collect(
    workers: list[_Worker],
    pending: deque[Any],
    on_result: Callable[[Any], None],
    describe: Callable[[Any], str],
    timeout: float | None,
) -> list[Any]:
    running = {worker.index: worker for worker in workers}
    while running:
        wakers: dict[Any, int] = {}
        for worker in running.values():
            wakers[worker.pipe] = wakers[worker.process.sentinel] = worker.index
        awake = wait(list(wakers), timeout)
        if not awake:
            held = [describe(task) for worker in running.values() for task in worker.tasks]
            raise TimeoutError(
                f"no answer from any worker for {timeout:g} s; they hold {', '.join(held)}: look "
                "at these files, or raise VAL.timeout where an image may take that long"
            )
        for index in {wakers[ready] for ready in awake}:  # type: ignore[index]
            worker = running[index]
            message = worker.receive()
            if message is None:
                raise _death(worker, describe)
            kind, value = message
            if kind == "error":
                raise _error(worker, *value)
            if kind == "final":
                worker.final = (value,)
                del running[index]
                continue
            worker.tasks.popleft()
            worker.give(pending)
            on_result(value)
    return [worker.final[0] for worker in workers]


def _error(worker: _Worker, kind: str, message: str, trace: str) -> Exception:
    cause = WorkerError(f"worker {worker.index} failed with {kind}: {message}\n\n{trace}")
    if kind not in USER_ERRORS:
        return cause
    error = USER_ERRORS[kind](message)
    error.__cause__ = cause
    return error


def _death(worker: _Worker, describe: Callable[[Any], str]) -> ChildProcessError:
    worker.process.join(5)
    code = worker.process.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = f"signal {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += " (the system kills so when memory runs out)"
    at = "after its last task"
    if worker.tasks:
        at = f"while it held {', '.join(describe(task) for task in worker.tasks)}"
    return ChildProcessError(
        f"worker {worker.index} (process {worker.process.pid}) died with {how} {at}; what it "
        'printed is above. A script that starts workers needs `if __name__ == "__main__":`'
    )


def _drain(results: Generator[Any, None, Any], on_result: Callable[[Any], None]) -> Any:
    # Closed also when `on_result` raises: its threads end now, not with the error's traceback.
    with contextlib.closing(results):
        while True:
            try:
                result = next(results)
            except StopIteration as end:
                return end.value
            on_result(result)


def _serve(work: Work, setup: Any, pipe: Connection) -> None:
    """What a worker process does."""
    # Control-C reaches the whole group; the parent ends its workers, without their tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(kind: str, value: Any) -> None:
        # Plainly pickled: multiprocessing would send tensors as handles of shared memory, which
        # are gone when this process ends before they are opened.
        pipe.send_bytes(pickle.dumps((kind, value)))

    try:
        final = _drain(work(setup, _tasks(pipe)), lambda result: send("result", result))
        send("final", final)
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent may be gone
            send("error", (type(error).__name__, str(error), traceback.format_exc()))
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """A parent that is killed takes its workers along, even those deep in an image."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _tasks(pipe: Connection) -> Iterator[Any]:
    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise SystemExit(1) from None  # the parent is gone
        if task is None:
            return
        yield task
