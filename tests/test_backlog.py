"""Catches a queue that grows without bound, a producer that waits for ever, and a thread that dies unnoticed."""

import threading
from collections.abc import Callable

import pytest
from feeder import SECONDS, until

from distill_pipe.errors import CaptureError
from distill_pipe.produce.backlog import Backlog


def blocked(call: Callable[[], None]) -> threading.Thread:
    """A thread that is making a call which does not come back by itself."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive(), "the call should have waited"
    return thread


def test_a_producer_waits_once_the_bound_is_reached_and_goes_on_when_work_is_done() -> None:
    backlog, gates, done = Backlog("test", 100), [threading.Event() for _ in range(3)], []
    for i in range(2):
        backlog.put(lambda i=i: done.append((i, gates[i].wait(SECONDS))), 50)
    waiting = blocked(lambda: backlog.put(lambda: done.append((2, gates[2].wait(SECONDS))), 50))
    gates[0].set()
    waiting.join(SECONDS)
    assert not waiting.is_alive()
    assert 0.1 < backlog.waited_seconds < SECONDS
    for gate in gates:
        gate.set()
    until(lambda: len(done) == 3)
    assert [i for i, _ in done] == [0, 1, 2]


def test_an_item_larger_than_the_bound_passes_alone() -> None:
    backlog, gate, done = Backlog("test", 100), threading.Event(), []
    backlog.put(lambda: gate.wait(SECONDS), 1000)
    waiting = blocked(lambda: backlog.put(lambda: done.append("large"), 1000))
    assert not done
    gate.set()
    waiting.join(SECONDS)
    until(lambda: done)


def test_what_holds_no_memory_never_waits() -> None:
    backlog, gate, done = Backlog("test", 100), threading.Event(), []
    backlog.put(lambda: gate.wait(SECONDS), 1000)
    for i in range(1000):
        backlog.put(lambda i=i: done.append(i))
    assert backlog.waited_seconds == 0
    gate.set()
    until(lambda: len(done) == 1000)
    assert done == list(range(1000))


def fail(error: BaseException) -> None:
    raise error


def test_a_producer_that_waits_is_woken_when_the_thread_dies() -> None:
    backlog, gate, caught = Backlog("test", 100), threading.Event(), []

    def put() -> None:
        with pytest.raises(CaptureError, match=r"the capture thread died: MemoryError\('no room'\)") as error:
            backlog.put(lambda: caught.append("ran"), 60)
        caught.append(error.value.__cause__)

    backlog.put(lambda: gate.wait(SECONDS) and fail(MemoryError("no room")), 60)
    waiting = blocked(put)
    gate.set()
    waiting.join(SECONDS)
    assert [type(c) for c in caught] == [MemoryError]
