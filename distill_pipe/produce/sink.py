"""The background thread between capture and store: step rows in, committed shards out.

It lives in the engine's worker process, so bulk data never crosses a process. However slow the disk is, memory stays
bounded: rows that wait are bounded in bytes, and beyond that the engine waits in `add`. Encoded traces are those of
shards that are open, which the driver bounds, since it opens another only when one is decided. The sink could not: to
hold the engine back for them would keep their shard from ever becoming whole. Only `add` waits, and only for this
thread, which waits for nobody but the disk and the device: nothing can lock up.

An error of a shard (no room, rows missing) is that shard's outcome. Nothing of it appears under `data/`, its memory is
let go, and other shards go on; whether the run does is the driver's decision. Any other error ends the thread and is
raised by every later call. The trade-off of one thread: a commit that takes longer than the engine needs to fill the
backlog holds the engine up; `times` tells by how much.

torch, numpy, Parquet and zstd release the GIL for nearly all of the work done here.
"""

import queue
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import msgspec
import torch

from distill_pipe.errors import DistillPipeError, NotFiniteError
from distill_pipe.produce.assembly import Assembler
from distill_pipe.produce.backlog import Backlog
from distill_pipe.produce.captured import CapturedStep, by_prompt, coded_step
from distill_pipe.produce.engine import FinishedTrace, ShardOutcome
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import Root
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.sidecar import EncodedTrace

# Four prefill steps of 4096 tokens of an 8B target (four layers of 4096 bfloat16): copies of the next steps overlap
# with the assembly of this one, and a short commit does not stop the engine.
BACKLOG_BYTES = 512 << 20


class SinkTimes(msgspec.Struct, frozen=True, array_like=True):
    """Where the time went so far: seconds of CPU that the thread spent on each kind of work (`encode`: rows that came
    raw from a CPU's step; `commit`: without the threads of Arrow's own, which read back what was written), and seconds
    that the engine's thread stood still in `add`."""

    assemble_cpu_seconds: float
    encode_cpu_seconds: float
    commit_cpu_seconds: float
    engine_waited_seconds: float


@dataclass(slots=True)
class _OpenShard:
    """A shard in the making: what is ready to be written, or why nothing of it will be."""

    traces: list[EncodedTrace] = field(default_factory=list)
    given_up: list[QuarantinedPrompt] = field(default_factory=list)
    failure: ShardOutcome | None = None


class ShardSink:
    """Encodes, assembles and commits on a thread of its own. All public methods are called from the engine's thread and
    raise CaptureError once that thread has died; only `add` can take long."""

    def __init__(self, root: Root, run: Run, backlog_bytes: int = BACKLOG_BYTES) -> None:
        self._root, self._run = root, run
        self._assembler = Assembler(run.spec.capture)
        self._open: dict[int, _OpenShard] = defaultdict(_OpenShard)
        self._outcomes: queue.SimpleQueue[ShardOutcome] = queue.SimpleQueue()
        self._cpu_seconds: defaultdict[str, float] = defaultdict(float)
        self._backlog = Backlog("distill-pipe-sink", backlog_bytes)
        # Counts for that thread and those that start later; the engine's own keep theirs. A second OpenMP team beside
        # the engine's would make both several times slower.
        self._backlog.put(partial(torch.set_num_threads, 1))

    def add(self, step: CapturedStep) -> None:
        """Queue what a step delivered; waits while too much is queued.

        Its arrays are only borrowed until the thread has copied them. Where they are still being copied from a device,
        `ready` waits for that; it is called on the thread, before they are looked at.
        """
        self._backlog.put(partial(self._add, step), step.nbytes)

    def finish(self, shard: int, traces: Sequence[FinishedTrace]) -> None:
        """Queue finished prompts of a shard for assembly."""
        for done in traces:
            self._backlog.put(partial(self._finish, shard, done))

    def commit(self, shard: int, quarantined: Sequence[QuarantinedPrompt]) -> None:
        """Queue the commit of a shard whose prompts are all finished or given up on."""
        self._backlog.put(partial(self._commit, shard, quarantined))

    def outcomes(self) -> list[ShardOutcome]:
        """Shards decided since the last call, in the order of their commits."""
        self._backlog.check()
        found = []
        while not self._outcomes.empty():
            found.append(self._outcomes.get())
        return found

    def times(self) -> SinkTimes:
        """Where the time went since the sink was made."""
        busy = self._cpu_seconds
        return SinkTimes(busy["assemble"], busy["encode"], busy["commit"], self._backlog.waited_seconds)

    def _add(self, step: CapturedStep) -> None:
        if step.ready is not None:
            step.ready()
        with self._busy("encode"):
            step = coded_step(step, self._run.spec.capture.hidden_codec)
        with self._busy("assemble"):
            for ordinal, rows in by_prompt(step):
                self._assembler.add(ordinal, rows)

    def _finish(self, shard: int, done: FinishedTrace) -> None:
        held = self._open[shard]
        if held.failure is not None:
            return self._assembler.drop(done.ordinal)
        try:
            with self._busy("assemble"):
                held.traces.append(self._assembler.finish(done))
        except NotFiniteError as error:
            held.given_up.append(QuarantinedPrompt(done.ordinal, done.prompt_id, "not_finite", str(error)))
        except DistillPipeError as error:
            held.failure = _failure(shard, error)
            held.traces.clear()

    def _commit(self, shard: int, quarantined: Sequence[QuarantinedPrompt]) -> None:
        held = self._open.pop(shard, _OpenShard())
        for prompt in quarantined:
            self._assembler.drop(prompt.ordinal)
        self._outcomes.put(held.failure or self._written(shard, held.traces, [*quarantined, *held.given_up]))

    def _written(self, shard: int, traces: Sequence[EncodedTrace],
                 quarantined: Sequence[QuarantinedPrompt]) -> ShardOutcome:
        started = time.monotonic()
        try:
            with self._busy("commit"):
                fragment = commit_shard(self._root, self._run, shard, traces, quarantined)
            return ShardOutcome(shard, fragment, seconds=time.monotonic() - started)
        except (DistillPipeError, OSError) as error:
            return _failure(shard, error)

    @contextmanager
    def _busy(self, what: Literal["assemble", "encode", "commit"]) -> Iterator[None]:
        started = time.thread_time()
        try:
            yield
        finally:
            self._cpu_seconds[what] += time.thread_time() - started


def _failure(shard: int, error: Exception) -> ShardOutcome:
    return ShardOutcome(shard, None, type(error).__name__, str(error))
