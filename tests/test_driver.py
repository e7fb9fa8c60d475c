"""Catches a driver that loses what engines report, ends with the wrong error, or does not end. The engines are fake
ones in this process, and run when the driver waits for them."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from fakes import assert_same_rows, assert_whole, fake_job, quarantined, run_here

from distill_pipe.errors import ClusterError, EngineError, StorageFullError
from distill_pipe.produce import driver
from distill_pipe.produce.cluster import ClusterPlan, _start_ray
from distill_pipe.produce.driver import Driver, Ready, Report
from distill_pipe.produce.engine import EngineOptions, ShardOutcome
from distill_pipe.produce.fake_engine import FakeEngine
from distill_pipe.produce.fake_target import ByteRenderer
from distill_pipe.produce.generate import freeze, prepare
from distill_pipe.produce.job import Job
from distill_pipe.produce.journal import Journal, Meters
from distill_pipe.produce.replica import EnginePlan, Place, Replica
from distill_pipe.produce.schedule import Failure, Limits, Schedule, Work, shards_in_flight
from distill_pipe.produce.worker import Progress, ShardWorker
from distill_pipe.store.manifest import Run
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import LocalRoot


class Counted:
    """Counters and gauges that can be looked at."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def meters(self) -> Meters:
        return Meters(self._meter, self._meter)

    def _meter(self, name: str, _text: str, _labels: tuple[str, ...]) -> "_Meter":
        return _Meter(self.values, name)


class _Meter:
    def __init__(self, values: Counter[str], name: str) -> None:
        self._values, self._name = values, name

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self._values[" ".join([self._name, *tags.values()])] += value  # type: ignore[assignment]

    def set(self, value: float) -> None:
        self._values[self._name] = value  # type: ignore[assignment]


class HerePool:
    """Engines in this process. `fault` may answer for an engine: it gets its number and how many calls came before."""

    def __init__(self, run: Run, root: LocalRoot, fault: Callable[[int, int], Report | None]) -> None:
        self._run, self._root, self._fault = run, root, fault
        self._workers: dict[int, ShardWorker] = {}
        self._due: dict[int, Callable[[], Report]] = {}
        self.calls, self.killed = 0, 0

    def start(self, engine: int) -> None:
        self._due[engine] = lambda: Place("here", 1)

    def advance(self, engine: int, work: list[Work], seconds: float) -> None:
        self._due[engine] = lambda: self._workers[engine].advance(work, min(seconds, 0.05))

    def drain(self, engine: int, seconds: float) -> None:
        self._due[engine] = lambda: self._workers[engine].drain(seconds)

    def kill(self, engine: int) -> None:
        self.killed += 1
        self._workers.pop(engine, None)
        self._due.pop(engine, None)

    def idle(self) -> list[int]:
        return [engine for engine in self._workers if engine not in self._due]

    def wait(self, _seconds: float) -> list[tuple[int, Report]]:
        return [(engine, self._report(engine)) for engine in list(self._due)]

    def _report(self, engine: int) -> Report:
        self.calls += 1
        call = self._due.pop(engine)
        if (report := self._fault(engine, self.calls)) is not None:
            self._workers.pop(engine, None)
            return report
        found = call()
        if isinstance(found, Place):
            self._workers[engine] = ShardWorker(FakeEngine(self._run, self._root, 4), ByteRenderer(), self._root,
                                                self._run)
            self._due[engine] = Ready
        return found

    def leaving(self) -> list[int]:
        return []

    def shortage(self, seconds: float) -> str:
        return f"no place within {seconds:g} s"


def no_fault(_engine: int, _calls: int) -> Report | None:
    return None


def drive(job: Job, fault: Callable[[int, int], Report | None] = no_fault, *, engines: int = 2,
          stopping: Callable[[], bool] = lambda: False, log: Path | None = None) -> tuple[HerePool, Counter[str]]:
    _, spec = prepare(job)
    root = LocalRoot(job.out)
    run = freeze(root, spec, job)
    pool, counted = HerePool(run, root, fault), Counted()
    schedule = Schedule(range(num_shards(run)), engines, spec.prompts_per_shard, spec.corpus.prompts,
                        shards_in_flight(4, spec.prompts_per_shard))
    with Journal(log) as journal:
        Driver(pool, schedule, lambda _: None, journal, counted.meters(), 0.05).run(num_shards(run), stopping)
    return pool, counted.values


