"""F52: half an hour of everything at once. Workers, drivers and nodes are killed, engines stop for a while, and the
store throttles; run after run, every dataset must be whole and the same as an undisturbed one.

`make soak`; DISTILL_PIPE_SOAK_SECONDS says how long (1800).
"""

import os
import random
import time
from collections import Counter

import psutil
import pytest
from fakes import fake_job, questions, run_here

from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.manifest import require_run, shard_name
from distill_pipe.store.root import open_root
from distill_pipe.store.shard import read_main
from distill_pipe.store.verify import verify
from faults.jobs import CLUSTER_ENV, Nodes, RunningJob, cluster, killed, running, until
from faults.proxy import Fault, Head, Proxy
from faults.seaweed import Seaweed

pytestmark = [pytest.mark.ray, pytest.mark.soak]
PROMPTS, PER_SHARD, WORKERS = 1200, 4, 3
SECONDS = float(os.environ.get("DISTILL_PIPE_SOAK_SECONDS", "1800"))


class Weather:
    """What goes wrong, one thing every few seconds."""

    def __init__(self, nodes: Nodes, proxy: Proxy, luck: random.Random) -> None:
        self._nodes, self._proxy, self._luck = nodes, proxy, luck
        self._alive, self._throttled_until = list(range(nodes.count)), 0.0
        self.done: Counter[str] = Counter()
        proxy.rule = self._throttle

    def strike(self, job: RunningJob) -> None:
        time.sleep(self._luck.uniform(1, 9))
        what = self._luck.choice(["worker", "worker", "worker", "stop", "node", "throttle", "driver"])
        engines = self._nodes.engines()
        if what in ("worker", "stop") and not engines:
            return
        if what == "worker":
            killed(self._luck.choice(engines))
        elif what == "stop":
            self._pause(self._luck.choice(engines))
        elif what == "node":
            self._lose_node()
        elif what == "throttle":
            self._throttled_until = time.monotonic() + self._luck.uniform(2, 8)
        else:
            job.kill_driver()
        self.done[what] += 1

    def _pause(self, engine: psutil.Process) -> None:
        try:
            engine.suspend()
            time.sleep(self._luck.uniform(0.5, 3))
            engine.resume()
        except psutil.NoSuchProcess:
            return

    def _lose_node(self) -> None:
        victim = self._alive.pop(self._luck.randrange(len(self._alive)))
        self._nodes.tell(f"lose {victim}")
        self._alive.append(self._nodes.count)
        self._nodes.count += 1
        self._nodes.tell("add")

    def _throttle(self, _head: Head) -> Fault | None:
        """Half of all requests, for a while."""
        return "throttle" if time.monotonic() < self._throttled_until and self._luck.random() < 0.5 else None


@pytest.mark.timeout(SECONDS + 1800)
def test_f52_half_an_hour_of_kills_lost_nodes_pauses_and_throttling(tmp_path, seaweed: Seaweed, proxy: Proxy,
                                                                    fault_row) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    run_here(fake_job(tmp_path, "calm", prompts=questions(PROMPTS)))
    calm = all_rows(str(tmp_path / "calm"))
    ends, outs = time.monotonic() + SECONDS, [seaweed.new_folder()]
    with cluster(WORKERS) as nodes:
        weather = Weather(nodes, proxy, random.Random(seed))
        while time.monotonic() < ends or not finished(outs[-1]):
            if finished(outs[-1]):
                outs.append(seaweed.new_folder())
            with running(tmp_path / "c.jsonl", outs[-1], "--workers", WORKERS, "--set",
                         f"address={nodes.address}", env=CLUSTER_ENV) as job:
                while job.alive and time.monotonic() < ends:
                    weather.strike(job)
                job.end(0, 7, -9)
                until(lambda: not nodes.engines())
    proxy.rule = lambda _: None
    given_up = sum(assert_kept(out, calm) for out in outs)
    injections = sum(weather.done.values())
    # Two accidents that hit the same lone prompt look like poison.
    assert given_up <= injections // 20
    print(f"{SECONDS:.0f} s, {len(outs)} datasets of {PROMPTS} prompts, {dict(weather.done)}, {given_up} quarantined")
    what = ", ".join(f"{count} {name}" for name, count in sorted(weather.done.items()))
    fault_row(f"F52 soak: {what}", injections, injections)


def finished(out: str) -> bool:
    return len(committed_shards(open_root(out))) == PROMPTS // PER_SHARD


def all_rows(out: str) -> dict[int, tuple[object, ...]]:
    """Every stored number of a dataset's main shards, by ordinal."""

    root = open_root(out)
    run, rows = require_run(root), {}
    for shard in committed_shards(root):
        fragment = shard_fragment(root, run, shard)
        with root.fetched(shard_name(shard), fragment.file.size) as path:
            for row in read_main(path, fragment.info, run.spec.capture).to_pylist():
                rows[row["ordinal"]] = tuple(map(str, row.values()))
    return rows


def assert_kept(out: str, calm: dict[int, tuple[object, ...]]) -> int:
    """Nothing lost, doubled or changed; returns how many prompts were given up on."""
    report = verify(open_root(out))
    assert report.clean, report
    assert report.traces + report.quarantined == PROMPTS
    rows = all_rows(out)
    assert rows == {ordinal: calm[ordinal] for ordinal in rows}
    return report.quarantined
