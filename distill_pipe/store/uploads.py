"""How many uploads a process has in flight: as many as the store takes without throttling.

Additive increase, multiplicative decrease, as TCP does it: every upload that goes through allows one more, every
refusal halves. One gate for the process, which talks to one store. The trade-off: processes do not know of each other,
and each finds its own share by being refused.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MOST: Final = 16


class UploadGate:
    """Lets at most `limit` uploads through at a time; `limit` lies between 1 and `MOST`."""

    def __init__(self) -> None:
        self.limit = 4
        self._busy = 0
        self._changed = threading.Condition()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """A place among the uploads in flight; waits for one. Leaving without an error counts as a success."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy < self.limit)
            self._busy += 1
        try:
            yield
            with self._changed:
                self.limit = min(self.limit + 1, MOST)
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def throttled(self) -> None:
        """The store asked for less."""
        with self._changed:
            self.limit = max(self.limit // 2, 1)


UPLOADS: Final = UploadGate()
