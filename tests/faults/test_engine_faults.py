"""The same faults on the real engine, fewer of them: a start takes a quarter of a minute. See also `test_faults`, which
kills it at random moments, and `test_node_faults`."""

import os
from pathlib import Path

import pytest
from fakes import assert_whole, quarantined
from runs import prompt_records, write_corpus

from faults.jobs import running

pytestmark = [pytest.mark.engine, pytest.mark.faults]
TESTS = Path(__file__).parents[1]
SETTINGS = ("--target", "smollm2-135m", "--layers", "2,30", "--set", "sampling.max_tokens=8", "--set",
            "prompts_per_shard=2", "--set", "engine.max_num_seqs=4", "--set", "max_model_len=256")


@pytest.mark.timeout(1200)
def test_f30_a_prompt_that_kills_the_real_engine_is_found_and_every_other_is_kept(tmp_path, fault_row) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", prompt_records([f"Count to {n}." for n in range(8)]))
    path = os.pathsep.join([str(TESTS / "faults" / "poisoned_engine"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    with running(corpus, tmp_path / "out", settings=SETTINGS,
                 env={"POISONOUS_ORDINALS": "5", "PYTHONPATH": path}) as job:
        job.process.wait(900)
        assert job.process.returncode == 0, job.says()
        job.wait_until_gone()
    assert quarantined(tmp_path / "out") == [5]
    assert_whole(tmp_path / "out", 8, 1)
    fault_row("F30 a prompt that kills the real engine", 1, 1)
