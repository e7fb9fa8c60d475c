"""Random traces as an engine delivers them, and a process for tests that feeds a slow disk as fast as the sink lets it.

    python feeder.py ROOT SHARDS

Prints what was stored, how long it took, and how much memory it took at most. See `test_sink.py`.

Shapes: T tokens, V vocabulary, R supervised rows, H hidden size.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tiny_datasets import Shape, start_run, trace_from_logits

from distill_pipe.produce.captured import CapturedStep, Part
from distill_pipe.produce.engine import FinishedTrace, ShardOutcome
from distill_pipe.produce.sink import ShardSink
from distill_pipe.produce.step import NO_TOKEN
from distill_pipe.store.plan import shard_range
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.trace import Trace

SHAPE = Shape()
SECONDS = 60
DISK_BYTES_PER_SECOND = 1_000_000


def step_of(parts: Sequence[tuple[Trace, int, int]], shape: Shape = SHAPE) -> CapturedStep:
    """Positions [first, stop) of each trace as an engine's step delivers them on a CPU."""
    found, heads, states = [], [], []
    for trace, first, stop in parts:
        inside_R = (trace.positions_R >= first) & (trace.positions_R < stop)
        by_row = [trace.topk_ids_N.reshape(-1, shape.top_k), trace.topk_logprobs_N.reshape(-1, shape.top_k),
                  trace.logsumexp_R, trace.tail_mass_R, trace.tail_ids_N.reshape(-1, shape.tail_samples),
                  trace.tail_logprobs_N.reshape(-1, shape.tail_samples), trace.next_logprob_R,
                  np.full(trace.num_rows, NO_TOKEN)]
        found.append(Part(trace.ordinal, first, stop, trace.positions_R[inside_R]))
        heads.append([part[inside_R] for part in by_row])
        states.append(np.stack([trace.hidden[n][first:stop] for n in shape.layers]))
    head = [np.concatenate(fields) for fields in zip(*heads, strict=True)]
    return CapturedStep(found, head, [np.concatenate(states, axis=1)])


def whole_step(trace: Trace, shape: Shape = SHAPE) -> CapturedStep:
    return step_of([(trace, 0, trace.num_tokens - 1)], shape)


def finished(trace: Trace) -> FinishedTrace:
    return FinishedTrace(trace.ordinal, trace.prompt_id, trace.domain, trace.finish_reason, trace.token_ids_T.tolist(),
                         trace.loss_mask_T.tolist())


def until(happened: Callable[[], object]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def decided(sink: ShardSink, count: int) -> list[ShardOutcome]:
    """The next `count` outcomes."""
    found: list[ShardOutcome] = []
    until(lambda: len(found) >= count or found.extend(sink.outcomes()))
    assert len(found) == count
    return found


class SlowRoot(LocalRoot):
    """A disk that takes 1 MB/s."""

    def publish(self, source: Path, name: str) -> None:
        time.sleep(source.stat().st_size / DISK_BYTES_PER_SECOND)
        super().publish(source, name)

    def create(self, source: Path, name: str) -> bool:
        time.sleep(source.stat().st_size / DISK_BYTES_PER_SECOND)
        return super().create(source, name)


# 33 MB of rows per shard, of which 0.6 MB are left on disk, so that many shards pass in little time.
SLOW_SHAPE = Shape(hidden_size=1024, num_layers=2, layers=(1, 2), hidden_codec="f32")
SLOW_TOKENS, SLOW_PERIOD, SLOW_BACKLOG_BYTES = 1000, 16, 16 << 20
SLOW_SHARD_BYTES = SLOW_SHAPE.prompts_per_shard * (SLOW_TOKENS - 1) * 2 * SLOW_SHAPE.hidden_size * 4


def slow_trace(ordinal: int) -> Trace:
    random = np.random.default_rng(ordinal)
    logits_TV = random.normal(0, 2, (SLOW_TOKENS, SLOW_SHAPE.vocab_size)).astype(np.float32)
    mask_T = np.arange(SLOW_TOKENS) > SLOW_TOKENS - 50
    shape = (SLOW_PERIOD, SLOW_SHAPE.hidden_size)
    hidden = {n: np.resize(random.normal(0, 1, shape).astype(np.float32), (SLOW_TOKENS - 1, shape[1])) for n in (1, 2)}
    return trace_from_logits(ordinal, random.integers(0, 64, SLOW_TOKENS, np.int32), mask_T, logits_TV, hidden,
                             SLOW_SHAPE)


def memory(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` of this process. Unlike getrusage's, its peak does not start with the parent's."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) << 10


def feed_a_slow_disk(out: Path, shards: int) -> dict[str, float]:
    """Produce shards as fast as the sink takes them, with nobody looking at outcomes meanwhile."""
    run = start_run(out, shards * SLOW_SHAPE.prompts_per_shard, SLOW_SHAPE)
    sink = ShardSink(SlowRoot(out), run, SLOW_BACKLOG_BYTES)
    slow_trace(0)
    before, started = memory("VmRSS"), time.monotonic()
    for shard in range(shards):
        for ordinal in range(*shard_range(run, shard)):
            trace = slow_trace(ordinal)
            sink.add(whole_step(trace, SLOW_SHAPE))
            sink.finish(shard, [finished(trace)])
        sink.commit(shard, [])
    produced = time.monotonic() - started
    assert [o.error for o in decided(sink, shards)] == [""] * shards
    stored = sum(p.stat().st_size for p in out.rglob("shard-*"))
    return {"stored": stored, "produced_seconds": produced, "seconds": time.monotonic() - started,
            "waited_seconds": sink.times().engine_waited_seconds, "peak": memory("VmHWM"), "before": before}


if __name__ == "__main__":
    print(json.dumps(feed_a_slow_disk(Path(sys.argv[1]), int(sys.argv[2]))))
