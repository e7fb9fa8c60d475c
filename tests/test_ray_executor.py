"""Engines whose workers vLLM places through Ray, as on machines with several GPUs each, give the rows of one process.

Catches workers that start a cluster of their own or land outside what was reserved for their engine, rows or devices
lost with an engine, and a run that waits for ever for devices that no node has. Two Ray nodes on this machine claim to
have two GPUs each (see ray_executor/); the engines are real, on CPU and in float32.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest
from byte_target import make_byte_target
from runs import PROMPTS, command, write_corpus
from test_layouts import assert_same_rows, captured

from distill_pipe.store.commit import committed_shards
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.trace import Trace

pytestmark = [pytest.mark.engine, pytest.mark.layouts]

SHIM = Path(__file__).with_name("ray_executor")
STORED = (0, 2, 4)
SETTINGS = ("max_model_len=200", "prompts_per_shard=2", f"engine.kv_cache_memory_bytes={32 << 20}")
OVER_RAY = ("engine.distributed_executor_backend=ray", "engine.tensor_parallel_size=2")
ANSWERS: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": p[::-1]}]} for p in PROMPTS * 2]
GONE_SECONDS = 20


class Worker(msgspec.Struct, frozen=True):
    """What ray_executor/sitecustomize.py writes down of one of vLLM's workers."""

    engine: str
    rank: int
    node: str
    devices: list[int]
    process: int


@dataclass(frozen=True)
class Nodes:
    """A Ray cluster of a test's own."""

    address: str
    mark: str
    trace: Path

    def processes(self, title: str = "") -> list[psutil.Process]:
        """What lives of the cluster, engines included."""
        found = []
        for process in psutil.process_iter():
            try:
                if self.mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes() and title in " ".join(
                        process.cmdline()):
                    found.append(process)
            except (OSError, psutil.NoSuchProcess):
                continue
        return found

    def workers(self) -> dict[str, list[Worker]]:
        """vLLM's workers of each engine since the last call."""
        engines = defaultdict(list)
        for line in self.trace.read_text().splitlines():
            worker = msgspec.json.decode(line, type=Worker)
            engines[worker.engine].append(worker)
        self.trace.write_text("")
        return engines


