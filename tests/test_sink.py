"""Catches memory that fills up behind a slow disk, a failure of the sink that is only logged or takes other shards with
it, and rows that are read before they have arrived or kept longer than needed.

Real sink, real store, real Parquet; the engine is a list of random traces cut into steps. See `feeder.py` for those and
for the process whose memory is measured.
"""

import errno
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from feeder import (
    DISK_BYTES_PER_SECOND,
    SHAPE,
    SLOW_SHARD_BYTES,
    SlowRoot,
    decided,
    finished,
    step_of,
    until,
    whole_step,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import GENERATE, command, prompt_records, write_corpus
from tiny_datasets import Shape, random_trace, start_run

from distill_pipe.errors import CaptureError
from distill_pipe.produce.engine import ShardOutcome
from distill_pipe.produce.sink import ShardSink
from distill_pipe.store.commit import commit_shard, committed_shards
from distill_pipe.store.hidden_codec import encode_trace
from distill_pipe.store.manifest import Run, ShardInfo
from distill_pipe.store.plan import shard_range
from distill_pipe.store.root import SCRATCH, LocalRoot
from distill_pipe.store.shard import QuarantinedPrompt
from distill_pipe.store.trace import Trace
from distill_pipe.store.verify import verify

FEEDER = [sys.executable, str(Path(__file__).with_name("feeder.py"))]


def shard_traces(run: Run, shard: int, shape: Shape = SHAPE) -> list[Trace]:
    return [random_trace(o, shape) for o in range(*shard_range(run, shard))]


def feed(sink: ShardSink, run: Run, shard: int, shape: Shape = SHAPE) -> None:
    """A whole shard, prompt after prompt."""
    for trace in shard_traces(run, shard, shape):
        sink.add(whole_step(trace, shape))
        sink.finish(shard, [finished(trace)])
    sink.commit(shard, [])


def described(outcome: ShardOutcome) -> ShardInfo:
    """What a shard's record says, without the number of the attempt that wrote it."""
    assert outcome.fragment is not None, outcome.message
    return msgspec.structs.replace(outcome.fragment.info, attempt="")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start_run(tmp_path / "out", 20)


@pytest.fixture
def root(tmp_path: Path, run: Run) -> LocalRoot:
    return LocalRoot(tmp_path / "out")


# Steps to shards


@st.composite
def schedules(draw: st.DrawFn) -> tuple[list[tuple], list[tuple[int, list[int]]]]:
    """What an engine and its driver may do with 5 prompts in 3 shards: calls in order, and the commits among them with
    the prompts that were given up on."""
    per_shard, prompts = 2, 5
    traces = [random_trace(o) for o in range(prompts)]
    pieces: dict[int, list[tuple[int, int]]] = {}
    for trace in traces:
        cuts = draw(st.sets(st.integers(1, trace.num_tokens - 2), max_size=4))
        pieces[trace.ordinal] = list(pairwise([0, *sorted(cuts), trace.num_tokens - 1]))
    lost = draw(st.sets(st.integers(0, prompts - 1), max_size=2))
    running, calls, commits = set(range(prompts)), [], []
    waiting = {shard: set(range(shard * per_shard, min((shard + 1) * per_shard, prompts))) for shard in range(3)}
    while waiting:
        step = draw(st.lists(st.sampled_from(sorted(running)), min_size=1, unique=True)) if running else []
        calls.append(("add", [(o, *pieces[o].pop(0)) for o in step]))
        ended = [o for o in step if not pieces[o] or (o in lost and draw(st.booleans()))]
        running -= set(ended)
        for ordinal in ended:
            shard = ordinal // per_shard
            if ordinal not in lost:
                calls.append(("finish", shard, ordinal))
            waiting[shard].discard(ordinal)
        for shard in [s for s, left in waiting.items() if not left and (not running or draw(st.booleans()))]:
            del waiting[shard]
            commits.append((shard, sorted(o for o in lost if o // per_shard == shard)))
            calls.append(("commit", *commits[-1]))
    return calls, commits


def given_up(ordinals: Sequence[int]) -> list[QuarantinedPrompt]:
    return [QuarantinedPrompt(o, f"prompt-{o}", "engine", "the engine gave up") for o in ordinals]


@settings(max_examples=60)
@given(schedules(), st.sampled_from([1, 2000, 1 << 20]))
def test_any_interleaving_of_steps_and_shards_commits_what_committing_each_shard_by_itself_does(
        schedule: tuple[list[tuple], list[tuple[int, list[int]]]], backlog_bytes: int) -> None:
    calls, commits = schedule
    with tempfile.TemporaryDirectory() as folder:
        run = start_run(Path(folder) / "out", 5, Shape(prompts_per_shard=2))
        sink = ShardSink(LocalRoot(Path(folder) / "out"), run, backlog_bytes)
        for name, *rest in calls:
            if name == "add":
                if rest[0]:
                    sink.add(step_of([(random_trace(o), first, stop) for o, first, stop in rest[0]]))
            elif name == "finish":
                sink.finish(rest[0], [finished(random_trace(rest[1]))])
            else:
                sink.commit(rest[0], given_up(rest[1]))
        outcomes = decided(sink, 3)
        assert [o.shard for o in outcomes] == [shard for shard, _ in commits]
        for (shard, lost), outcome in zip(commits, outcomes, strict=True):
            traces = [encode_trace(random_trace(o), run.spec.capture.hidden_codec)
                      for o in range(*shard_range(run, shard)) if o not in lost]
            alone = commit_shard(LocalRoot(Path(folder) / "alone"), run, shard, traces, given_up(lost))
            assert described(outcome) == described(ShardOutcome(shard, alone))
        assert verify(LocalRoot(Path(folder) / "out")).clean


def test_rows_are_not_looked_at_before_their_copy_from_the_device_is_done(root: LocalRoot, run: Run) -> None:
    sink, waited_on = ShardSink(root, run), []
    for trace in shard_traces(run, 0):
        step = whole_step(trace)
        arrived = [*step.head, *step.states]
        in_flight = [np.full_like(a, 7) for a in arrived]

        def copy(arrived: list[np.ndarray] = arrived, in_flight: list[np.ndarray] = in_flight) -> None:
            waited_on.append(threading.current_thread().name)
            for target, source in zip(in_flight, arrived, strict=True):
                target[...] = source

        sink.add(replace(step, head=in_flight[:-1], states=in_flight[-1:], ready=copy))
        sink.finish(0, [finished(trace)])
    sink.commit(0, [])
    [outcome] = decided(sink, 1)
    encoded = [encode_trace(t, run.spec.capture.hidden_codec) for t in shard_traces(run, 0)]
    alone = commit_shard(LocalRoot(root.path.with_name("alone")), run, 0, encoded, [])
    assert described(outcome) == described(ShardOutcome(0, alone))
    assert waited_on == ["distill-pipe-sink"] * 4


def test_a_step_is_let_go_once_its_rows_are_taken_however_long_its_prompts_run(root: LocalRoot, run: Run) -> None:
    sink, gone = ShardSink(root, run), []
    for trace in shard_traces(run, 0):
        step = whole_step(trace)
        gone += [weakref.ref(array) for array in (*step.head, *step.states)]
        sink.add(step)
        del step
    until(lambda: all(reference() is None for reference in gone))
    for trace in shard_traces(run, 0):
        sink.finish(0, [finished(trace)])
    sink.commit(0, [])
    assert described(decided(sink, 1)[0]).traces == 4


# Failures


def test_a_prompt_with_a_value_that_is_not_finite_is_quarantined_and_its_shard_committed(root, run) -> None:
    sink = ShardSink(root, run)
    for trace in shard_traces(run, 0):
        if trace.ordinal == 2:
            trace.hidden[2][1, 3] = np.nan
        sink.add(whole_step(trace))
        sink.finish(0, [finished(trace)])
    sink.commit(0, given_up([]))
    info = described(decided(sink, 1)[0])
    assert (info.traces, info.quarantined) == (3, 1)
    assert info.quarantine is not None
    [row] = pq.read_table(root.local(info.quarantine.name)).to_pylist()
    assert (row["ordinal"], row["code"]) == (2, "not_finite")
    assert "layer 2 is not finite at 1 positions, the first at position 1" in row["message"]
    assert not verify(root).problems


def test_rows_that_are_missing_fail_their_shard_and_no_other(root: LocalRoot, run: Run) -> None:
    sink = ShardSink(root, run)
    first, *others = shard_traces(run, 1)
    sink.add(step_of([(first, 1, first.num_tokens - 1)]))
    sink.finish(1, [finished(first)])
    feed(sink, run, 0)
    for trace in others:
        sink.add(whole_step(trace))
        sink.finish(1, [finished(trace)])
    sink.commit(1, [])
    whole, failed = decided(sink, 2)
    assert described(whole).traces == 4
    assert (failed.shard, failed.fragment, failed.error) == (1, None, "CaptureError")
    assert failed.message.startswith(f"prompt {first.ordinal}: 1 of ")
    assert committed_shards(root) == {0}
    feed(sink, run, 1)
    assert described(decided(sink, 1)[0]).traces == 4


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size`: a write fails as on a full disk, and is cut short as there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_store_without_room_after_three_shards_fails_the_fourth_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    shape = Shape(hidden_size=512)
    run, root = start_run(tmp_path / "out", 20, shape), LocalRoot(tmp_path / "out")
    sink = ShardSink(root, run)
    for shard in range(3):
        feed(sink, run, shard, shape)
    assert [o.error for o in decided(sink, 3)] == [""] * 3
    before = files(root)
    with file_size_limit(20_000):
        feed(sink, run, 3, shape)
        [failed] = decided(sink, 1)
    assert (failed.shard, failed.fragment, failed.error) == (3, None, "StorageFullError")
    assert failed.message.endswith("free some room, then run the same command again")
    assert files(root) == before
    report = verify(root)
    assert (report.problems, report.orphans, report.shards_found, report.traces) == ((), (), 3, 12)
    feed(sink, run, 4, shape)
    feed(sink, run, 3, shape)
    assert [o.error for o in decided(sink, 2)] == [""] * 2
    assert verify(root).clean


def files(root: LocalRoot) -> set[str]:
    return {str(p.relative_to(root.path)) for p in root.path.rglob("*") if p.is_file()}


class FullRoot(LocalRoot):
    """A store that has no room for a new name of shard 3 in `folder`."""

    folder = ""

    def publish(self, source: Path, name: str) -> None:
        self._refuse(name)
        super().publish(source, name)

    def create(self, source: Path, name: str) -> bool:
        self._refuse(name)
        return super().create(source, name)

    def _refuse(self, name: str) -> None:
        if name.startswith(self.folder) and "0000003" in name:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("folder", "orphans", "shards"), [("hidden_states", 0, 3), ("data", 1, 3),
                                                          ("_manifest", 0, 4)])
def test_a_disk_that_is_full_at_the_last_moment_leaves_a_whole_shard_or_none(tmp_path, run, folder, orphans,
                                                                            shards) -> None:
    root = FullRoot(tmp_path / "out")
    root.folder = folder
    sink = ShardSink(root, run)
    for shard in range(4):
        feed(sink, run, shard)
    assert [o.error for o in decided(sink, 4)] == ["", "", "", "StorageFullError"]
    report = verify(root)
    assert (report.problems, len(report.orphans), report.shards_found) == ((), orphans, shards)
    assert list((root.path / SCRATCH).glob("*")) == []
    root.folder = "nowhere"
    feed(sink, run, 3)
    assert described(decided(sink, 1)[0]).traces == 4


class DyingRoot(LocalRoot):
    """A store in which the thread meets an error that no shard can be blamed for."""

    def publish(self, source: Path, name: str) -> None:
        raise MemoryError(f"no room for {source.name}, which is {name}")


CALLS: dict[str, Callable[[ShardSink], object]] = {
    "add": lambda sink: sink.add(whole_step(random_trace(4))),
    "finish": lambda sink: sink.finish(1, [finished(random_trace(4))]),
    "commit": lambda sink: sink.commit(1, []),
    "outcomes": lambda sink: sink.outcomes(),
}


def dead(sink: ShardSink) -> bool:
    try:
        return bool(sink.outcomes())
    except CaptureError:
        return True


@pytest.mark.parametrize("call", CALLS)
def test_a_dead_thread_is_raised_by_every_later_call(tmp_path: Path, run: Run, call: str) -> None:
    root = DyingRoot(tmp_path / "out")
    sink = ShardSink(root, run)
    feed(sink, run, 0)
    until(lambda: dead(sink))
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"the capture thread died: MemoryError\('no room for hidden"):
            CALLS[call](sink)
    assert committed_shards(root) == set()
    assert not verify(root).problems


def device_lost() -> None:
    raise RuntimeError("device lost")


def test_a_copy_from_the_device_that_fails_is_raised_by_the_next_call(root: LocalRoot, run: Run) -> None:
    sink = ShardSink(root, run)
    sink.add(replace(whole_step(random_trace(0)), ready=device_lost))
    until(lambda: dead(sink))
    with pytest.raises(CaptureError, match="device lost"):
        sink.commit(0, [])


# A slow disk


def test_times_count_the_threads_work_and_not_its_waiting(tmp_path: Path) -> None:
    shape = Shape(hidden_size=4096)
    run = start_run(tmp_path / "out", 4, shape)
    sink, started = ShardSink(SlowRoot(tmp_path / "out"), run), time.monotonic()
    assert msgspec.structs.astuple(sink.times()) == (0, 0, 0, 0)
    feed(sink, run, 0, shape)
    decided(sink, 1)
    times, elapsed = sink.times(), time.monotonic() - started
    assert min(times.assemble_cpu_seconds, times.encode_cpu_seconds, times.commit_cpu_seconds) > 0
    assert times.commit_cpu_seconds < elapsed / 2
    assert times.engine_waited_seconds == 0


def test_a_disk_of_one_megabyte_per_second_slows_the_producer_and_memory_stays_flat(tmp_path: Path) -> None:
    found = {}
    for shards in (4, 12):
        done = subprocess.run([*FEEDER, tmp_path / str(shards), str(shards)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[shards] = json.loads(done.stdout)
        print(f"{shards} shards of {SLOW_SHARD_BYTES >> 20} MiB: {found[shards]}")
        assert verify(LocalRoot(tmp_path / str(shards))).clean
    few, many = found[4], found[12]
    growth = many["peak"] - few["peak"]
    assert growth < 2 * SLOW_SHARD_BYTES, f"the peak grew by {growth >> 20} MiB over eight more shards"
    # All but the shard being committed and what fits the backlog had to be on disk before the producer could go on.
    on_disk = many["stored"] * 10 / 12 / DISK_BYTES_PER_SECOND
    assert many["produced_seconds"] > on_disk
    assert many["waited_seconds"] > on_disk / 2


# The whole command


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system with room for about three shards of one prompt."""
    path = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1700k", "tmpfs", path], capture_output=True,
                             text=True)
    if mounted.returncode:
        path.rmdir()
        pytest.skip(f"needs root to mount a small disk: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)
    path.rmdir()


@pytest.mark.engine
def test_a_disk_that_fills_up_during_a_run_ends_it_with_whole_shards_only(small_disk: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records())
    done = command("generate", "--corpus", corpus, "--out", small_disk / "out", *GENERATE, "--set",
                   "prompts_per_shard=1")
    assert done.returncode == 5, done.stderr
    assert "No space left on device; free some room" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    root = LocalRoot(small_disk / "out")
    report = verify(root)
    print(f"{report.shards_found} of {report.shards} shards were committed before the disk was full")
    assert 1 < report.shards_found < report.shards
    assert (report.problems, report.orphans, report.traces) == ((), (), report.shards_found)
    assert not [p for p in (root.path / SCRATCH).rglob("*") if p.is_file()]
