"""Whole runs of a fake target into an S3 server that misbehaves: in this process, and by the command line on Ray.

Catches a failure of the store that a worker reports as a bug of its engine, that ends a run which could wait, or that
leaves rows which an undisturbed run would not have made.
"""

import itertools
from pathlib import Path

import pytest
from fakes import SETTINGS, assert_same_rows, fake_job, questions, run_here
from msgspec.structs import replace
from runs import command, prompt_records, write_corpus

from distill_pipe.store.root import open_root
from distill_pipe.store.verify import verify
from faults.proxy import Fault, Head

PROMPTS = 24


def generate(tmp_path: Path, out: str) -> tuple[int, str]:
    corpus = write_corpus(tmp_path / "corpus.jsonl", prompt_records(questions(PROMPTS)))
    done = command("generate", "--corpus", corpus, "--out", out, *SETTINGS)
    return done.returncode, done.stderr


def copied(folder: str, to: Path) -> Path:
    """A dataset of an object store as a folder."""
    root = open_root(folder)
    for name in ("data", "hidden_states"):
        for entry in root.entries(name):
            (to / entry.name).parent.mkdir(parents=True, exist_ok=True)
            with root.fetched(entry.name) as path:
                (to / entry.name).write_bytes(path.read_bytes())
    return to


def assert_whole(folder: str) -> None:
    report = verify(open_root(folder), deep=True)
    assert report.clean, report
    assert report.traces == PROMPTS, report


@pytest.mark.matrix
def test_a_run_into_a_store_that_fails_at_times_is_the_run_into_a_folder(tmp_path, proxy, seaweed, fault_row) -> None:
    folder, faults = seaweed.new_folder(), itertools.cycle(["throttle", "lose answer", "error", "reset", "cut answer"])
    count = itertools.count(1)
    proxy.rule = lambda _: next(faults) if next(count) % 3 == 0 else None
    job = fake_job(tmp_path, "plain", prompts=questions(PROMPTS))
    run_here(replace(job, out=folder))
    injections = sum(proxy.faults.values())
    proxy.rule = lambda _: None
    assert injections > 15
    assert_whole(folder)
    run_here(job)
    assert_same_rows(copied(folder, tmp_path / "copy"), Path(job.out))
    fault_row("F08, F10, F12 a third of all requests of a run fail", injections, injections)


@pytest.mark.ray
@pytest.mark.faults
def test_f11_a_key_that_expires_ends_a_run_with_6_and_a_new_one_goes_on(tmp_path, proxy, seaweed, fault_row) -> None:
    folder, commits = seaweed.new_folder(), itertools.count(1)

    def rule(head: Head) -> Fault | None:
        expired = head.creates and "/data/" in head.target and next(commits) > 2
        return "expire" if expired else None

    proxy.rule = rule
    code, err = generate(tmp_path, folder)
    assert code == 6, err
    assert "ExpiredToken" in err.splitlines()[-1]
    assert "Traceback" not in err
    proxy.rule = lambda _: None
    assert generate(tmp_path, folder)[0] == 0
    assert_whole(folder)
    fault_row("F11 key expires in the middle of a run on Ray", 1, 1)
