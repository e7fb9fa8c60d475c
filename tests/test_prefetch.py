"""Catches work done ahead that comes out in another order, piles up, hides a failure or leaves threads behind."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from distill_pipe.consume.prefetch import prefetched


def numbers(stop: int, work: Callable[[int], int] = lambda i: i) -> Iterator[Callable[[], int]]:
    return ((lambda i=i: work(i)) for i in range(stop))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_jobs(threads: int) -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.01 if i < 3 else 0)
        return i
    assert list(prefetched(numbers(40, slow_at_first), threads, 4)) == list(range(40))
    assert list(prefetched(numbers(0), threads, 4)) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_results_exist_than_were_asked_for(threads: int) -> None:
    done = []
    results = prefetched(numbers(100, lambda i: done.append(i) or i), threads, 2)
    for used in range(10):
        assert next(results) == used
        time.sleep(0.005)
        assert len(done) <= used + 2
    results.close()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_failing_job_fails_where_its_result_would_have_come(threads: int) -> None:
    def fails_at_5(i: int) -> int:
        if i == 5:
            raise ValueError("job 5")
        return i
    seen = []
    with pytest.raises(ValueError, match="job 5"):
        seen.extend(prefetched(numbers(50, fails_at_5), threads, 4))
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_failing_source_of_jobs_fails_after_the_results_before_it(threads: int) -> None:
    def source() -> Iterator[Callable[[], int]]:
        yield from numbers(3)
        raise ValueError("no more")
    seen = []
    with pytest.raises(ValueError, match="no more"):
        seen.extend(prefetched(source(), threads, 2))
    assert seen == [0, 1, 2]


def test_threads_end_when_the_consumer_goes_away() -> None:
    for result in prefetched(numbers(1000), 3, 2):
        if result == 5:
            break
    results = prefetched(numbers(1000), 3, 2)
    next(results)
    del results
