"""Jobs for a cluster that is elsewhere: one name for one job however often it is submitted, and no job that would find
its paths missing there.
"""

from pathlib import Path

import pytest
from fakes import job_file
from hypothesis import given
from hypothesis import strategies as st
from runs import command, write_corpus

from distill_pipe.errors import ClusterError, UsageError
from distill_pipe.produce.submission import RUNNING, next_name, read_submission


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
