"""What capture costs on this machine with this target: the same requests through one engine, with capture and without.

Rounds alternate and medians are compared, because two runs of one engine differ by several percent on a shared machine.
The trade-off of one engine: a model that returns hidden states does so in the plain rounds too, which then are slower
by an addition per layer asked for than on an engine that was never told of them.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from distill_pipe.errors import CaptureError
from distill_pipe.produce.capture import CaptureTimes
from distill_pipe.produce.chat import Renderer, run_date
from distill_pipe.produce.engine import FinishedTrace
from distill_pipe.produce.generate import freeze, prepare
from distill_pipe.produce.job import Job
from distill_pipe.produce.schedule import Work
from distill_pipe.produce.vllm_engine import VllmEngine
from distill_pipe.produce.worker import ShardWorker
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import LocalRoot, Root
from distill_pipe.store.status import status as read_status

QUESTIONS = ("Explain how tides work, step by step.", "Write a short story about a lighthouse.",
             "Compare three ways to sort a list.", "What should one pack for a week in the mountains?",
             "Write a function that finds the longest word of a text.", "Describe a market on a Saturday morning.")


class Round(Struct, frozen=True, kw_only=True):
    """One pass of all requests, in seconds; `capture` is of the captured one, from its first request to its last
    commit."""

    plain: float
    capture: float


class Gauge(Struct, frozen=True, kw_only=True):
    """Rates are of the median round. `ratio` is captured time over plain time. `times` are sums over the captured
    rounds: what of them the engine's thread spent on capture, and what the sink's thread did beside it."""

    requests: int
    tokens: int
    rows: int
    bytes_per_row: float
    plain_tokens_per_second: float
    capture_tokens_per_second: float
    ratio: float
    rounds: tuple[Round, ...]
    captured_seconds: float
    times: CaptureTimes


class RecordingEngine(VllmEngine):
    """An engine that remembers what it finished, so that the same can be run again without capture."""

    finished: list[FinishedTrace]

    def open(self, run: Run, root: Root) -> None:
        super().open(run, root)
        self.finished = []

    def finish(self, shard: int, traces: Sequence[FinishedTrace]) -> None:
        self.finished += traces
        super().finish(shard, traces)


def questions_corpus(path: Path, count: int) -> Path:
    """A small corpus for when the user has none at hand."""
    records = ({"messages": [{"role": "user", "content": f"{QUESTIONS[i % len(QUESTIONS)]} ({i})"}]}
               for i in range(count))
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    return path


def gauge_capture(job: Job, rounds: int) -> Gauge:
    """Run a job's prompts in a temporary folder, in alternation with the same requests without capture.

    Raises:
        UsageError, EngineStartError: as a run of the job would.
    """
    with tempfile.TemporaryDirectory(prefix="distill-pipe-gauge-") as folder:
        small = replace(job, out=str(Path(folder, "warm-up")))
        target, spec = prepare(small)
        root = LocalRoot(small.out)
        run = freeze(root, spec, small)
        engine = RecordingEngine(target.model, target.revision, run, root, job.engine)
        renderer = Renderer(target.model, target.revision, run_date(run))
        capture_all(engine, renderer, run, root)
        measured = []
        times = []
        for i in range(rounds):
            round_job = replace(job, out=str(Path(folder, f"round-{i}")))
            root = LocalRoot(round_job.out)
            engine.open(freeze(root, spec, round_job), root)
            captured = capture_all(engine, renderer, run, root)
            times.append(engine.times())
            measured.append(Round(plain=run_plain(engine), capture=captured))
        status = read_status(root)
        return _summary(engine.finished, measured, times, status.bytes / max(status.rows, 1))


def capture_all(engine: VllmEngine, renderer: Renderer, run: Run, root: Root) -> float:
    """Seconds to run and commit every shard of a run."""
    worker = ShardWorker(engine, renderer, root, run)
    started = time.monotonic()
    left = set(range(run.spec.num_shards))
    progress = worker.advance(map(Work, sorted(left)), 0.5)
    while True:
        for outcome in progress.outcomes:
            if outcome.fragment is None:
                raise CaptureError(f"shard {outcome.shard}: {outcome.message}")
            left.discard(outcome.shard)
        if not left:
            return time.monotonic() - started
        progress = worker.advance([], 0.5)


def run_plain(engine: RecordingEngine, logprobs: int | None = None, prompt_logprobs: int | None = None) -> float:
    """Seconds to run what was captured last once more, without capture; with vLLM's own log-probabilities if asked."""
    started = time.monotonic()
    for done in engine.finished:
        first = done.loss_mask.index(True)
        if engine.writes_responses:
            engine.add_plain(done.ordinal, done.token_ids[:first], len(done.token_ids) - first, logprobs)
        else:
            engine.add_plain(done.ordinal, done.token_ids[:-1], 1, prompt_logprobs=prompt_logprobs)
    while engine.busy:
        engine.step()
    return time.monotonic() - started


def _summary(finished: Sequence[FinishedTrace], rounds: Sequence[Round], times: Sequence[CaptureTimes],
             bytes_per_row: float) -> Gauge:
    tokens = sum(len(done.token_ids) for done in finished)
    plain, captured = (statistics.median(getattr(r, name) for r in rounds) for name in ("plain", "capture"))
    return Gauge(requests=len(finished), tokens=tokens, rows=sum(sum(done.loss_mask[1:]) for done in finished),
                 bytes_per_row=bytes_per_row, plain_tokens_per_second=tokens / plain,
                 capture_tokens_per_second=tokens / captured,
                 ratio=statistics.median(r.capture / r.plain for r in rounds), rounds=tuple(rounds),
                 captured_seconds=sum(r.capture for r in rounds), times=CaptureTimes.sum(times))
