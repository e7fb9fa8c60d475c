"""Work done ahead of its consumer, in threads, in order.

Threads fit here because what costs time, reading, unpacking and decoding, happens outside of Python's lock. Jobs are
taken from one iterator, one at a time, and run side by side; results come out in the order of the jobs. At most `depth`
results exist at once. The trade-off: a slow job holds up the results behind it.

A failure, of a job or of the iterator, is raised where its result would have come out, and ends everything. Threads end
when the consumer stops, and are waited for.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

Result = TypeVar("Result")


def prefetched(jobs: Iterator[Callable[[], Result]], threads: int, depth: int) -> Iterator[Result]:
    """The results of all jobs, in order. Without threads, each job runs when its result is asked for.

    Closing the iterator ends the threads; each finishes the job it has begun.
    """
    if threads == 0:
        for job in jobs:
            yield job()
        return
    ahead = _Ahead(jobs, threads, depth)
    try:
        while (future := ahead.results.get()) is not None:
            yield future.result()
            # Not one of the results that exist any more.
            del future
            ahead.room.release()
    finally:
        ahead.close()


class _Ahead(Generic[Result]):
    """The threads. `results` has a future for each job that was taken, in order, and None after the last."""

    def __init__(self, jobs: Iterator[Callable[[], Result]], threads: int, depth: int) -> None:
        self._jobs = jobs
        self._taking = threading.Lock()
        self._closed = False
        self.room = threading.Semaphore(depth)
        self.results: SimpleQueue[Future[Result] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"prefetch-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closed = True
        for _ in self._threads:
            self.room.release()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            self.room.acquire()
            taken = self._take()
            if taken is None:
                return
            job, future = taken
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - the consumer raises it
                self._closed = True
                future.set_exception(error)

    def _take(self) -> tuple[Callable[[], Result], "Future[Result]"] | None:
        """The next job, with the future of its result; None when there is none."""
        future: Future[Result] = Future()
        with self._taking:
            if self._closed:
                return None
            try:
                job = next(self._jobs)
            except StopIteration:
                self._end(None)
                return None
            except BaseException as error:  # noqa: BLE001 - the consumer raises it
                future.set_exception(error)
                self._end(future)
                return None
            self.results.put(future)
        return job, future

    def _end(self, last: "Future[Result] | None") -> None:
        self._closed = True
        self.results.put(last)
        # Others may wait for room that nobody will make.
        for _ in self._threads:
            self.room.release()
