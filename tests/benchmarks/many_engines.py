"""`python many_engines.py ENGINES SHARDS PER_SECOND`: the driver of a run with more engines than a machine can hold.

Schedule, driver, pool and Ray are those of a real run; the engines are coroutines in a few processes, and do nothing
but wait and say that a shard is committed, at `PER_SECOND` shards over all of them. Prints seconds, the driver's
milliseconds of processor time per shard (Ray's threads included), the cores that these are, and its memory in MiB.
"""

import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections import defaultdict, deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
from msgspec.structs import replace
from tiny_datasets import Shape, make_dataset

from distill_pipe.produce import cluster
from distill_pipe.produce.driver import POLL_SECONDS, POLLS_PER_SECOND, Driver
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.journal import Journal
from distill_pipe.produce.replica import Place
from distill_pipe.produce.schedule import Limits, Schedule, Work
from distill_pipe.produce.sink import ShardOutcome
from distill_pipe.produce.worker import Progress
from distill_pipe.store.manifest import Fragment, read_fragment
from distill_pipe.store.root import LocalRoot

PROCESSES, IN_FLIGHT = 4, 4


class Host:
    """Many engines in one process. Each ends a shard after a random time of up to twice `mean_seconds`."""

    def __init__(self, fragment: bytes, mean_seconds: float) -> None:
        self._fragment = msgspec.json.decode(fragment, type=Fragment)
        self._mean = mean_seconds
        self._held: defaultdict[int, deque[int]] = defaultdict(deque)
        self._left: dict[int, float] = {}

    async def placed(self, engine: int) -> Place:
        return Place("elsewhere", engine)

    async def start(self, engine: int) -> None:
        """Nothing is to be started."""

    async def advance(self, engine: int, work: list[Work], seconds: float) -> Progress:
        self._held[engine].extend(part.shard for part in work)
        left = self._left.pop(engine, None) or random.uniform(0, 2 * self._mean)
        await asyncio.sleep(min(left, seconds))
        if left > seconds or not self._held[engine]:
            self._left[engine] = max(left - seconds, 0.0)
            return Progress(0, 0, [], 1, [])
        shard = self._held[engine].popleft()
        fragment = replace(self._fragment, info=replace(self._fragment.info, shard=shard))
        return Progress(1, 2, [ShardOutcome(shard, fragment)], 1, [shard])


def main(engines: int, shards: int, per_second: float) -> None:
    import ray

    with tempfile.TemporaryDirectory() as folder:
        run, root = make_dataset(folder, 1, Shape(prompts_per_shard=1)), LocalRoot(folder)
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        ray.init("local", num_cpus=PROCESSES, include_dashboard=False, log_to_driver=False,
                 logging_level="ERROR", object_store_memory=100 << 20)
        fragment = msgspec.json.encode(read_fragment(root, 0))
        hosts = [ray.remote(num_cpus=1)(Host).options(max_concurrency=engines).remote(fragment, engines / per_second)
                 for _ in range(PROCESSES)]
        numbers = itertools.count()

        def started(*_: object) -> Any:
            number = next(numbers)
            host = hosts[number % PROCESSES]
            calls = {name: SimpleNamespace(remote=partial(getattr(host, name).remote, number))
                     for name in ("placed", "start", "advance")}
            return cluster._Slot(SimpleNamespace(**calls))

        cluster._start_replica = started
        plan = cluster.ClusterPlan("", None, engines, None, EngineOptions(), Limits())
        schedule = Schedule(range(shards), engines, 1, shards, IN_FLIGHT)
        driver = Driver(cluster.RayPool(ray, plan, run, root), schedule, lambda _: None, Journal(), cluster._meters(),
                        max(POLL_SECONDS, engines / POLLS_PER_SECOND))
        before, cpu = time.monotonic(), time.process_time()
        driver.run(shards, lambda: False)
        seconds, cpu = time.monotonic() - before, time.process_time() - cpu
        memory = psutil.Process().memory_info().rss / 2**20
        print(f"{seconds:.0f} | {cpu / shards * 1000:.2f} | {cpu / seconds:.2f} | {memory:.0f} |")
        ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
