"""The background thread between capture and store: step rows in, committed shards out.

It lives in the engine's worker process, so bulk data never crosses a process. The queue is bounded: when the disk is
slower than the target, the engine waits instead of memory filling up. A failure of the thread fails the shard it was
working on, or, outside a shard, every later call; it is never only logged.

torch, numpy, Parquet and zstd release the GIL for nearly all of the work done here.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import torch

from distill_pipe.errors import CaptureError, DistillPipeError, NotFiniteError
from distill_pipe.produce.assembly import Assembler, FinishedTrace, StepRows
from distill_pipe.store.commit import commit_shard
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import Fragment, Run
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.sidecar import EncodedTrace

QUEUE_ITEMS = 256


class ShardOutcome(msgspec.Struct, frozen=True, array_like=True):
    """What became of a shard: its fragment, or the error (class name and message) that kept it from being committed."""

    shard: int
    fragment: Fragment | None
    error: str = ""
    message: str = ""


class ShardSink:
    """Assembles, encodes and commits on a thread of its own. All public methods are called from the engine's thread."""

    def __init__(self, root: LocalRoot, run: Run) -> None:
        self._root, self._run = root, run
        self._assembler = Assembler(run.spec.capture.layers)
        self._traces: dict[int, list[EncodedTrace]] = {}
        self._quarantined: dict[int, list[QuarantinedPrompt]] = {}
        self._failed: dict[int, DistillPipeError] = {}
        self._outcomes: queue.SimpleQueue[ShardOutcome] = queue.SimpleQueue()
        self._items: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=QUEUE_ITEMS)
        self._broken: BaseException | None = None
        threading.Thread(target=self._work, name="distill-pipe-sink", daemon=True).start()

    def add(self, step: Sequence[tuple[int, StepRows]]) -> None:
        """Queue what a step delivered, as (ordinal, rows) pairs."""
        self._put(lambda: self._add(step))

    def finish(self, shard: int, traces: Sequence[FinishedTrace]) -> None:
        """Queue finished prompts of a shard for assembly and encoding."""
        for done in traces:
            self._put(partial(self._finish, shard, done))

    def commit(self, shard: int, quarantined: Sequence[QuarantinedPrompt]) -> None:
        """Queue the commit of a shard whose prompts are all finished or given up on."""
        self._put(lambda: self._commit(shard, quarantined))

    def outcomes(self) -> list[ShardOutcome]:
        """Shards decided since the last call.

        Raises:
            CaptureError: the thread died outside a shard.
        """
        self._raise_broken()
        found = []
        while not self._outcomes.empty():
            found.append(self._outcomes.get())
        return found

    def _put(self, item: Callable[[], None]) -> None:
        while True:
            self._raise_broken()
            try:
                return self._items.put(item, timeout=1.0)
            except queue.Full:
                continue

    def _work(self) -> None:
        # Counts for this thread and those that start later; the engine's own keep theirs. A second OpenMP team beside
        # the engine's would make both several times slower.
        torch.set_num_threads(1)
        while self._broken is None:
            item = self._items.get()
            try:
                item()
            except BaseException as error:  # noqa: BLE001 - handed to the engine's thread by _raise_broken
                self._broken = error

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise CaptureError(f"the capture thread died: {self._broken!r}") from self._broken

    def _add(self, step: Sequence[tuple[int, StepRows]]) -> None:
        for ordinal, rows in step:
            self._assembler.add(ordinal, rows)

    def _finish(self, shard: int, done: FinishedTrace) -> None:
        try:
            trace = self._assembler.finish(done)
            self._traces.setdefault(shard, []).append(encode_trace(trace, self._run.spec.capture.hidden_codec))
        except NotFiniteError as error:
            self._quarantined.setdefault(shard, []).append(
                QuarantinedPrompt(done.ordinal, done.prompt_id, "not_finite", str(error)))
        except DistillPipeError as error:
            self._failed.setdefault(shard, error)

    def _commit(self, shard: int, quarantined: Sequence[QuarantinedPrompt]) -> None:
        traces, given_up = self._traces.pop(shard, []), self._quarantined.pop(shard, [])
        for prompt in quarantined:
            self._assembler.drop(prompt.ordinal)
        try:
            if shard in self._failed:
                raise self._failed.pop(shard)
            fragment = commit_shard(self._root, self._run, shard, traces, [*quarantined, *given_up])
        except (DistillPipeError, OSError) as error:
            self._outcomes.put(ShardOutcome(shard, None, type(error).__name__, str(error)))
        else:
            self._outcomes.put(ShardOutcome(shard, fragment))
