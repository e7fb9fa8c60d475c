"""The shards that are open, shared by the threads of one reader.

Memory holds the coded states of as many shards as the capacity says, and of those that a thread is still using. The
trade-off: a shard that is asked for after it was let go is opened anew.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from distill_pipe.consume.opened import OpenedShard


class OpenShards:
    """The shards that were used last, each opened once even where several threads want it."""

    def __init__(self, open_shard: Callable[[int], OpenedShard], capacity: int) -> None:
        self._open, self._capacity = open_shard, capacity
        self._lock = threading.Lock()
        self._held: OrderedDict[int, Future[OpenedShard]] = OrderedDict()

    def get(self, shard: int) -> OpenedShard:
        """The shard, opened now if it is not held. Raises as `ShardFiles.open`; what failed is not held."""
        with self._lock:
            held = self._held.get(shard)
            future = held if held is not None else self._held.setdefault(shard, Future())
            self._held.move_to_end(shard)
            while len(self._held) > self._capacity:
                self._held.popitem(last=False)
        if held is None:
            try:
                future.set_result(self._open(shard))
            except BaseException as error:  # noqa: BLE001 - raised below, to everybody who waits
                with self._lock:
                    # A store that failed once may answer the next time.
                    if self._held.get(shard) is future:
                        del self._held[shard]
                future.set_exception(error)
        return future.result()

    def __reduce__(self) -> tuple[type["OpenShards"], tuple[Callable[[int], OpenedShard], int]]:
        # What is open stays in this process.
        return OpenShards, (self._open, self._capacity)
