"""Whole machines that go: a Ray cluster of three nodes on this one, which are killed, frozen, drained and added.

What is lost of a node's work is done again elsewhere, and blames no prompt. `make test` loses one node.
"""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fakes import assert_same_rows, assert_whole, fake_job, quarantined, questions, run_here
from runs import prompt_records, write_corpus

from distill_pipe.produce.replica import ORPHAN_SECONDS
from faults.jobs import CLUSTER_ENV, Nodes, RunningJob, cluster, commits, running

# Clusters of three machines start slowly on two cores, and a slow start is no fault.
pytestmark = [pytest.mark.ray, pytest.mark.faults]
PROMPTS = 120


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_here(fake_job(folder, "out", prompts=questions(PROMPTS)))
    return folder / "out"


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with cluster(3, "0.06") as found:
        yield found


def on_nodes(nodes: Nodes, undisturbed: Path, out: Path) -> AbstractContextManager[RunningJob]:
    return running(undisturbed.with_name("c.jsonl"), out, "--workers", 3, "--set", f"address={nodes.address}",
                   "--log-json", out.with_name("log.jsonl"), env=CLUSTER_ENV)


def events(out: Path, name: str) -> list[dict[str, object]]:
    lines = out.with_name("log.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


def wait_for_engines(job: RunningJob, nodes: Nodes, count: int = 3) -> None:
    job.wait_for(lambda: len(nodes.engines()) >= count)


def assert_kept(out: Path, undisturbed: Path) -> None:
    assert quarantined(out) == []
    assert_whole(out, PROMPTS)
    assert_same_rows(out, undisturbed)


def test_f20_a_node_that_is_killed_gives_its_shards_back_and_another_joins(nodes, undisturbed, tmp_path,
                                                                           fault_row) -> None:
    out = tmp_path / "out"
    with on_nodes(nodes, undisturbed, out) as job:
        wait_for_engines(job, nodes)
        job.wait_for_commits(out, 2)
        nodes.tell("lose 0")
        lost = time.monotonic()
        nodes.tell("add")
        job.end()
        seconds = time.monotonic() - lost
    assert_kept(out, undisturbed)
    [event] = events(out, "engine_lost")
    # The end of an actor may reach the driver before that of its machine; then its shards are tried alone.
    assert event["class"] in ("infra", "engine")
    assert len(events(out, "engine_started")) >= 4
    fault_row("F20 SIGKILL of a node", 1, 1, seconds=seconds)


@pytest.mark.faults
def test_f21_a_node_that_is_drained_gets_no_more_work(nodes, undisturbed, tmp_path, fault_row) -> None:
    out = tmp_path / "out"
    with on_nodes(nodes, undisturbed, out) as job:
        wait_for_engines(job, nodes)
        job.wait_for_commits(out, 2)
        nodes.tell("drain 0")
        job.end()
    assert_kept(out, undisturbed)
    [event] = events(out, "engine_lost")
    assert event["class"] == "infra"
    fault_row("F21 a node drained with three seconds' notice", 1, 1)


@pytest.mark.faults
def test_f24_a_node_cut_off_until_it_counts_as_dead_comes_back_to_find_its_work_done(nodes, undisturbed, tmp_path,
                                                                                     fault_row) -> None:
    out = tmp_path / "out"
    with on_nodes(nodes, undisturbed, out) as job:
        wait_for_engines(job, nodes)
        job.wait_for_commits(out, 2)
        nodes.tell("freeze 0")
        job.end()
        done = commits(out)
        nodes.tell("wake 0")
        time.sleep(10)
    assert commits(out) == done
    assert_kept(out, undisturbed)
    fault_row("F24 a node cut off until it counts as dead, then back", 1, 1)


@pytest.mark.faults
def test_f26_when_the_head_dies_engines_end_by_themselves_and_a_new_cluster_continues(nodes, undisturbed, tmp_path,
                                                                                      fault_row) -> None:
    out = tmp_path / "out"
    with on_nodes(nodes, undisturbed, out) as job:
        wait_for_engines(job, nodes)
        job.wait_for_commits(out, 2)
        nodes.tell("behead")
        beheaded = time.monotonic()
        job.process.wait(ORPHAN_SECONDS + 120)
        assert job.process.returncode != 0
        assert "Traceback" not in job.says(), job.says()
        while nodes.engines():
            assert time.monotonic() < beheaded + 2 * ORPHAN_SECONDS
            time.sleep(1)
    with cluster(2) as heirs, on_nodes(heirs, undisturbed, out) as job:
        job.end()
    assert_kept(out, undisturbed)
    fault_row("F26 the cluster's head is killed", 1, 1, seconds=time.monotonic() - beheaded)


@pytest.mark.faults
@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_f20_a_node_killed_in_the_middle_of_a_run_of_the_real_engine(tmp_path, fault_row) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records([f"Write {n} words about {n}." for n in range(40)]))
    settings = ("--target", "smollm2-135m", "--layers", "2,30", "--set", "sampling.max_tokens=16", "--set",
                "prompts_per_shard=2", "--set", "engine.max_num_seqs=4", "--set",
                "engine.kv_cache_memory_bytes=268435456")
    out = tmp_path / "out"
    with cluster(2) as found, running(corpus, out, "--workers", 2, "--set", f"address={found.address}", "--log-json",
                                      out.with_name("log.jsonl"), env=CLUSTER_ENV, settings=settings) as job:
        job.wait_for_commits(out, 3)
        wait_for_engines(job, found, 2)
        found.tell("lose 0")
        job.process.wait(900)
        assert job.process.returncode == 0, job.says()
    assert_whole(out, 40)
    [event] = events(out, "engine_lost")
    assert event["class"] in ("infra", "engine")
    fault_row(f"F20 SIGKILL of a node under the real engine, which held {event['shards']} shards", 1, 1)
