"""What the driver costs per shard: its processor time and memory with the fake engine, as shards, workers and nodes
grow, and the schedule alone at sizes that no single machine can run.

DISTILL_PIPE_BENCH_SHARDS is a list of sizes (500,1000,2000); 20000 takes five minutes on two quiet cores.
"""

import itertools
import os
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict, deque
from pathlib import Path

import psutil
import pytest
from faults.jobs import CLUSTER_ENV, cluster, commits, running
from runs import prompt_records, write_corpus

from distill_pipe.produce.schedule import Command, Feed, Schedule, Start
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.root import LocalRoot

pytestmark = [pytest.mark.bench, pytest.mark.ray]
WORKERS, NODES = (2, 4, 8), (1, 2, 4)
SIZES = [int(size) for size in os.environ.get("DISTILL_PIPE_BENCH_SHARDS", "500,1000,2000").split(",")]
FEW = 1000
# Engines, shards, and shards per second. A real 1,000 engines with shards of five minutes, four in flight, end 13.
MANY = ((10, 1000, 50), (100, 1000, 50), (1000, 2000, 50))
SETTINGS = ("--target", "fake", "--layers", "none", "--set", "sampling.max_tokens=2", "--set", "prompts_per_shard=1",
            "--set", "engine.max_num_seqs=2")
HEAD = ("seconds | driver CPU per shard, ms | driver memory at a quarter, MiB | at the end |\n"
        "|---|---|---|---|---|---|")


def driver_cost(folder: Path, shards: int, workers: int, *args: object, env: dict[str, str] | None = None) -> str:
    """The cells of HEAD: seconds, the driver's milliseconds of processor time per shard, and its memory in MiB."""
    folder.mkdir()
    corpus = write_corpus(folder / "c.jsonl", prompt_records([f"{n}?" for n in range(shards)]))
    out = folder / "out"
    with running(corpus, out, "--workers", workers, *args, settings=SETTINGS,
                 env={"DISTILL_PIPE_FAKE_STEP_SECONDS": "0", **(env or {})}) as job:
        job.wait_for_commits(out)
        driver, started = psutil.Process(job.process.pid), time.monotonic()
        first, spent, quarter, end = len(commits(out)), 0.0, 0.0, 0.0
        before = sum(driver.cpu_times()[:2])
        while job.alive:
            try:
                spent = sum(driver.cpu_times()[:2]) - before
                end = driver.memory_info().rss / 2**20 or end  # none is left of a process that has just ended
            except psutil.NoSuchProcess:
                break
            if not quarter and len(committed_shards(LocalRoot(out))) > shards // 4:
                quarter = end
            time.sleep(0.5)
        job.end()
        seconds = time.monotonic() - started
    assert len(commits(out)) == shards
    return f"{seconds:.0f} | {spent / (shards - first) * 1000:.2f} | {quarter:.0f} | {end:.0f} |"


@pytest.mark.timeout(3600)
def test_the_driver_s_cost_per_shard_does_not_grow_with_shards(tmp_path: Path) -> None:
    print(f"\n| shards | workers | {HEAD}")
    for shards in SIZES:
        print(f"| {shards:,} | {WORKERS[-1]} | {driver_cost(tmp_path / f'{shards}', shards, WORKERS[-1])}", flush=True)


@pytest.mark.timeout(1800)
def test_the_driver_s_cost_per_shard_as_workers_grow(tmp_path: Path) -> None:
    print(f"\n| shards | workers | {HEAD}")
    for workers in WORKERS:
        print(f"| {FEW:,} | {workers} | {driver_cost(tmp_path / f'{workers}', FEW, workers)}", flush=True)


@pytest.mark.timeout(1800)
def test_the_driver_s_cost_per_shard_as_nodes_grow(tmp_path: Path) -> None:
    """A cluster on this machine, one worker on each of its nodes."""
    print(f"\n| shards | nodes | {HEAD}")
    for count in NODES:
        with cluster(count, "0") as nodes:
            cells = driver_cost(tmp_path / f"{count}", FEW, count, "--set", f"address={nodes.address}", env=CLUSTER_ENV)
        print(f"| {FEW:,} | {count} | {cells}", flush=True)


@pytest.mark.timeout(1800)
def test_the_driver_s_cost_per_shard_at_many_engines() -> None:
    """Engines that are coroutines, since no machine here holds so many; see `many_engines`."""
    print("\n| shards | engines | shards per second | seconds | driver CPU per shard, ms | cores | driver memory, "
          "MiB |\n|---|---|---|---|---|---|---|")
    for engines, shards, rate in MANY:
        line = [sys.executable, str(Path(__file__).with_name("many_engines.py")), *map(str, (engines, shards, rate))]
        path = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parents[2])))
        cells = subprocess.run(line, check=True, text=True, stdout=subprocess.PIPE,
                               env={**os.environ, **CLUSTER_ENV, "PYTHONPATH": path}).stdout.strip()
        print(f"| {shards:,} | {engines:,} | {rate} | {cells}", flush=True)


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
