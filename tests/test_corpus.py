"""Catches a record that is misread, silently dropped, or refused without naming its file and line."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_pipe.errors import UsageError
from distill_pipe.produce.corpus import corpus_files, read_prompts
from distill_pipe.store.plan import Message, PlannedPrompt
from distill_pipe.store.spec import Responses

USER, ASSISTANT = Message("user", "What is 2 + 2?"), Message("assistant", "4")
CHAT = {"messages": [{"role": "user", "content": USER.content}, {"role": "assistant", "content": ASSISTANT.content}]}
SHAPES: dict[str, dict[str, object]] = {
    "messages": CHAT,
    "conversations": {"conversations": [{"from": "human", "value": USER.content}, {"from": "gpt", "value": "4"}]},
    "prompt": {"prompt": USER.content, "completion": "4"},
    "prompt list": {"prompt": CHAT["messages"][:1], "completion": [{"role": "assistant", "content": "4"}]},
    "nulls beside": {"messages": None, "conversations": None, "prompt": USER.content, "completion": "4"},
}


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(data)
    return pa.compress(data, codec="zstd", asbytes=True) if suffix.endswith(".zst") else data


def write(path: Path, records: Sequence[object]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path)
    else:
        path.write_bytes(compressed("".join(json.dumps(r) + "\n" for r in records).encode(), path.name))
    return path


def read(*paths: object, responses: Responses = "corpus", limit: int | None = None) -> list[PlannedPrompt]:
    return list(read_prompts([str(path) for path in paths], responses, limit))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_record_reads_alike_from_every_kind_of_file(tmp_path: Path, shape: str, suffix: str) -> None:
    path = write(tmp_path / f"c{suffix}", [SHAPES[shape]] * 3)
    prompts = read(path)
    assert [p.ordinal for p in prompts] == [0, 1, 2]
    assert {p.messages for p in prompts} == {(USER, ASSISTANT)}
    assert {p.messages for p in read(path, responses="target")} == {(USER,)}


def test_systems_tools_and_several_turns_are_kept_in_order(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("tool", "{}"), ("developer", "x"),
             ("user", "Bye")]
    records = [{"messages": [{"role": r, "content": c} for r, c in turns]}]
    (prompt,) = read(write(tmp_path / "c.jsonl", records), responses="target")
    assert [(m.role, m.content) for m in prompt.messages] == turns


def test_every_name_of_a_sharegpt_speaker_is_known(tmp_path: Path) -> None:
    names = {"system": "system", "human": "user", "gpt": "assistant", "user": "user", "chatgpt": "assistant",
             "observation": "tool", "tool": "tool", "bing": "assistant", "bard": "assistant", "assistant": "assistant"}
    record = {"conversations": [{"from": name, "value": "x"} for name in names]}
    (prompt,) = read(write(tmp_path / "c.jsonl", [record]))
    assert [m.role for m in prompt.messages] == list(names.values())


def test_trailing_assistant_turns_are_cut_when_the_target_writes_the_response(tmp_path: Path) -> None:
    turns = [*CHAT["messages"], {"role": "user", "content": "Sure?"}, *[CHAT["messages"][1]] * 2]
    path = write(tmp_path / "c.jsonl", [{"messages": turns}])
    assert [m.role for m in read(path, responses="target")[0].messages] == ["user", "assistant", "user"]
    assert [m.role for m in read(path)[0].messages] == ["user", "assistant", "user", "assistant", "assistant"]


def test_blank_lines_are_skipped_and_ordinals_run_on_over_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", write(tmp_path / "b.parquet", [{"prompt": "c"}, {"prompt": "d"}])
    first.write_text('\n{"prompt": "a"}\n\n   \n{"prompt": "b"}')
    prompts = read(first, second, responses="target")
    assert [(p.ordinal, p.messages[0].content) for p in prompts] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


@pytest.mark.parametrize(("limit", "number"), [(1, 1), (3, 3), (4, 4), (99, 4), (None, 4)])
def test_a_limit_takes_the_first_prompts_over_all_files(tmp_path: Path, limit: int | None, number: int) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", [{"prompt": f"{i}{j}"} for j in range(2)]) for i in range(2)]
    texts = [p.messages[0].content for p in read(*paths, responses="target", limit=limit)]
    assert texts == ["00", "01", "10", "11"][:number]


def test_what_lies_beyond_the_limit_is_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "fine"}\nnot json\n')
    assert len(read(path, responses="target", limit=1)) == 1


def test_ids_come_from_the_record_or_from_its_content(tmp_path: Path) -> None:
    records = [{"id": "x", "prompt": "a"}, {"id": 7, "prompt": "a"}, {"prompt_id": "y", "prompt": "a"},
               {"id": None, "prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}]
    ids = [p.prompt_id for p in read(write(tmp_path / "c.jsonl", records), responses="target")]
    assert ids[:3] == ["x", "7", "y"]
    assert ids[3] == ids[4] == hashlib.sha256(b"user\0a\0").hexdigest()[:16]
    assert ids[5] != ids[4]


def test_domains_are_kept_and_must_be_text(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"prompt": "a", "domain": "maths"}, {"prompt": "b"}])
    assert [p.domain for p in read(path, responses="target")] == ["maths", None]
    with pytest.raises(UsageError, match=r"c\.jsonl:1: `domain` is not text"):
        read(write(tmp_path / "c.jsonl", [{"prompt": "a", "domain": 3}]), responses="target")


BAD_RECORDS: list[tuple[str, str]] = [
    ("not json", "is not JSON"),
    ('{"prompt": "a"', "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[1, 2]", "not an object"),
    ('"text"', "not an object"),
    ("{}", "none of the fields `messages`, `conversations`, `prompt`"),
    ('{"text": "hello"}', "none of the fields"),
    ('{"prompt": ""}', "the prompt is empty"),
    ('{"prompt": " \\n"}', "the prompt is empty"),
    ('{"prompt": []}', "`prompt` must be a list of at least one turn"),
    ('{"messages": []}', "`messages` must be a list of at least one turn"),
    ('{"messages": "hello"}', "`messages` must be a list"),
    ('{"messages": ["hello"]}', "`messages` must be a list"),
    ('{"conversations": [3]}', "`conversations` must be a list"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "the prompt is empty"),
    ('{"messages": [{"role": "system", "content": "x"}]}', "the prompt is empty"),
    ('{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": " "}]}', "last turn .* is empty"),
    ('{"messages": [{"role": "king", "content": "x"}]}', "unknown role; known are assistant, developer, system"),
    ('{"messages": [{"content": "x"}]}', "unknown role"),
    ('{"conversations": [{"from": "alien", "value": "x"}]}', "unknown role"),
    ('{"messages": [{"role": "user", "content": null}]}', "content is not text"),
    ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "content is not text"),
    ('{"prompt": 3}', "`prompt` must be a list"),
    ('{"prompt": "a", "completion": []}', "`completion` must be a list"),
    ('{"prompt": "a", "completion": [{"content": "x"}, {"content": "y"}]}', "`completion` must be one assistant turn"),
    ('{"prompt": "\\ud800"}', "not valid Unicode"),
]


@pytest.mark.parametrize(("line", "text"), BAD_RECORDS)
def test_a_record_that_cannot_be_used_is_refused_with_file_and_line(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=rf"c\.jsonl:3: .*{text}"):
        read(path, responses="target")


def test_a_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    records = [{"prompt": "a"}] * 1500 + [{"prompt": " "}]
    with pytest.raises(UsageError, match=r"c\.parquet: row 1501: the prompt is empty"):
        read(write(tmp_path / "c.parquet", records), responses="target")


def test_a_conversation_without_a_response_cannot_be_scored(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [SHAPES["messages"], {"prompt": "a"}])
    with pytest.raises(UsageError, match=r"c\.jsonl:2: there is no response to score; .*--responses target"):
        read(path)


@pytest.mark.parametrize("name", ["c.csv", "c.txt", "c.jsonl.bz2", "jsonl"])
def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match=rf"{name}: unknown kind of file; known are \.jsonl, .*\.parquet"):
        corpus_files([tmp_path / name])


def test_missing_empty_and_folder_corpora_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder.jsonl").mkdir()
    for name, text in (("gone.jsonl", "there is no such file"), ("empty.jsonl", "the file is empty"),
                       ("folder.jsonl", "this is a folder; give the files in it")):
        with pytest.raises(UsageError, match=f"{name}: {text}"):
            corpus_files([tmp_path / name])


def test_a_corpus_file_is_known_by_its_content_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    a, b = (write(folder / "c.jsonl", [{"prompt": "a"}]) for folder in (tmp_path, tmp_path / "other"))
    assert corpus_files([a]) == corpus_files([b])
    assert corpus_files([a])[0].sha256 == hashlib.sha256(a.read_bytes()).hexdigest()


BIG = [{"prompt": hashlib.sha256(bytes([i % 256, i // 256])).hexdigest()} for i in range(5000)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("cut", [1, 100, 0.5])
def test_a_truncated_file_is_refused_and_never_read_as_a_shorter_one(tmp_path: Path, suffix: str, cut: float) -> None:
    path = write(tmp_path / f"c{suffix}", BIG)
    data = path.read_bytes()
    path.write_bytes(data[:-int(cut if cut >= 1 else len(data) * cut)])
    with pytest.raises(UsageError, match=rf"c{suffix} cannot be read"):
        read(path, responses="target")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_is_not_of_its_kind_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_text('{"prompt": "a"}\n' * 20)
    with pytest.raises(UsageError, match=rf"c{suffix} cannot be read"):
        read(path, responses="target")


def test_a_damaged_gzip_stream_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl.gz", BIG)
    data = bytearray(path.read_bytes())
    for at in (20, len(data) // 2, len(data) - 6):
        damaged = data.copy()
        damaged[at:at + 4] = b"\xff\xff\xff\xff"
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"c\.jsonl\.gz"):
            read(path, responses="target")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_files_of_several_compressed_members_are_read_to_their_end(tmp_path: Path, suffix: str) -> None:
    parts = [compressed(b'{"prompt": "%d"}\n' % i, suffix) for i in range(3)]
    (tmp_path / f"c{suffix}").write_bytes(b"".join(parts))
    assert [p.messages[0].content for p in read(tmp_path / f"c{suffix}", responses="target")] == ["0", "1", "2"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"c{suffix}").write_bytes(compressed(b'{"prompt": "caf\xe9"}\n', suffix))
    with pytest.raises(UsageError, match=rf"c{suffix} cannot be read: 'utf-8' codec"):
        read(tmp_path / f"c{suffix}", responses="target")


def test_text_beyond_ascii_is_read_as_it_is_and_line_separators_do_not_cut_records(tmp_path: Path) -> None:
    text = "naïve \u2028 日本 🙂 \x85 end"
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path, responses="target")[0].messages == (Message("user", text),)
