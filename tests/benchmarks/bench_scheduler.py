"""What the driver costs per shard: its processor time and memory, with the fake engine on 8 local workers, and the
schedule alone at sizes that no single machine can run.

DISTILL_PIPE_BENCH_SHARDS is a list of sizes (500,1000,2000); 20000 takes five minutes on two quiet cores.
"""

import itertools
import os
import time
import tracemalloc
from collections import defaultdict, deque
from pathlib import Path

import psutil
import pytest
from faults.jobs import commits, running
from runs import prompt_records, write_corpus

from distill_pipe.produce.schedule import Command, Feed, Schedule, Start
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.root import LocalRoot

pytestmark = [pytest.mark.bench, pytest.mark.ray]
WORKERS = (2, 4, 8)
SIZES = [int(size) for size in os.environ.get("DISTILL_PIPE_BENCH_SHARDS", "500,1000,2000").split(",")]
SETTINGS = ("--target", "fake", "--layers", "none", "--set", "sampling.max_tokens=2", "--set", "prompts_per_shard=1",
            "--set", "engine.max_num_seqs=2")


def driver_cost(folder: Path, shards: int, workers: int) -> tuple[float, float, float, float]:
    """Seconds, driver milliseconds of processor time per shard, and its memory in MiB at a quarter and at the end."""
    corpus = write_corpus(folder / "c.jsonl", prompt_records([f"{n}?" for n in range(shards)]))
    out = folder / "out"
    with running(corpus, out, "--workers", workers, settings=SETTINGS,
                 env={"DISTILL_PIPE_FAKE_STEP_SECONDS": "0"}) as job:
        job.wait_for_commits(out)
        driver, started = psutil.Process(job.process.pid), time.monotonic()
        first, spent, quarter, end = len(commits(out)), 0.0, 0.0, 0.0
        before = sum(driver.cpu_times()[:2])
        while job.alive:
            try:
                spent, end = sum(driver.cpu_times()[:2]) - before, driver.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                break
            if not quarter and len(committed_shards(LocalRoot(out))) > shards // 4:
                quarter = end
            time.sleep(0.5)
        job.end()
        seconds = time.monotonic() - started
    assert len(commits(out)) == shards
    return seconds, spent / (shards - first) * 1000, quarter, end


@pytest.mark.timeout(3600)
def test_the_driver_s_cost_per_shard_does_not_grow(tmp_path: Path) -> None:
    print("\n| shards | workers | seconds | driver CPU per shard, ms | driver memory at a quarter, MiB | at the end |")
    print("|---|---|---|---|---|---|")
    for shards, workers in [*((size, WORKERS[-1]) for size in SIZES), *((SIZES[-1], few) for few in WORKERS[:-1])]:
        (folder := tmp_path / f"{shards}-{workers}").mkdir()
        seconds, cpu, quarter, end = driver_cost(folder, shards, workers)
        print(f"| {shards} | {workers} | {seconds:.0f} | {cpu:.2f} | {quarter:.0f} | {end:.0f} |", flush=True)


def schedule_cost(shards: int, engines: int) -> tuple[float, float]:
    """Microseconds per shard that the schedule itself takes, and its largest memory in MiB."""
    tracemalloc.start()
    schedule = Schedule(range(shards), engines, 64, 64 * shards, 4)
    held: defaultdict[int, deque[int]] = defaultdict(deque)

    def obey(commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Start):
                obey(schedule.ready(command.engine, 0))
            elif isinstance(command, Feed):
                held[command.engine].append(command.work.shard)

    obey(schedule.start())
    started = time.process_time()
    for engine in itertools.cycle(range(engines)):
        if schedule.finished:
            break
        if held[engine]:
            shard = held[engine].popleft()
            obey(schedule.progressed(engine, 0, alive=True, finished=64, passed={shard}, decided={shard}))
    spent, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return spent / shards * 1e6, peak / 2**20


def test_the_schedule_alone_at_many_engines_and_shards() -> None:
    print("\n| shards | engines | schedule CPU per shard, us (tracing memory) | peak memory, MiB |")
    print("|---|---|---|---|")
    for shards, engines in ((10_000, 10), (10_000, 100), (100_000, 100), (100_000, 1000)):
        cpu, peak = schedule_cost(shards, engines)
        print(f"| {shards:,} | {engines:,} | {cpu:.1f} | {peak:.1f} |")
