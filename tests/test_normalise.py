"""Catches a prepared corpus that reads otherwise than the one it was made of, and a file that is left half written."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import command, succeed
from test_corpus import read, write

from distill_pipe.errors import UsageError
from distill_pipe.produce.normalise import prepare_corpus, record_of
from distill_pipe.produce.records import messages_of
from distill_pipe.store.plan import Message, PlannedPrompt

CALL = json.dumps([{"type": "function", "function": {"name": "add", "arguments": {}}}])
RECORDS: list[dict[str, object]] = [
    {"id": "a", "domain": "code", "prompt": "Hi", "completion": "Hello"},
    {"id": "b", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
                             {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": CALL},
                             {"role": "tool", "content": "2", "tool_call_id": "x"},
                             {"role": "assistant", "content": "2."}], "tools": CALL},
    {"id": "c", "conversation": [{"role": "user", "content": "Count."}],
     "generated_message": {"role": "assistant", "content": "1, 2, 3"}, "finish_reason": "length"},
]
SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]


def nothing() -> None:
    """Nobody watches."""


@pytest.mark.parametrize("responses", ["corpus", "target"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_prepared_corpus_reads_as_the_one_it_was_made_of(tmp_path: Path, suffix: str, responses: str) -> None:
    source, out = write(tmp_path / "c.jsonl", RECORDS), tmp_path / "new" / f"out{suffix}"
    found = prepare_corpus([str(source)], out, responses, None, False, nothing)
    assert read(out, responses=responses) == read(source, responses=responses)
    assert (found.prompts, found.domains, found.bytes) == (3, {"-": 2, "code": 1}, out.stat().st_size)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_turns_are_split_so_that_each_is_supervised_once(tmp_path: Path) -> None:
    source, out = write(tmp_path / "c.jsonl", RECORDS[1:2]), tmp_path / "out.jsonl"
    prepare_corpus([str(source)], out, "corpus", None, True, nothing)
    first, second = read(out)
    assert [first.prompt_id, second.prompt_id] == ["b#2", "b#4"]
    assert [m.supervised for m in first.messages] == [True, True, True]
    assert [m.supervised for m in second.messages] == [True, True, False, True, True]
    prepare_corpus([str(source)], out, "target", None, True, nothing)
    assert [[m.role for m in p.messages] for p in read(out, responses="target")] == [
        ["system", "user"], ["system", "user", "assistant", "tool"]]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
messages = st.builds(
    Message, st.just("assistant"), text.filter(str.strip), reasoning_content=st.none() | text.filter(bool),
    tool_calls=st.sampled_from([None, CALL]), name=st.none() | text, supervised=st.booleans(), ended=st.booleans())



@given(st.lists(messages, min_size=1, max_size=4), st.sampled_from([None, CALL]))
def test_any_conversation_survives_being_a_record(turns: list[Message], tools: str | None) -> None:
    given_turns = (Message("user", "?", tools=tools), *turns)
    record = json.loads(json.dumps(record_of(PlannedPrompt(0, "id", None, given_turns))))
    assert messages_of(record, "here") == given_turns


@pytest.mark.parametrize("name", ["out.csv", "out.txt", "out"])
def test_a_name_of_no_known_kind_is_refused_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "c.jsonl", RECORDS)
    with pytest.raises(UsageError, match=rf"--out {name}: end the name in \.jsonl, "):
        prepare_corpus([str(source)], tmp_path / "new" / name, "target", None, False, nothing)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_record_that_cannot_be_used_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    source, out = write(tmp_path / "c.jsonl", [*RECORDS, {"prompt": ""}]), tmp_path / "out.jsonl"
    out.write_text("old")
    done = command("prepare", source, "--out", out)
    assert done.returncode == 2
    assert done.stderr == f"error: {source}:4: the prompt is empty\n"
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "out.jsonl"]


def test_prepare_says_what_it_wrote(tmp_path: Path) -> None:
    source, out = write(tmp_path / "c.jsonl", RECORDS), tmp_path / "out.jsonl.zst"
    facts = json.loads(succeed("prepare", source, "--out", out, "--limit", 2, "--json").stdout)
    assert (facts["prompts"], facts["domains"], facts["file"]) == (2, {"-": 1, "code": 1}, str(out))
    assert len(read(out, responses="target")) == 2
