"""Runs of the fake target that can be killed, and the nodes of a Ray cluster that can be lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from fakes import SETTINGS

from distill_pipe.store.commit import committed_shards
from distill_pipe.store.manifest import shard_name
from distill_pipe.store.root import LocalRoot

STEP_SECONDS = "0.03"
PATIENCE_SECONDS = 480
GONE_SECONDS = 40
# What a machine's user may have set for its own clusters is not ours.
CLUSTER_ENV = {"RAY_AUTH_MODE": "disabled"}


class RunningJob:
    """One `generate` command, and the processes it started."""

    def __init__(self, corpus: Path, out: Path | str, *args: object, env: dict[str, str] | None = None,
                 settings: tuple[str, ...] = SETTINGS, wrapped: tuple[str, ...] = ()) -> None:
        self.mark = f"DISTILL_PIPE_TEST={uuid.uuid4()}"
        name, value = self.mark.split("=")
        line = [*wrapped, sys.executable, "-m", "distill_pipe.cli", "generate", "--corpus", corpus, "--out", out,
                *settings, *args]
        self.log = corpus.with_name(f"{value}.log")
        environment = {**os.environ, "DISTILL_PIPE_FAKE_STEP_SECONDS": STEP_SECONDS, **(env or {}), name: value}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(list(map(str, line)), env=environment, stderr=log,
                                            stdout=subprocess.DEVNULL)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def says(self) -> str:
        return self.log.read_text()

    def engines(self) -> list[psutil.Process]:
        """The living processes of this run that hold an engine."""
        return [p for p in marked_processes(self.mark) if "_Replica" in titled(p)]

    def wait_for(self, happened: Callable[[], object]) -> None:
        until(lambda: happened() or not self.alive)
        assert self.alive, self.says()

    def wait_for_commits(self, out: Path, count: int = 1) -> None:
        self.wait_for(lambda: len(commits(out)) >= count)

    def end(self, *codes: int) -> int:
        """Wait for the command; it must end with one of these codes."""
        code = self.process.wait(PATIENCE_SECONDS)
        assert code in (codes or (0,)), self.says()
        return code

    def kill_driver(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait_until_gone(self) -> None:
        """No engine may outlive its driver."""
        until(lambda: not self.engines(), GONE_SECONDS)

    def clean_up(self) -> None:
        if self.alive:
            self.process.kill()
            self.process.wait()
        kill_marked(self.mark)


@contextmanager
def running(corpus: Path, out: Path | str, *args: object, **options: object) -> Iterator[RunningJob]:
    """A run that is gone afterwards, whatever happens."""
    job = RunningJob(corpus, out, *args, **options)  # type: ignore[arg-type]
    try:
        yield job
    finally:
        job.clean_up()


class Disturber:
    """Kills engines and drivers at random moments, over as many runs and datasets as it takes."""

    def __init__(self, corpus: Path, folder: Path, shards: int, seed: int, workers: int = 3) -> None:
        self._corpus, self._folder, self._shards, self._workers = corpus, folder, shards, workers
        self._luck = random.Random(seed)
        self.killed, self.outs, self.seconds = 0, [folder / "out-0"], 0.0

    def run(self, kills: int, kinds: tuple[str, ...]) -> list[Path]:
        """The datasets made meanwhile, all of them complete."""
        while self.killed < kills or not self.finished():
            if self.finished():
                self.outs.append(self._folder / f"out-{len(self.outs)}")
            before = commits(self.outs[-1])
            with running(self._corpus, self.outs[-1], "--workers", self._workers) as job:
                last = self._disturb(job, kills, kinds)
                # Engines that die faster than they start, or finish nothing between, end a run with 7.
                job.end(0, 7, -signal.SIGKILL)
                self.seconds = max(self.seconds, time.monotonic() - last)
                job.wait_until_gone()
            assert before.items() <= commits(self.outs[-1]).items(), "a finished shard was written again"
        return self.outs

    def finished(self) -> bool:
        return len(commits(self.outs[-1])) == self._shards

    def _disturb(self, job: RunningJob, kills: int, kinds: tuple[str, ...]) -> float:
        last = time.monotonic()
        while self.killed < kills and job.alive:
            kind = self._luck.choice(kinds)
            if kind == "driver" and self._luck.random() < 0.5:
                self._wait_for_a_commit(job)
            time.sleep(self._luck.uniform(0, 3))
            last, victims = time.monotonic(), job.engines() if "worker" in kind else []
            if "worker" in kind and not victims:
                continue
            for victim in victims if kind == "workers" else self._luck.sample(victims, min(1, len(victims))):
                self.killed += killed(victim)
            if "driver" in kind and job.alive:
                job.kill_driver()
                self.killed += 1
        return last

    def _wait_for_a_commit(self, job: RunningJob) -> None:
        """Or every kill would fall into the seconds in which a driver starts."""
        before = len(commits(self.outs[-1]))
        until(lambda: len(commits(self.outs[-1])) > before or not job.alive)


def killed(process: psutil.Process) -> bool:
    """SIGKILL; False where the process ended by itself just before."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes with this in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.append(process)
        except OSError:
            continue
    return found


def kill_marked(mark: str) -> None:
    """Kill all of them; some end by themselves meanwhile."""
    for process in marked_processes(mark):
        killed(process)


def titled(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def commits(out: Path) -> dict[int, tuple[int, int]]:
    """Inode and change time of each committed shard: either differs when a shard was written again."""
    if not out.exists():
        return {}
    stats = {shard: (out / shard_name(shard)).stat() for shard in committed_shards(LocalRoot(out))}
    return {shard: (s.st_ino, s.st_mtime_ns) for shard, s in stats.items()}


def until(happened: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


class Nodes:
    """A Ray cluster of several nodes, in a process of its own; see `nodes.py` for what it can be told."""

    def __init__(self, count: int, step_seconds: str) -> None:
        self.mark = f"DISTILL_PIPE_TEST={uuid.uuid4()}"
        name, value = self.mark.split("=")
        # Ray's sockets live there, and their paths must be short.
        self._folder = tempfile.mkdtemp(prefix="dpn-")
        line = [sys.executable, str(Path(__file__).with_name("nodes.py")), self._folder, str(count)]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         text=True, env={**os.environ, **CLUSTER_ENV, name: value,
                                                         "DISTILL_PIPE_FAKE_STEP_SECONDS": step_seconds})
        try:
            self.address = self._answer()
        except BaseException:
            self.close()
            raise
        self.count = count

    def tell(self, command: str) -> None:
        """Do something to the cluster, and wait until it is done."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        assert self._answer() == "ok"

    def engines(self) -> list[psutil.Process]:
        """The living processes of the cluster that hold an engine."""
        return [p for p in marked_processes(self.mark) if "_Replica" in titled(p)]

    def close(self) -> None:
        # Whatever it started has its mark, also what lost its parent.
        kill_marked(self.mark)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the cluster did not start, or died"
        return line


@contextmanager
def cluster(count: int, step_seconds: str = STEP_SECONDS) -> Iterator[Nodes]:
    """A cluster that is gone afterwards."""
    nodes = Nodes(count, step_seconds)
    try:
        yield nodes
    finally:
        nodes.close()
