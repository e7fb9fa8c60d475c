"""Doing many small reads at a time, and taking the answers in order: what an object store needs, where each read waits.

At most as many answers are held as there are readers. The trade-off: an error surfaces when its turn comes, not when it
happens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

READERS: Final = 16
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def ahead(call: Callable[[Item], Answer], items: Iterable[Item], readers: int = READERS) -> Iterator[Answer]:
    """`call(item)` for each item, in order, computed by threads that run at most `readers` items ahead."""
    pending: deque[Future[Answer]] = deque()
    with ThreadPoolExecutor(readers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(call, item))
                if len(pending) == readers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
