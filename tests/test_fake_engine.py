"""Catches a fake engine whose rows depend on anything but target and prompt, or that takes another path than the real
one. The engine runs in this process; whole runs of it are in tests/faults."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import SETTINGS, assert_same_rows, assert_whole, fake_job, run_here, stored_rows
from hypothesis import given
from hypothesis import strategies as st
from runs import command, stored_traces, write_corpus

from distill_pipe.errors import EngineError, UsageError
from distill_pipe.produce import generate
from distill_pipe.produce.chat import Renderer
from distill_pipe.produce.fake_target import (
    END,
    ByteRenderer,
    draw,
    logits_of,
    prefix_hashes,
    prefix_sum,
    states_of,
    text_of,
)
from distill_pipe.produce.generate import freeze, prepare
from distill_pipe.produce.job import load_job
from distill_pipe.produce.targets import resolve_target
from distill_pipe.store.plan import Message, PlannedPrompt, write_plan_part
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import read_quarantine
from distill_pipe.store.spec import SamplingSpec

V, H = 259, 16


# The target


@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=40), st.data())
def test_a_position_knows_all_tokens_before_it_and_none_after(tokens: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(tokens)))
    whole = prefix_hashes(tokens)
    np.testing.assert_array_equal(whole[:cut], prefix_hashes(tokens[:cut]))
    np.testing.assert_array_equal(whole[cut:], prefix_hashes(tokens[cut:], cut, prefix_sum(tokens[:cut])))
    changed = [(tokens[0] + 1) % V, *tokens[1:]]
    assert not (prefix_hashes(changed) == whole).any()


def test_distribution_and_states_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    hashes = prefix_hashes(list(range(50)))
    alone = np.concatenate([logits_of(hashes[i:i + 1], V) for i in range(50)])
    np.testing.assert_array_equal(logits_of(hashes, V), alone)
    np.testing.assert_array_equal(states_of(hashes, (0, 3), H)[1, 7], states_of(hashes[7:8], (3,), H)[0, 0])
    probs = torch.from_numpy(alone).softmax(1)
    entropy = -(probs * probs.log()).sum(1)
    assert 0.5 < float(entropy.mean()) < math.log(V) - 1, "neither certain nor uniform"


@pytest.mark.parametrize(("sampling", "allowed"), [
    (SamplingSpec(temperature=0), 1), (SamplingSpec(top_p=0.4), 20), (SamplingSpec(), V)])
def test_tokens_are_drawn_as_often_as_the_target_says(sampling: SamplingSpec, allowed: int) -> None:
    logits = logits_of(prefix_hashes([5]), V)[0]
    drawn = [draw(logits, prefix, 3, sampling) for prefix in prefix_hashes(list(range(200)) * 20)]
    assert len(set(drawn)) <= allowed
    if sampling == SamplingSpec():
        probs = torch.from_numpy(logits).softmax(0).numpy()
        shares = np.bincount(drawn, minlength=V) / len(drawn)
        assert 0.5 * np.abs(shares - probs).sum() < 0.1


@pytest.mark.parametrize("responses", ["target", "corpus"])
def test_prompts_become_the_tokens_that_the_folder_s_own_tokenizer_makes(responses: str) -> None:
    conversation = [Message("system", "Be brief."), Message("user", "Grüße <|im_end|> \u4e16\u754c"),
                    Message("assistant", "Hello!\n"), Message("user", "Why?"), Message("assistant", "Because.")]
    theirs = Renderer(resolve_target("fake").folder)
    assert ByteRenderer().render(conversation, responses) == theirs.render(conversation, responses)
    assert "Grüße" in text_of(ByteRenderer().render(conversation, "target").token_ids_T)


# The engine


def test_rows_are_the_same_in_any_order_and_batch(tmp_path: Path) -> None:
    run_here(fake_job(tmp_path, "one", "engine.max_num_seqs=1"), [1, 0])
    run_here(fake_job(tmp_path, "many", "engine.max_num_seqs=8"))
    assert_whole(tmp_path / "one", 8)
    assert_same_rows(tmp_path / "one", tmp_path / "many")


def test_the_stored_trace_is_what_the_target_says(tmp_path: Path) -> None:
    run_here(fake_job(tmp_path, "out", "capture.logprob_bits=24", "capture.hidden_codec=f32", "capture.layers=[1, 3]"))
    for trace in stored_traces(tmp_path / "out"):
        hashes = prefix_hashes(trace.token_ids_T[:-1].tolist())
        logprobs = torch.from_numpy(logits_of(hashes[trace.positions_R], V)).log_softmax(1)
        next_R1 = torch.from_numpy(trace.token_ids_T[trace.positions_R + 1].astype(np.int64))[:, None]
        np.testing.assert_allclose(trace.next_logprob_R, logprobs.gather(1, next_R1)[:, 0].numpy(), atol=1e-5)
        np.testing.assert_array_equal(trace.hidden[3], states_of(hashes, (3,), H)[0])
        assert (trace.finish_reason == "stop") == (trace.token_ids_T[-1] == END)


def test_given_responses_are_scored(tmp_path: Path) -> None:
    job = fake_job(tmp_path, "out")
    records = [{"prompt": f"Count to {n}.", "completion": "one, two"} for n in range(5)]
    write_corpus(tmp_path / "c.jsonl", records)
    run_here(load_job(None, ("responses=corpus", "capture.layers=[]", "prompts_per_shard=4"),
                      {"target": "fake", "corpus": job.corpus, "out": job.out}))
    assert_whole(tmp_path / "out", 5)
    assert set(stored_rows(tmp_path / "out")) == {"data"}
    assert [t.finish_reason for t in stored_traces(tmp_path / "out")] == ["given"] * 5


def test_marked_prompts_do_harm_only_where_a_test_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["[fault:refuse] a", "b", "[fault:nan] c", "d"]
    run_here(fake_job(tmp_path, "calm", prompts=prompts))
    assert_whole(tmp_path / "calm", 4)
    monkeypatch.setenv("DISTILL_PIPE_FAKE_FAULTS", "1")
    run_here(fake_job(tmp_path, "harmed", prompts=prompts))
    assert_whole(tmp_path / "harmed", 4, given_up=2)
    [file] = (tmp_path / "harmed" / "_quarantine").rglob("*.parquet")
    assert [(p.ordinal, p.code) for p in read_quarantine(file, 2)] == [(0, "engine"), (2, "not_finite")]
    with pytest.raises(EngineError, match="a prompt asked for it"):
        run_here(fake_job(tmp_path, "dead", prompts=["[fault:raise]"]))


def test_a_fake_target_has_a_forecast_and_shows_its_traces(tmp_path: Path) -> None:
    run_here(fake_job(tmp_path, "out"))
    done = command("inspect", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    done = command("plan", "--corpus", tmp_path / "c.jsonl", "--out", tmp_path / "other", *SETTINGS)
    assert done.returncode == 0, done.stderr


def test_a_corpus_that_changes_while_it_is_planned_is_refused_and_starts_no_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = fake_job(tmp_path, "out")

    def write_and_append(path: Path, shards: Iterable[Sequence[PlannedPrompt]]) -> None:
        write_plan_part(path, shards)
        with open(job.corpus_files[0], "a") as file:
            file.write(json.dumps({"prompt": "One more?"}) + "\n")

    monkeypatch.setattr(generate, "write_plan_part", write_and_append)
    _, spec = prepare(job)
    with pytest.raises(UsageError, match="the corpus changed while it was read"):
        freeze(LocalRoot(job.out), spec, job)
    assert not (tmp_path / "out" / "run.json").exists()
    monkeypatch.undo()
    run, _ = run_here(job)
    assert run.spec.corpus.prompts == 9
