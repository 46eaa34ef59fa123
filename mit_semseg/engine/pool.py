"""A pool of worker processes; an error or the death of one ends the run.

Each worker has its own pipe to the parent, which sends a new task for each result. There is no
shared queue, whose lock could be held by a dying worker.
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

from mit_semseg.errors import exit_cause

# Function of a worker: (setup, tasks) -> yields one result per task, returns a final value.
Work = Callable[[Any, Iterator[Any]], Generator[Any, None, Any]]

# Errors for mistakes in the user's files keep their type.
USER_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "FileNotFoundError": FileNotFoundError,
}


class WorkerError(RuntimeError):
    """An unexpected error in a worker process; the message includes its traceback."""


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
    """Distribute tasks to new processes, one per setup.

    Args:
        work: a module-level generator function; called in each process with its setup and an
            iterator of tasks, yields one result per task and returns a final value.
        setups: one picklable setup per process.
        tasks: small picklable values, sent in order to the next free process.
        on_result: called in this process with every result, in the order of completion.
        describe: returns the name of a task for error messages.
        ahead: tasks sent to a process before its first result, besides one; at least as many as
            `work` consumes before it yields.
        timeout: seconds without a result from any process before the run is aborted; None for no
            limit.

    Returns:
        The final value of every process, in the order of `setups`.

    Raises:
        ValueError, FileNotFoundError: raised by a worker, with its traceback as the cause.
        ChildProcessError: a worker died.
        TimeoutError: no result for `timeout` seconds.
        WorkerError: a worker raised any other error.
    """
    context = multiprocessing.get_context("spawn")
    pending = deque(tasks)
    workers: list[_Worker] = []
    try:
        for index, setup in enumerate(setups):
            workers.append(_Worker(context, work, setup, index))
        # Round robin, so that a few tasks are spread over all workers.
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
        self.tasks: deque[Any] = deque()  # sent, without a result yet
        self.final: Any = None
        self.end_sent = False
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, setup, theirs), daemon=True)
        self.process.start()
        # Only the worker keeps its end open, so that its death closes the pipe.
        theirs.close()

    def give(self, pending: deque[Any]) -> None:
        """Send the next task, or None once if there are no more."""
        # A dead worker is detected by its sentinel, not here.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if pending:
                self.tasks.append(pending.popleft())
                self.pipe.send(self.tasks[-1])
            elif not self.end_sent:
                self.end_sent = True
                self.pipe.send(None)

    def receive(self) -> tuple[str, Any] | None:
        """The next message; None if the process died."""
        try:
            if self.pipe.poll():
                message: tuple[str, Any] = pickle.loads(self.pipe.recv_bytes())
                return message
        except (EOFError, ConnectionResetError):
            return None
        return None


def _end(workers: list[_Worker]) -> None:
    """End the processes within seconds."""
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
                f"no answer from any worker for {timeout:g} s; their images: {', '.join(held)}: "
                "check these files, or raise VAL.timeout if an image may take that long"
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
    how = exit_cause(worker.process.exitcode)
    if "SIGKILL" in how:
        how += " (usually out of memory)"
    at = "after its last task"
    if worker.tasks:
        at = f"while working on {', '.join(describe(task) for task in worker.tasks)}"
    return ChildProcessError(
        f"worker {worker.index} (process {worker.process.pid}) died with {how} {at}; see its "
        'output above. A script that starts workers needs `if __name__ == "__main__":`'
    )


def _drain(results: Generator[Any, None, Any], on_result: Callable[[Any], None]) -> Any:
    # Closed also if `on_result` raises, so that its threads end now.
    with contextlib.closing(results):
        while True:
            try:
                result = next(results)
            except StopIteration as end:
                return end.value
            on_result(result)


def _serve(work: Work, setup: Any, pipe: Connection) -> None:
    """Main function of a worker process."""
    # Control-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def send(kind: str, value: Any) -> None:
        # Pickled here: multiprocessing would send tensors as handles of shared memory, which
        # become invalid if this process ends before they are opened.
        pipe.send_bytes(pickle.dumps((kind, value)))

    try:
        final = _drain(work(setup, _tasks(pipe)), lambda result: send("result", result))
        send("final", final)
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent may be gone
            send("error", (type(error).__name__, str(error), traceback.format_exc()))
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    """End this process if its parent is killed."""
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
