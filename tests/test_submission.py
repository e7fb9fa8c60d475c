"""Jobs on a cluster that is elsewhere: one name for one job however often it is submitted, and on a real Ray cluster
the whole way from a job file to its dataset, its failure, and its end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import command, succeed, write_corpus

from distill_pipe.errors import ClusterError, UsageError
from distill_pipe.produce.job_server import JobServer
from distill_pipe.produce.submission import RUNNING, next_name, read_submission
from distill_pipe.store.root import open_root
from distill_pipe.store.verify import verify


def job_file(folder: Path, name: str = "job.yaml", **fields: object) -> Path:
    plain = {"target": "fake", "corpus": str(folder / "c.jsonl"), "out": str(folder / "out"),
             "sampling": {"max_tokens": 8}, "prompts_per_shard": 4} | fields
    path = folder / name
    path.write_text(json.dumps(plain))
    return path


def test_a_job_has_one_name_whatever_it_runs_on_and_another_for_other_data(tmp_path: Path) -> None:
    name = read_submission(job_file(tmp_path), ()).name
    assert read_submission(job_file(tmp_path, "again.yaml", workers=4, address="10.0.0.1:6379"), ()).name == name
    assert read_submission(job_file(tmp_path), ["engine.max_num_seqs=2"]).name == name
    for other in ({"out": "/data/other"}, {"limit": 3}, {"sampling": {"max_tokens": 9}}, {"corpus": "s3://b/c.jsonl"}):
        assert read_submission(job_file(tmp_path, "other.yaml", **other), ()).name != name


def test_the_command_takes_the_file_with_its_settings_quoted(tmp_path: Path) -> None:
    job = read_submission(job_file(tmp_path), ["sampling.top_p=0.9", "out=/a b;rm -rf"])
    assert job.entrypoint == ("python -m distill_pipe.cli generate --job job.yaml --set sampling.top_p=0.9 --set "
                              "'out=/a b;rm -rf' --set address=auto")


@pytest.mark.parametrize("fields", [{"out": "out"}, {"out": "./out"}])
def test_a_path_that_means_nothing_elsewhere_is_refused(tmp_path: Path, fields) -> None:
    with pytest.raises(UsageError, match="is a path of this machine"):
        read_submission(job_file(tmp_path, **fields), ())


def test_a_corpus_beside_the_job_file_is_refused(tmp_path: Path, monkeypatch) -> None:
    write_corpus(tmp_path / "c.jsonl", [{"prompt": "hello"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"c.jsonl is a path of this machine"):
        read_submission(job_file(tmp_path, corpus="c.jsonl"), ())


@given(st.lists(st.sampled_from((*RUNNING, "STOPPED", "SUCCEEDED", "FAILED")), max_size=6))
def test_a_job_runs_once_at_a_time_and_never_takes_a_name_twice(outcomes) -> None:
    states: dict[str, str] = {"another-job": "RUNNING"}
    for outcome in outcomes:
        name, start = next_name("job", states)
        assert start
        assert name not in states
        states[name] = "RUNNING"
        assert next_name("job", states) == (name, False)
        states[name] = outcome if outcome not in RUNNING else "FAILED"


def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    done = command("submit", job_file(tmp_path), "--address", "http://127.0.0.1:9")
    assert done.returncode == ClusterError.exit_code
    assert "the job server at http://127.0.0.1:9" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real cluster. Each step of its fake engine takes long enough for a job to be met while it runs."""
    log = tmp_path_factory.mktemp("ray") / "log"
    # Tokens are Ray's own matter, and looked for once in a process.
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "DISTILL_PIPE_FAKE_STEP_SECONDS": "0.05",
           "RAY_JOB_STOP_WAIT_TIME_S": "30"}
    with open(log, "w") as stderr:
        process = subprocess.Popen([sys.executable, Path(__file__).with_name("ray_head.py")], env=env, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), log.read_text()
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def ended(server: JobServer, name: str) -> str:
    end = time.monotonic() + 300
    while (state := server.state(name)) in RUNNING:
        assert time.monotonic() < end
        time.sleep(0.2)
    return state


@pytest.mark.ray
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


@pytest.mark.ray
def test_a_job_that_fails_says_why_in_its_log(address: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("{oops\n")
    done = succeed("submit", job_file(tmp_path), "--address", address)
    name = done.stdout.strip()
    server = JobServer(address)
    assert ended(server, name) == "FAILED"
    assert "c.jsonl:1: this line is not JSON" in "".join(server.logs(name, False, time.sleep))
    with pytest.raises(UsageError, match="knows no job"):
        server.state("nobody")


@pytest.mark.ray
def test_a_cancelled_job_ends_and_continues_when_it_is_submitted_again(address: str, tmp_path: Path) -> None:
    write_corpus(tmp_path / "c.jsonl", [{"prompt": f"question {i}"} for i in range(400)])
    server, job = JobServer(address), read_submission(job_file(tmp_path), ())
    name = server.submit(job).id
    end = time.monotonic() + 200
    while not list((tmp_path / "out").rglob("shard-*.parquet")):
        assert time.monotonic() < end, "".join(server.logs(name, False, time.sleep))
        time.sleep(0.05)
    assert "asked to end" in succeed("cancel", name, "--address", address).stderr
    assert ended(server, name) == "STOPPED"
    assert server.submit(job).id == f"{name}-2"
    assert server.stop(f"{name}-2")
    assert ended(server, f"{name}-2") == "STOPPED"
