"""SIGKILL of the worker and of the driver at random moments, with real vLLM and real Ray.

Catches a shard that counts as done and is not, prompts lost or doubled by a second attempt, finished work thrown away,
and processes that outlive their driver. `make test` kills twice each; `make faults` ten times each.
"""

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Self

import psutil
import pytest
from faults.jobs import kill_marked, killed
from runs import command, prompt_records, succeed, write_corpus

from distill_pipe.produce.smollm2 import materialise_smollm2
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.manifest import shard_name
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.verify import verify

NUM_PROMPTS, PER_SHARD = 48, 2
# Start-up takes 20 to 60 s and each shard a few. Every other moment lies in it, the rest after the next commit.
STARTUP_SECONDS, WORKING_SECONDS = 30, 12
GONE_SECONDS = 20


class Run:
    """One `generate` command that can be killed, and the processes it started; all are gone afterwards."""

    def __init__(self, corpus: Path, out: Path) -> None:
        self.mark = f"DISTILL_PIPE_TEST={uuid.uuid4()}"
        name, value = self.mark.split("=")
        line = [sys.executable, "-m", "distill_pipe.cli", "generate", "--target", "smollm2-135m", "--corpus", corpus,
                "--out", out, "--layers", "2,30", "--set", "sampling.max_tokens=16", "--set",
                f"prompts_per_shard={PER_SHARD}", "--set", "engine.max_num_seqs=8"]
        self.log = out.with_name(f"{value}.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(list(map(str, line)), env={**os.environ, name: value}, stderr=log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        kill_marked(self.mark)

    def engines(self) -> list[psutil.Process]:
        """The living processes of this run that hold a model. Ray's own agents need up to a minute to notice that their
        raylet is gone; they hold neither a model nor a GPU."""
        found = []
        for process in psutil.process_iter():
            try:
                environ = Path(f"/proc/{process.pid}/environ").read_bytes()
                name = " ".join(process.cmdline())
            except (OSError, psutil.NoSuchProcess):
                continue
            if self.mark.encode() in environ and ("_Replica" in name or "VLLM" in name):
                found.append(process)
        return found

    def wait_for(self, moments: random.Random, out: Path) -> bool:
        """Wait for a random moment; False when the command ended before."""
        working = moments.random() < 0.5
        before = len(committed_files(out))
        while working and len(committed_files(out)) == before and self.process.poll() is None:
            time.sleep(0.2)
        deadline = time.monotonic() + moments.uniform(0, WORKING_SECONDS if working else STARTUP_SECONDS)
        while time.monotonic() < deadline and self.process.poll() is None:
            time.sleep(0.05)
        return self.process.poll() is None

    def kill_worker(self) -> bool:
        """SIGKILL the engine's process; False when there is none at the moment."""
        return any(killed(process) for process in self.engines()[:1])

    def kill_driver(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait_until_gone(self) -> None:
        """A killed driver must not leave an engine behind that holds memory or a GPU."""
        deadline = time.monotonic() + GONE_SECONDS
        while self.engines():
            assert time.monotonic() < deadline, f"still alive: {[p.cmdline()[:3] for p in self.engines()]}"
            time.sleep(0.5)


def dataset_parts(tmp_path: Path) -> tuple[Path, Path]:
    questions = [f"Write {n} words about the number {n}." for n in range(NUM_PROMPTS)]
    return write_corpus(tmp_path / "c.jsonl", prompt_records(questions)), tmp_path / "out"


def committed_files(out: Path) -> dict[int, tuple[int, int]]:
    """Inode and change time of each committed shard: either differs when a shard was written again."""
    root = LocalRoot(out)
    if not out.exists():
        return {}
    stats = {shard: root.local(shard_name(shard)).stat() for shard in committed_shards(root)}
    return {shard: (s.st_ino, s.st_mtime_ns) for shard, s in stats.items()}


def assert_whole(out: Path) -> None:
    report = verify(LocalRoot(out))
    assert report.clean, report
    assert (report.traces, report.missing_prompts, report.doubled_prompts) == (NUM_PROMPTS, 0, 0)


def kill_drivers(tmp_path: Path, kills: int, seed: int) -> None:
    """SIGKILL the driver `kills` times; a dataset that is finished before is checked and another one is begun."""
    moments = random.Random(seed)
    corpus, out = dataset_parts(tmp_path)
    killed, done = 0, committed_files(out)
    while killed < kills or not finished(out):
        with Run(corpus, out) as run:
            if killed < kills and run.wait_for(moments, out):
                run.kill_driver()
                killed += 1
            else:
                assert run.process.wait(600) == 0, run.log.read_text()
                assert_whole(out)
            run.wait_until_gone()
        now = committed_files(out)
        assert done.items() <= now.items(), "a finished shard was written again"
        print(f"driver killed {killed} times, {len(now)} of {NUM_PROMPTS // PER_SHARD} shards committed")
        done = now
        if finished(out) and killed < kills:
            out, done = another(out), {}
    assert_whole(out)
    succeed("verify", out)


def another(out: Path) -> Path:
    """A place for one more dataset: a random moment may miss more than one of them."""
    return out.with_name(f"{out.name}-more")


def finished(out: Path) -> bool:
    return len(committed_files(out)) == NUM_PROMPTS // PER_SHARD


def kill_workers(tmp_path: Path, kills: int, seed: int) -> None:
    """SIGKILL the engine `kills` times, over as many datasets as it takes; each must end whole."""
    moments = random.Random(seed)
    corpus, out = dataset_parts(tmp_path)
    killed, done = 0, committed_files(out)
    while killed < kills or not finished(out):
        if finished(out):
            out, done = another(out), {}
        with Run(corpus, out) as run:
            while killed < kills and run.process.poll() is None:
                if not run.wait_for(moments, out) or not run.kill_worker():
                    continue
                killed += 1
                now = committed_files(out)
                assert done.items() <= now.items(), "a finished shard was written again"
                print(f"worker killed {killed} times, {len(now)} of {NUM_PROMPTS // PER_SHARD} shards committed")
                done = now
            # Three deaths without a finished shard end a run with 7; the same command goes on.
            assert run.process.wait(600) in (0, 7), run.log.read_text()
        assert done.items() <= committed_files(out).items(), "a finished shard was written again"
        if run.process.returncode == 0:
            assert_whole(out)


@pytest.mark.engine
def test_a_driver_killed_twice_leaves_a_run_that_the_same_command_finishes(tmp_path) -> None:
    kill_drivers(tmp_path, kills=2, seed=time.time_ns())


@pytest.mark.engine
def test_a_worker_killed_twice_is_replaced_and_nothing_is_lost(tmp_path) -> None:
    kill_workers(tmp_path, kills=2, seed=time.time_ns())


@pytest.mark.engine
@pytest.mark.parametrize(("sent", "code", "says"), [(signal.SIGINT, 130, "interrupted; the same command continues"),
                                                    (signal.SIGTERM, 143, "terminated; the same command continues")])
def test_a_signal_ends_a_run_with_its_code_and_leaves_no_engine(tmp_path, sent, code, says) -> None:
    corpus, out = dataset_parts(tmp_path)
    with Run(corpus, out) as run:
        while not run.engines():
            assert run.process.poll() is None, run.log.read_text()
            time.sleep(0.2)
        run.process.send_signal(sent)
        assert run.process.wait(60) == code
        assert says in run.log.read_text()
        assert "Traceback" not in run.log.read_text()
        run.wait_until_gone()
    report = verify(LocalRoot(out))
    assert not report.problems


@pytest.mark.engine
def test_an_engine_that_cannot_start_ends_the_run_at_once_with_the_reason(tmp_path) -> None:
    corpus, out = dataset_parts(tmp_path)
    target = tmp_path / "target"
    target.mkdir()
    for file in materialise_smollm2().iterdir():
        (target / file.name).symlink_to(file)
    config = (target / "config.json").read_text().replace("LlamaForCausalLM", "NobodysForCausalLM")
    (target / "config.json").unlink()
    (target / "config.json").write_text(config.replace('"llama"', '"nobody"'))
    done = command("generate", "--target", target, "--corpus", corpus, "--out", out)
    assert done.returncode == 7, done.stderr
    assert "error: vLLM cannot run" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_driver_killed_at_ten_random_moments(tmp_path, fault_row) -> None:
    kill_drivers(tmp_path, kills=10, seed=1)
    fault_row("F25 SIGKILL of the real engine's driver at random moments", 10, 10)


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_worker_killed_at_ten_random_moments(tmp_path, fault_row) -> None:
    kill_workers(tmp_path, kills=10, seed=2)
    fault_row("F18 SIGKILL of the real engine at random moments", 10, 10)