def events(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_run_is_driven_to_its_end_and_counted(tmp_path: Path) -> None:
    run_here(fake_job(tmp_path, "calm"))
    _, counted = drive(fake_job(tmp_path, "out"), log=tmp_path / "log")
    assert_whole(tmp_path / "out", 8)
    assert_same_rows(tmp_path / "out", tmp_path / "calm")
    assert counted["distill_pipe_prompts_total"] == 8
    assert counted["distill_pipe_shards_total"] == 2
    assert counted["distill_pipe_commit_seconds_total"] > 0
    assert Counter(event["event"] for event in events(tmp_path / "log")) == {"engine_started": 2, "shard_committed": 2}


@pytest.mark.parametrize("kind", ["engine", "infra"])
def test_an_engine_that_is_lost_is_replaced_and_its_shards_are_counted_as_given_back(tmp_path: Path, kind: str) -> None:
    def third_call_fails(_engine: int, calls: int) -> Report | None:
        return Failure(kind, "gone") if calls == 5 else None

    run_here(fake_job(tmp_path, "calm"))
    _, counted = drive(fake_job(tmp_path, "out"), third_call_fails, engines=1, log=tmp_path / "log")
    assert_same_rows(tmp_path / "out", tmp_path / "calm")
    [lost] = [event for event in events(tmp_path / "log") if event["event"] == "engine_lost"]
    assert (lost["class"], lost["reason"]) == (kind, "gone")
    assert counted["distill_pipe_retries_total"] == lost["shards"]
    assert counted[f"distill_pipe_failures_total {kind}"] == 1


def test_a_shard_that_cannot_be_stored_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    full = ShardOutcome(0, None, "StorageFullError", "no room")

    def store_is_full(_engine: int, calls: int) -> Report | None:
        return Progress(0, 0, [full], 0, []) if calls == 3 else None

    with pytest.raises(StorageFullError, match="shard 0: no room"):
        drive(fake_job(tmp_path, "out"), store_is_full, engines=1, log=tmp_path / "log")
    [failed] = [event for event in events(tmp_path / "log") if event["event"] == "shard_failed"]
    assert (failed["shard"], failed["class"]) == (0, "store")


def test_engines_that_always_die_end_the_run_with_the_last_cause(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="died 3 times in a row while they started; the last cause: no weights"):
        drive(fake_job(tmp_path, "out"), lambda _engine, _calls: Failure("engine", "no weights"))


def test_a_run_without_a_place_gives_up_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PLACEMENT_SECONDS", 0.2)
    monkeypatch.setattr(HerePool, "wait", lambda _pool, _seconds: time.sleep(0.05) or [])
    with pytest.raises(ClusterError, match=r"no place within 0.2 s"):
        drive(fake_job(tmp_path, "out"))


def test_a_run_that_is_asked_to_stop_lets_commits_under_way_end(tmp_path: Path) -> None:
    looks = iter(range(10**6))
    with pytest.raises(KeyboardInterrupt):
        drive(fake_job(tmp_path, "out", "prompts_per_shard=1"), stopping=lambda: next(looks) > 4)
    drive(fake_job(tmp_path, "out", "prompts_per_shard=1"))
    assert_whole(tmp_path / "out", 8)
    assert quarantined(tmp_path / "out") == []


def test_an_engine_s_process_ends_when_nobody_calls_it_any_more(tmp_path: Path) -> None:
    job = fake_job(tmp_path, "out")
    run = freeze(LocalRoot(job.out), prepare(job)[1], job)
    (tmp_path / "run").write_bytes(msgspec.json.encode(run))
    code = ("import sys, time\n"
            "from pathlib import Path\n"
            "from test_driver import orphaned_replica\n"
            "replica = orphaned_replica(Path(sys.argv[1]))\n"
            "replica.start()\n"
            "for _ in range(14):\n    replica.advance([], 0.5)\n"
            "print('called', flush=True)\n"
            "time.sleep(600)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300,
                          cwd=Path(__file__).parent)
    assert (done.returncode, done.stdout) == (1, "called\n"), done.stderr


def orphaned_replica(folder: Path) -> Replica:
    """An engine whose driver is missed after five seconds."""
    return Replica(EnginePlan("", None, EngineOptions(), (folder / "run").read_bytes(), str(folder / "out"), 1, 5.0))


class SlowRay:
    """A Ray whose first node is not up in time, on a machine with too much to do."""

    def init(self, **_: object) -> None:
        raise Exception("The current node timed out during startup.")


def test_a_ray_that_does_not_start_in_time_is_not_reported_as_a_bug() -> None:
    plan = ClusterPlan("model", None, 1, None, EngineOptions(), Limits())
    with pytest.raises(ClusterError, match=r"^Ray cannot be reached at this machine: The current node timed out"):
        _start_ray(SlowRay(), plan)
