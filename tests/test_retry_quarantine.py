"""Catches prompts that were given up on and cannot be had again, or come back with other settings than the rest."""

import json
from pathlib import Path

import pytest
from fakes import assert_whole, fake_job, quarantined, run_here
from runs import command, stored_traces, write_corpus

from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.spec import spec_differences

pytestmark = pytest.mark.ray
FAULTS = {"DISTILL_PIPE_FAKE_FAULTS": "1"}
LAID_OUT = ("capture.layers=[1, 4]", "sampling.seed=7", "capture.coverage=0.9", "capture.top_k_max=64",
            "max_model_len=256")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts failed in the engine, and one is too long."""
    folder = tmp_path_factory.mktemp("run")
    texts = ["one", "two [fault:nan]", "three", "four [fault:refuse]", "five " * 200, "six"]
    job = fake_job(folder, "out", *LAID_OUT)
    write_corpus(folder / "c.jsonl", [{"id": f"p{i}", "domain": "numbers", "prompt": text}
                                      for i, text in enumerate(texts)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_PIPE_FAKE_FAULTS", "1")
        run_here(job)
    return folder / "out"


def test_prompts_that_failed_run_again_with_the_same_settings_into_a_dataset_of_their_own(run: Path) -> None:
    again, log = run.with_name("again"), run.with_name("log.jsonl")
    assert quarantined(run) == [1, 3, 4]
    done = command("retry-quarantine", run, "--out", again, "--log-json", log)
    assert done.returncode == 0, done.stderr
    assert_whole(again, 2)
    assert [(t.prompt_id, t.domain) for t in stored_traces(again)] == [("p1", "numbers"), ("p3", "numbers")]
    first, second = (require_run(LocalRoot(root)).spec for root in (run, again))
    assert {line.partition(":")[0].partition(".")[0] for line in spec_differences(first, second)} == {"corpus"}
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert (events[0], events[-1]) == ("run_started", "run_ended")
    # The same command finds its work done.
    done = command("retry-quarantine", run, "--out", again)
    assert "0 of 1 shards made by this call" in done.stderr


@pytest.mark.faults
def test_prompts_that_the_corpus_is_to_blame_for_run_again_when_asked_for(run: Path) -> None:
    everything = run.with_name("everything")
    done = command("retry-quarantine", run, "--all", "--out", everything, "--set", "max_model_len=2048", env=FAULTS)
    assert done.returncode == 3, "two of three fail again, and one may"
    assert "raise max_failed_share" in done.stderr
    assert_whole(everything, 3, 2)


def test_a_run_without_such_prompts_has_nothing_to_run_again(run: Path) -> None:
    again = run.with_name("again")
    done = command("retry-quarantine", again, "--out", run.with_name("nothing"))
    assert done.returncode == 2
    assert "has no quarantined prompt to run again; --all takes those" in done.stderr
    assert not run.with_name("nothing").exists()


def test_status_says_whose_fault_it_was(run: Path) -> None:
    done = command("status", run, "--json")
    assert json.loads(done.stdout)["quarantined_by_blame"] == {"data": 1, "engine": 2}
    assert "1 data, 2 engine" in command("status", run).stdout
