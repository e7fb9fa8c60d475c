"""What runs in an engine's own process: the engine is placed, started and driven in calls that its driver can tell
apart, and it ends by itself when nobody calls any more. Knows nothing of Ray, which only carries the calls.

A driver that is gone for good (its machine lost, its network cut) must not leave a GPU in use. The trade-off: a driver
that was merely stopped for ORPHAN_SECONDS finds its engines gone, and starts new ones.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from distill_pipe.errors import EngineError
from distill_pipe.produce.engine import EngineOptions
from distill_pipe.produce.engines import start_engine, start_renderer
from distill_pipe.produce.schedule import Work
from distill_pipe.produce.worker import Progress, ShardWorker
from distill_pipe.store.disk import shut_out_strangers
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import open_root

ORPHAN_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an engine's process is told. `run` is run.json."""

    model: str
    revision: str | None
    options: EngineOptions
    run: bytes
    root: str
    cpu_threads: int
    orphan_seconds: float = ORPHAN_SECONDS


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine's process runs."""

    node: str
    pid: int


class Replica:
    """One engine and the shards given to it."""

    def __init__(self, plan: EnginePlan) -> None:
        shut_out_strangers()
        self._plan = plan
        self._worker: ShardWorker | None = None
        self._calls, self._called = 0, time.monotonic()
        threading.Thread(target=self._end_when_orphaned, name="distill-pipe-orphan", daemon=True).start()

    def place(self, node: str) -> Place:
        """Answers as soon as the process has a place."""
        return Place(node, os.getpid())

    def start(self) -> None:
        """Start the engine. Not done in __init__: an error there would reach the driver as a dead process, without its
        class."""
        with self._called_now():
            # Ray sets this to the CPUs that a process reserves; OpenMP reads it when torch is imported below.
            os.environ["OMP_NUM_THREADS"] = str(self._plan.cpu_threads)
            plan, run, root = self._plan, msgspec.json.decode(self._plan.run, type=Run), open_root(self._plan.root)
            renderer = start_renderer(run, plan.model, plan.revision)
            engine = start_engine(run, root, plan.model, plan.revision, plan.options)
            self._worker = ShardWorker(engine, renderer, root, run)

    def advance(self, work: Sequence[Work], seconds: float) -> Progress:
        """See `ShardWorker.advance`."""
        with self._called_now():
            return self._started().advance(work, seconds)

    def drain(self, seconds: float) -> Progress:
        """See `ShardWorker.drain`."""
        with self._called_now():
            return self._started().drain(seconds)

    def _started(self) -> ShardWorker:
        if self._worker is None:
            raise EngineError("the engine was not started")
        return self._worker

    @contextmanager
    def _called_now(self) -> Iterator[None]:
        self._calls += 1
        try:
            yield
        finally:
            self._calls, self._called = self._calls - 1, time.monotonic()

    def _end_when_orphaned(self) -> None:
        while self._calls or time.monotonic() - self._called < self._plan.orphan_seconds:
            time.sleep(min(1.0, self._plan.orphan_seconds / 4))
        os._exit(1)
