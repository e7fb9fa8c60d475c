"""The loop between schedule and engines: commands of the one go to the other, what engines report goes back, and
whoever watches the run is told. Knows engines as a `Pool` and nothing of Ray.

One thread, which never waits for a single engine: every call runs until its engine has something to say, or for a
second. All state is in the store, so this loop may die at any moment. The trade-off of polling: with very many engines
they are asked less often than every second, or the loop would do nothing else.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from distill_pipe.errors import (
    CaptureError,
    ClusterError,
    DamageError,
    DistillPipeError,
    EngineError,
    MismatchError,
    StorageFullError,
    StoreAccessError,
    StoreError,
)
from distill_pipe.produce.engine import ShardOutcome
from distill_pipe.produce.journal import Journal, Meters
from distill_pipe.produce.replica import Place
from distill_pipe.produce.schedule import Command, Failure, Feed, Kill, Quarantine, Schedule, Start, Stop, Work
from distill_pipe.produce.worker import Progress

POLL_SECONDS = 1.0
POLLS_PER_SECOND = 100
# Machines that an autoscaler orders take minutes.
PLACEMENT_SECONDS = 600.0
# A commit of hidden states to an object store takes seconds; a preempted machine has 30 s or more.
GRACE_SECONDS = 20.0
LEAVING_SECONDS = 5.0
_SHARD_ERRORS = {e.__name__: e for e in (CaptureError, DamageError, MismatchError, StorageFullError,
                                             StoreAccessError, StoreError)}


@dataclass(frozen=True, slots=True)
class Ready:
    """An engine can take work."""


Report = Place | Ready | Progress | Failure


class Pool(Protocol):
    """Engines in processes of their own. `advance` and `drain` are for engines that are ready and have no call."""

    def start(self, engine: int) -> None:
        """Find a place for an engine and start it; it reports a Place, then Ready."""

    def advance(self, engine: int, work: list[Work], seconds: float) -> None:
        """Give it work and let it run on; it reports Progress."""

    def drain(self, engine: int, seconds: float) -> None:
        """Let it end commits that are under way, once it is done with the call it is in; it reports Progress."""

    def kill(self, engine: int) -> None:
        """End an engine's process for good; nothing more is heard of it."""

    def idle(self) -> list[int]:
        """Engines that are ready and have no call."""

    def wait(self, seconds: float) -> list[tuple[int, Report]]:
        """What engines report, or nothing after that time.

        Raises:
            DistillPipeError: an engine reports what no other engine would do better.
        """

    def leaving(self) -> Iterable[int]:
        """Engines on machines that are about to go."""

    def shortage(self, seconds: float) -> str:
        """Why no engine found a place for so long."""


