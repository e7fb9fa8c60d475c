"""Catches a run that ends well and leaves a dataset of nothing. Single prompts that cannot be used are quarantined."""

from pathlib import Path

import pytest
from runs import command, prompt_records, write_corpus

from distill_pipe.produce import generate
from distill_pipe.produce.job import load_job


def chat(weight: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": weight}]}


def test_given_responses_of_which_none_is_supervised_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    corpus, out = write_corpus(tmp_path / "c.jsonl", [chat(0), chat(0)]), tmp_path / "out"
    done = command("generate", "--target", "fake", "--responses", "corpus", "--corpus", corpus, "--out", out)
    assert done.returncode == 2
    assert done.stderr == ("error: none of 2 conversations has a token to supervise (the first: no token of the "
                           "conversation belongs to the assistant); see to `weight` and `supervised` of the "
                           "assistant's turns, and to max_model_len\n")
    assert not out.exists() or not list(out.iterdir())


class StartedError(Exception):
    """The run would begin now."""


def test_one_supervised_response_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise StartedError

    monkeypatch.setattr(generate, "freeze", start)
    corpus = write_corpus(tmp_path / "c.jsonl", [chat(0), chat(0), chat(1)])
    job = load_job(None, ["responses=corpus"], {"target": "fake", "corpus": str(corpus), "out": str(tmp_path / "out")})
    with pytest.raises(StartedError):
        generate.generate(job, lambda *_: None, lambda _: None)


@pytest.mark.ray
def test_a_run_that_gave_up_on_every_prompt_says_so_each_time(tmp_path: Path) -> None:
    corpus, out = write_corpus(tmp_path / "c.jsonl", prompt_records(["far too long " * 20] * 3)), tmp_path / "out"
    for _ in range(2):
        done = command("generate", "--target", "fake", "--corpus", corpus, "--out", out, "--json", "--set",
                       "max_model_len=128", "--set", "prompts_per_shard=2")
        assert (done.returncode, done.stdout) == (3, "")
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"error: {out} holds nothing to train on: all 3 prompts were given up on (the first: ")
        assert last.endswith("tokens do not fit the context length of 128)")
