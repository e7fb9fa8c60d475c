"""Work for a thread of its own, in order, with a bound on the bytes that wait: a producer that is faster than the
thread is held back instead of filling memory.

An item counts from when it is put until the thread is done with it. One that is larger than the bound passes when
nothing else is held, so the most that is held is the bound or the largest item; an item that holds nothing never
waits. When work raises, the thread ends, whoever waits is woken, and every later call says so. The trade-off: one
producer and one thread, and what was still queued at a failure is dropped, for its owner to do again.
"""

import queue
import threading
import time
from collections.abc import Callable

from distill_pipe.errors import CaptureError


class Backlog:
    """A thread and the work it has yet to do. All public methods are called from the producer's thread."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._items: queue.SimpleQueue[tuple[Callable[[], None], int]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._held_bytes = 0
        self._error: BaseException | None = None
        self.waited_seconds = 0.0
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, work: Callable[[], None], nbytes: int = 0) -> None:
        """Queue work that keeps `nbytes` of memory alive; waits until they fit.

        Raises:
            CaptureError: the thread died.
        """
        with self._changed:
            if not self._fits(nbytes):
                started = time.monotonic()
                self._changed.wait_for(lambda: self._fits(nbytes))
                self.waited_seconds += time.monotonic() - started
            self.check()
            self._held_bytes += nbytes
            self._items.put((work, nbytes))

    def check(self) -> None:
        """Raise CaptureError when the thread died."""
        if self._error is not None:
            raise CaptureError(f"the capture thread died: {self._error!r}") from self._error

    def _fits(self, nbytes: int) -> bool:
        """Whether a producer with `nbytes` need not wait; once the thread is dead it need not, either."""
        room = self._limit_bytes - self._held_bytes
        return self._error is not None or nbytes == 0 or self._held_bytes == 0 or nbytes <= room

    def _work(self) -> None:
        while self._error is None:
            work, nbytes = self._items.get()
            failure = None
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - handed to the producer's thread by check
                failure = error
            # Otherwise this frame would keep the item's memory alive until the next one comes.
            del work
            with self._changed:
                self._held_bytes -= nbytes
                self._error = failure
                self._changed.notify_all()
