"""Handling of signals, stalls and lost ranks during a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from mit_semseg.engine.signals import StopRequest
from mit_semseg.engine.watchdog import Watchdog
from mit_semseg.errors import one_line

STALLED = "check these files, or raise TRAIN.stall_seconds"
# Least seconds for a step on GPUs of several ranks after a stop signal.
STOP_GRACE = 8.0


class Supervisor:
    """Within `watching`, SIGTERM and SIGINT request a stop, and a stall ends the process.

    For a single run.

    Args:
        seconds: `TRAIN.stall_seconds`.
        name: of this process, for messages.
        ranks: number of ranks.
        silent_failure: whether a collective may wait forever for a dead rank, as with NCCL; after a
            stop signal the watchdog then waits only a few times as long as a step.

    Attributes:
        step: number of the current step, for messages.
        slowest_step: in seconds; 0 before the first step.
    """

    def __init__(self, seconds: float, name: str, ranks: int, silent_failure: bool) -> None:
        self.seconds, self.name, self.ranks = seconds, name, ranks
        self.silent_failure = silent_failure
        self.step, self.slowest_step = 1, 0.0
        self._stop = StopRequest(repeated=ranks > 1, on_stop=self._shorten_limit)
        self._watchdog: Watchdog | None = None
        self._awaited = "the start"

    @contextmanager
    def watching(
        self, files: Callable[[], list[str]], before_exit: Callable[[], None]
    ) -> Iterator[None]:
        """Handle signals and detect stalls.

        Args:
            files: returns the files being read, for messages.
            before_exit: called before a stall ends the process, to end child processes.
        """
        watchdog = Watchdog(
            # Later than the time-out of the loader, whose message has more detail.
            self.seconds + 2,
            name=self.name,
            files=files,
            advice=f"{STALLED}; --resume auto resumes from the newest checkpoint",
            before_exit=before_exit,
        )
        self._watchdog = watchdog
        try:
            with self._stop, watchdog:
                yield
        finally:
            self._watchdog = None

    @property
    def stop_signal(self) -> str:
        """Name of the stop signal received; "" for none."""
        return self._stop.signal

    def note_remote_stop(self) -> None:
        """Stop, because another rank received a signal."""
        self._stop.signal = self._stop.signal or "a signal to another rank"

    @contextmanager
    def waiting(self, what: str, *, patient: bool = False, others: bool = False) -> Iterator[None]:
        """Describe what the run waits for, for the message of a stall.

        Args:
            what: the description.
            patient: allow ten times as long.
            others: whether other ranks are involved.

        Raises:
            ConnectionError: another rank was lost.
        """
        outer, self._awaited = self._awaited, what
        self.progress()
        try:
            with self._patience(patient), self._peers(others):
                yield
        finally:
            self._awaited = outer
            self.progress()

    def progress(self) -> None:
        """Restart the time limit."""
        if self._watchdog is not None:
            self._watchdog.progress(self._awaited)

    def _patience(self, wanted: bool) -> AbstractContextManager[None]:
        return self._watchdog.patient() if wanted and self._watchdog else nullcontext()

    def _peers(self, others: bool) -> AbstractContextManager[None]:
        return lost_peers(self.step) if others and self.ranks > 1 else nullcontext()

    def _shorten_limit(self) -> None:
        if self.silent_failure and self.slowest_step and self._watchdog is not None:
            self._watchdog.shorten_limit(max(STOP_GRACE, 3 * self.slowest_step))


@contextmanager
def lost_peers(step: int) -> Iterator[None]:
    """Convert errors of collectives, such as after the loss of a rank, to a ConnectionError.

    Args:
        step: of the run, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise ConnectionError(
            f"lost the connection to another rank in step {step}, or a collective failed "
            f"({one_line(error, 120)}); the cause is in the output of the rank or host that failed "
            "first; --resume auto resumes from the newest checkpoint"
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):  # torch.distributed's
        return True
    said = str(error)
    return any(word in said for word in ("gloo", "NCCL", "onnection closed", "onnection reset"))
