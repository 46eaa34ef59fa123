"""What may end a run from outside: signals, stalls, and other ranks that are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from mit_semseg.engine.signals import StopRequest
from mit_semseg.engine.watchdog import Watchdog
from mit_semseg.errors import one_line

# What to do when nothing moves.
STALLED = "look at these files, or raise TRAIN.stall_seconds"
# Seconds that a step may at least take on GPUs of several ranks after a request to stop.
STOP_GRACE = 8.0


class Supervisor:
    """While it is `watching`, SIGTERM and SIGINT ask the run to stop, and a stall ends the process.

    For one run only.

    Args:
        seconds: TRAIN.stall_seconds.
        name: of this process, in messages.
        ranks: how many processes train together.
        silent_loss: whether a rank may wait in vain for one that has died, as NCCL does: after a
            request to stop the watchdog then waits for a few steps' time only.

    Attributes:
        step: number of the step that is computed, for messages.
        slowest_step: in seconds; 0 while there was none.
    """

    def __init__(self, seconds: float, name: str, ranks: int, silent_loss: bool) -> None:
        self.seconds, self.name, self.ranks = seconds, name, ranks
        self.silent_loss = silent_loss
        self.step, self.slowest_step = 1, 0.0
        self._stop = StopRequest(repeated=ranks > 1, on_ask=self._shorten_limit)
        self._watchdog: Watchdog | None = None
        self._awaited = "the start"

    @contextmanager
    def watching(
        self, files: Callable[[], list[str]], at_the_end: Callable[[], None]
    ) -> Iterator[None]:
        """Mind signals and stalls.

        Args:
            files: what is being read, for messages.
            at_the_end: called before a stall ends the process, to take others along.
        """
        watchdog = Watchdog(
            # After the loader's own limit, whose message says more.
            self.seconds + 2,
            name=self.name,
            files=files,
            advice=f"{STALLED}; --resume auto resumes from the newest checkpoint",
            at_the_end=at_the_end,
        )
        self._watchdog = watchdog
        try:
            with self._stop, watchdog:
                yield
        finally:
            self._watchdog = None

    @property
    def asked(self) -> str:
        """Name of the signal that asks the run to stop, "" where none does."""
        return self._stop.asked

    def asked_elsewhere(self) -> None:
        """Another rank was asked to stop: so is this one."""
        self._stop.asked = self._stop.asked or "a signal to another rank"

    @contextmanager
    def waiting(self, what: str, *, patient: bool = False, others: bool = False) -> Iterator[None]:
        """Name what is waited for, should it take too long.

        Args:
            what: in words.
            patient: wait ten times as long.
            others: whether it takes all ranks.

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
        """Something was done: the time that may pass without progress begins again."""
        if self._watchdog is not None:
            self._watchdog.progress(self._awaited)

    def _patience(self, wanted: bool) -> AbstractContextManager[None]:
        return self._watchdog.patient() if wanted and self._watchdog else nullcontext()

    def _peers(self, minded: bool) -> AbstractContextManager[None]:
        return lost_peers(self.step) if minded and self.ranks > 1 else nullcontext()

    def _shorten_limit(self) -> None:
        if self.silent_loss and self.slowest_step and self._watchdog is not None:
            self._watchdog.shorten_limit(max(STOP_GRACE, 3 * self.slowest_step))


@contextmanager
def lost_peers(step: int) -> Iterator[None]:
    """Turns what collectives raise when a rank is gone into a ConnectionError of one line.

    Args:
        step: of the run, named in the error.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise ConnectionError(
            f"lost the connection to another rank in step {step}, or the collective "
            f"failed ({one_line(error, 120)}); the first cause is in the output "
            "of the rank or host that failed; --resume auto resumes from the newest checkpoint"
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):  # torch.distributed's
        return True
    said = str(error)
    return any(word in said for word in ("gloo", "NCCL", "onnection closed", "onnection reset"))
