"""SIGINT and SIGTERM: a run is asked to end, and only the second signal interrupts it.

Commands that are not a run are interrupted at once. A handler that raises would do so inside Ray, which turns whatever
it is into KeyboardInterrupt, or aborts; so during a run it only notes the signal, and the run looks at it every second.
A process that was started with SIGINT ignored (in the background of a script) keeps ignoring it.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """What the signals have asked for so far."""

    def __init__(self) -> None:
        self.terminated = False
        self._asked = self._patient = False

    def install(self) -> None:
        """Take over the signals of this process."""
        signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._note)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """The first signal in here is only noted."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that this signal ended."""
        return 128 + (signal.SIGTERM if self.terminated else signal.SIGINT)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        again, self._asked = self._asked, True
        self.terminated = self.terminated or number == signal.SIGTERM
        if again or not self._patient:
            raise KeyboardInterrupt
