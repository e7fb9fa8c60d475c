"""Jobs on a real Ray cluster that is elsewhere: from a job file to its dataset, to its failure, and to its end."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import job_file
from runs import succeed, write_corpus

from distill_pipe.errors import UsageError
from distill_pipe.produce.job_server import JobServer
from distill_pipe.produce.submission import RUNNING, read_submission
from distill_pipe.store.root import open_root
from distill_pipe.store.verify import verify

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The job server and the metrics of a real cluster. Each step of its fake engine takes long enough for a job to be
    met while it runs."""
    log = tmp_path_factory.mktemp("ray") / "log"
    # Tokens are Ray's own matter, and looked for once in a process.
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "DISTILL_PIPE_FAKE_STEP_SECONDS": "0.05",
           "RAY_JOB_STOP_WAIT_TIME_S": "30", "RAY_metrics_report_interval_ms": "500"}
    with open(log, "w") as stderr:
        process = subprocess.Popen([sys.executable, Path(__file__).with_name("ray_head.py")], env=env, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
    try:
        assert process.stdout is not None
        server, _, metrics = process.stdout.readline().strip().partition(" ")
        assert metrics.startswith("http://"), log.read_text()
        yield server, metrics
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.fixture
def address(cluster: tuple[str, str]) -> str:
    return cluster[0]


def ended(server: JobServer, name: str) -> str:
    end = time.monotonic() + 300
    while (state := server.state(name)) in RUNNING:
        assert time.monotonic() < end
        time.sleep(0.2)
    return state


def test_a_job_file_becomes_a_dataset_and_submitting_it_twice_is_one_job(address: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", [{"prompt": f"question {i}"} for i in range(8)])
    job = read_submission(job_file(tmp_path), ())
    server = JobServer(address)
    first, again = server.submit(job), server.submit(job)
    assert (first.started, again.started) == (True, False)
    assert again.id == first.id == job.name
    followed = succeed("logs", first.id, "--follow", "--address", address)
    assert f"{first.id}: SUCCEEDED" in followed.stderr
    assert "8 traces" in followed.stdout
    assert verify(open_root(str(tmp_path / "out"))).clean
    continued = server.submit(job)
    assert (continued.id, continued.started) == (f"{job.name}-2", True)
    assert ended(server, continued.id) == "SUCCEEDED"


def test_a_job_that_fails_says_why_in_its_log(address: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("{oops\n")
    done = succeed("submit", job_file(tmp_path), "--address", address)
    name = done.stdout.strip()
    server = JobServer(address)
    assert ended(server, name) == "FAILED"
    assert "c.jsonl:1: this line is not JSON" in "".join(server.logs(name, False, time.sleep))
    with pytest.raises(UsageError, match="knows no job"):
        server.state("nobody")


def exported(url: str) -> set[str]:
    """Our metrics, by the names that the dashboard knows."""
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - an address of this machine
        return set(re.findall(r"^(?:ray_)?(distill_pipe_\w+)[{ ]", answer.read().decode(), re.M))


def test_a_cancelled_job_ends_and_continues_when_it_is_submitted_again(cluster: tuple[str, str],
                                                                       tmp_path: Path) -> None:
    address, metrics = cluster
    write_corpus(tmp_path / "c.jsonl", [{"prompt": f"question {i}"} for i in range(400)])
    server, job = JobServer(address), read_submission(job_file(tmp_path), ())
    name = server.submit(job).id
    end = time.monotonic() + 400
    while not list((tmp_path / "out").rglob("shard-*.parquet")):
        assert time.monotonic() < end, "".join(server.logs(name, False, time.sleep))
        time.sleep(0.05)
    drawn = {f"distill_pipe_{name}" for name in ("tokens_total", "prompts_total", "shards_total", "engines",
                                                  "shards_left")}
    while not drawn <= exported(metrics):
        assert time.monotonic() < end, exported(metrics)
        time.sleep(0.2)
    assert "asked to end" in succeed("cancel", name, "--address", address).stderr
    assert ended(server, name) == "STOPPED"
    assert server.submit(job).id == f"{name}-2"
    assert server.stop(f"{name}-2")
    assert ended(server, f"{name}-2") == "STOPPED"