@contextmanager
def ray_nodes(*gpus: int) -> Iterator[Nodes]:
    """Nodes with so many GPUs each. The engine's core gets a process of its own there, as it has on a GPU."""
    mark = f"DISTILL_PIPE_TEST={uuid.uuid4()}"
    # Ray's socket paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    trace = folder / "workers"
    trace.touch()
    environment = {**os.environ, **dict([mark.split("=")]), "RAY_EXECUTOR_TRACE": str(trace), "OMP_NUM_THREADS": "1",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "RAY_USAGE_STATS_ENABLED": "0",
                   "PYTHONPATH": os.pathsep.join(filter(None, [str(SHIM), os.environ.get("PYTHONPATH")]))}
    line = [sys.executable, SHIM / "nodes.py", folder, *gpus]
    cluster = subprocess.Popen(list(map(str, line)), env=environment, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    nodes = Nodes(cluster.stdout.readline().strip(), mark, trace)
    try:
        assert nodes.address, "Ray did not start"
        yield nodes
    finally:
        cluster.communicate(timeout=60)
        for process in nodes.processes():
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes(2, 2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", ANSWERS)


@pytest.fixture(scope="module")
def in_one_process(target, corpus, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    return captured(tmp_path_factory.mktemp("one") / "out", target, corpus, STORED, *SETTINGS)


def test_an_engine_over_two_nodes_gives_the_same_rows(tmp_path, target, corpus, nodes, in_one_process) -> None:
    found = captured(tmp_path / "out", target, corpus, STORED, *SETTINGS, *OVER_RAY,
                     "engine.pipeline_parallel_size=2", f"address={nodes.address}")
    (workers,) = nodes.workers().values()
    assert sorted(w.rank for w in workers) == [0, 1, 2, 3]
    stages = [{w.node for w in workers if w.rank // 2 == stage} for stage in (0, 1)]
    assert [len(stage) for stage in stages] == [1, 1]
    assert stages[0] != stages[1]
    assert_same_rows(found, in_one_process)


def test_two_engines_at_once_are_on_a_node_each(tmp_path, target, corpus, nodes, in_one_process) -> None:
    found = captured(tmp_path / "out", target, corpus, STORED, *SETTINGS, *OVER_RAY, "workers=2",
                     f"address={nodes.address}")
    engines = nodes.workers()
    assert [sorted(w.rank for w in workers) for workers in engines.values()] == [[0, 1], [0, 1]]
    assert [len({w.node for w in workers}) for workers in engines.values()] == [1, 1]
    assert len({(w.node, *w.devices) for workers in engines.values() for w in workers}) == 4
    assert_same_rows(found, in_one_process)


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["RayWorkerProc", "EngineCore"])
def test_an_engine_that_loses_a_process_gives_its_devices_to_the_next(tmp_path, target, corpus, nodes, in_one_process,
                                                                      victim: str, fault_row) -> None:
    # Either engine takes every device, so the second finds a place only when the first has given them back.
    out, killed = tmp_path / "out", list[int]()
    nodes.workers()
    threading.Thread(target=kill_one, args=(nodes, victim, out, killed), daemon=True).start()
    found = captured(out, target, corpus, STORED, *SETTINGS, *OVER_RAY, "engine.pipeline_parallel_size=2",
                     "prompts_per_shard=1", f"address={nodes.address}")
    assert len(killed) == 1
    assert [len(workers) for workers in nodes.workers().values()] == [4, 4]
    assert_same_rows(found, in_one_process)
    wait_until_gone(nodes)
    fault_row(f"F18 SIGKILL of a process ({victim}) of an engine on two nodes", 1, 1)


def kill_one(nodes: Nodes, title: str, out: Path, killed: list[int]) -> None:
    """SIGKILL a process of the engine when the first of many shards is committed, and when its caller waits for it."""
    while not out.exists() or not committed_shards(LocalRoot(out)):
        time.sleep(0.02)
    victim = nodes.processes(title)[0]
    victim.suspend()
    time.sleep(2)
    victim.kill()
    killed.append(victim.pid)


def wait_until_gone(nodes: Nodes) -> None:
    """No process of an engine may outlive its run."""
    deadline = time.monotonic() + GONE_SECONDS
    while left := [p for title in ("RayWorkerProc", "_Replica", "EngineCore") for p in nodes.processes(title)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def test_a_cluster_with_too_few_devices_ends_the_run_and_says_how_many_are_missing(tmp_path, target, corpus,
                                                                                   nodes) -> None:
    impatient = ("from distill_pipe.produce import driver; driver.PLACEMENT_SECONDS = 2.0; "
                 "from distill_pipe.cli import main; main()")
    line = [sys.executable, "-c", impatient, "generate", "--target", target, "--corpus", corpus, "--out",
            tmp_path / "out", "--responses", "corpus", "--set", f"address={nodes.address}", "--set",
            "engine.tensor_parallel_size=6", "--set", "engine.distributed_executor_backend=ray"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    assert done.stderr.splitlines()[-1].endswith("it takes 6 GPUs, and 4 of the cluster's 4 are free; 2 are missing")


def test_a_machine_with_too_few_devices_ends_the_run_at_once(tmp_path, target, corpus) -> None:
    done = command("generate", "--target", target, "--corpus", corpus, "--out", tmp_path / "out", "--responses",
                   "corpus", "--set", "engine.tensor_parallel_size=2", "--set",
                   "engine.distributed_executor_backend=ray", timeout=60)
    assert done.returncode == 7, done.stderr
    assert "1 x 2 GPUs are needed and this machine has 0: 2 are missing" in done.stderr.splitlines()[-1]