class Driver:
    """Runs a schedule on a pool. `stopping` says whether somebody wants the run to end."""

    def __init__(self, pool: Pool, schedule: Schedule, on_progress: Callable[[Progress], None], journal: Journal,
                 meters: Meters, poll_seconds: float = POLL_SECONDS) -> None:
        self._pool, self._schedule, self._on_progress = pool, schedule, on_progress
        self._journal, self._meters, self._poll_seconds = journal, meters, poll_seconds
        self._fresh: defaultdict[int, list[Work]] = defaultdict(list)
        self._held: defaultdict[int, set[int]] = defaultdict(set)
        self._starting: dict[int, float] = {}
        self._homeless_since = self._looked = time.monotonic()

    def run(self, shards_left: int, stopping: Callable[[], bool]) -> None:
        """Until every shard is decided.

        Raises:
            KeyboardInterrupt: somebody wanted it to stop; commits under way were given GRACE_SECONDS.
            EngineError: no engine has a place, or engines keep dying.
            DistillPipeError: a shard could not be captured or committed.
        """
        self._shards_left = shards_left
        self._obey(self._schedule.start())
        while not self._schedule.finished:
            if stopping():
                self._drain()
                raise KeyboardInterrupt
            for engine in self._pool.idle():
                self._pool.advance(engine, self._fresh.pop(engine, []), self._poll_seconds)
            for engine, report in self._pool.wait(self._poll_seconds):
                self._take(engine, report)
            self._look_around(time.monotonic())

    def _look_around(self, now: float) -> None:
        self._meters.show("shards_left", self._shards_left)
        self._meters.show("engines", self._schedule.engines)
        self._obey(self._schedule.tick(now))
        if not self._schedule.unplaced:
            self._homeless_since = now
        elif now - self._homeless_since > PLACEMENT_SECONDS:
            raise ClusterError(self._pool.shortage(PLACEMENT_SECONDS))
        if now - self._looked > LEAVING_SECONDS:
            self._looked = now
            for engine in self._pool.leaving():
                self._obey(self._schedule.leaving(engine))

    def _take(self, engine: int, report: Report) -> None:
        now = time.monotonic()
        if isinstance(report, Place):
            self._starting[engine] = now
            self._journal.write("engine_started", engine=engine, node=report.node, process=report.pid)
            self._obey(self._schedule.placed(engine, now))
        elif isinstance(report, Ready):
            self._obey(self._schedule.ready(engine, now))
        elif isinstance(report, Failure):
            self._lose(engine, report)
        else:
            self._count(engine, report)
            decided = {outcome.shard for outcome in report.outcomes}
            self._obey(self._schedule.progressed(
                engine, now, alive=report.steps > 0, finished=report.prompts, passed=set(report.passed),
                decided=decided))

    def _count(self, engine: int, progress: Progress) -> None:
        """Tell of progress. A shard that failed ends the run."""
        self._meters.add("prompts", progress.prompts)
        self._meters.add("tokens", progress.tokens)
        for outcome in progress.outcomes:
            self._held[engine].discard(outcome.shard)
            self._decide(outcome)
        self._on_progress(progress)

    def _decide(self, outcome: ShardOutcome) -> None:
        self._meters.add("commit_seconds", outcome.seconds)
        if outcome.fragment is None:
            kind = _SHARD_ERRORS.get(outcome.error, DistillPipeError)
            error = kind(f"shard {outcome.shard}: {outcome.message}")
            self._fail(outcome.shard, error.failure, outcome.message)
            raise error
        info = outcome.fragment.info
        self._shards_left -= 1
        self._meters.add("shards", 1)
        self._meters.add("quarantined", info.quarantined)
        self._journal.write("shard_committed", shard=info.shard, traces=info.traces, tokens=info.tokens, rows=info.rows,
                            quarantined=info.quarantined, bytes=outcome.fragment.file.size, seconds=outcome.seconds)

    def _fail(self, shard: int, kind: str, reason: str) -> None:
        self._meters.add("failures", 1, **{"class": kind})
        self._journal.write("shard_failed", shard=shard, **{"class": kind, "reason": reason})

    def _lose(self, engine: int, failure: Failure) -> None:
        self._fresh.pop(engine, None)
        given_back = len(self._held.pop(engine, ()))
        self._meters.add("failures", 1, **{"class": failure.kind})
        self._meters.add("retries", given_back)
        self._journal.write("engine_lost", engine=engine, shards=given_back,
                            **{"class": failure.kind, "reason": failure.reason})
        self._obey(self._schedule.died(engine, failure))

    def _obey(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Start):
                self._pool.start(command.engine)
            elif isinstance(command, Feed):
                self._fresh[command.engine].append(command.work)
                self._held[command.engine].add(command.work.shard)
            elif isinstance(command, Kill):
                self._pool.kill(command.engine)
                self._lose(command.engine, command.failure)
            elif isinstance(command, Quarantine):
                self._fail(command.shard, "data", f"prompt {command.ordinal}: {command.reason}")
            else:
                assert isinstance(command, Stop)  # noqa: S101 - for the type checker
                kind = ClusterError if command.failure.kind == "infra" else EngineError
                raise kind(command.failure.reason)

    def _drain(self) -> None:
        """Let commits under way end; what is not committed is done again by the next run."""
        self._schedule.stop()
        deadline = time.monotonic() + GRACE_SECONDS
        waiting = {engine for engine, held in self._held.items() if held}
        asked = set[int]()
        while waiting and (left := deadline - time.monotonic()) > 0:
            for engine in set(self._pool.idle()) & waiting - asked:
                self._pool.drain(engine, left)
                asked.add(engine)
            for engine, report in self._pool.wait(min(left, POLL_SECONDS)):
                if isinstance(report, Progress):
                    self._count(engine, report)
                if isinstance(report, Failure) or engine in asked:
                    waiting.discard(engine)
