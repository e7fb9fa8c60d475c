"""Corpora as people have them, read as one kind of record: JSONL (plain, .gz, .zst) and Parquet.

A record holds `messages` (role, content), `conversations` (ShareGPT: from, value), or `prompt` with an optional
`completion`. A plain-string prompt is a user turn. Any record that cannot be understood stops the reading with the
file and line named: silently dropping a prompt would be the worse surprise. Records are streamed, never held at once.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipe.errors import UsageError
from distill_pipe.store.plan import Message, PlannedPrompt
from distill_pipe.store.root import sha256_of
from distill_pipe.store.shard import STRING_BYTES
from distill_pipe.store.spec import CorpusFile, Responses

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                   "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool",
                   "observation": "tool"}
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
Record = dict[str, object]


def corpus_files(paths: Sequence[Path]) -> tuple[CorpusFile, ...]:
    """Name and content hash of each corpus file.

    Raises:
        UsageError: a file is missing, empty, or of a kind that cannot be read.
    """
    files = []
    for path in paths:
        if not path.is_file():
            raise UsageError(f"corpus {path}: there is no such file")
        if path.stat().st_size == 0:
            raise UsageError(f"corpus {path}: the file is empty")
        if not path.name.endswith(_SUFFIXES):
            raise UsageError(f"corpus {path}: unknown kind of file; known are {', '.join(_SUFFIXES)}")
        try:
            files.append(CorpusFile(name=path.name, sha256=sha256_of(path)))
        except OSError as error:
            raise UsageError(f"corpus {path} cannot be read: {error.strerror}") from None
    return tuple(files)


def read_prompts(paths: Sequence[Path], responses: Responses, limit: int | None) -> Iterator[PlannedPrompt]:
    """The corpus as prompts, numbered in order.

    With `responses="target"` trailing assistant turns are cut off, since the target will write its own; with
    `responses="corpus"` each conversation must hold at least one.

    Raises:
        UsageError: a record cannot be used; the message names file and line.
    """
    ordinal = 0
    for path in paths:
        for where, record in _records(path):
            messages = _fit(_messages(record, where), responses, where)
            yield PlannedPrompt(ordinal, _prompt_id(record, messages, where), _domain(record, where), messages)
            ordinal += 1
            if ordinal == limit:
                return


def _records(path: Path) -> Iterator[tuple[str, Record]]:
    if path.name.endswith(".parquet"):
        yield from _parquet_records(path)
        return
    with _open_text(path) as lines:
        for number, line in enumerate(_lines(lines, path), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: this line is not JSON ({error})") from None
            if not isinstance(record, dict):
                raise UsageError(f"{where}: this line is JSON but not an object")
            yield where, record


def _lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise UsageError(f"corpus {path} cannot be read: {error}") from None


def _open_text(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    if path.name.endswith(".zst"):
        # Arrow's reader, because the zstandard package takes a truncated file for a complete one.
        return io.TextIOWrapper(pa.input_stream(str(path), compression="zstd"), encoding="utf-8")
    return open(path, encoding="utf-8")


def _parquet_records(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        with pq.ParquetFile(path, arrow_extensions_enabled=False) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", record
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"corpus {path} cannot be read: {error}") from None


def _messages(record: Record, where: str) -> tuple[Message, ...]:
    if record.get("messages") is not None:
        turns = _turns(record["messages"], "messages", where)
        return tuple(_message(turn.get("role"), turn.get("content"), where) for turn in turns)
    if record.get("conversations") is not None:
        turns = _turns(record["conversations"], "conversations", where)
        return tuple(_message(_SHAREGPT_ROLES.get(str(turn.get("from"))), turn.get("value"), where) for turn in turns)
    if record.get("prompt") is not None:
        prompt = record["prompt"]
        messages = [_message("user", prompt, where)] if isinstance(prompt, str) else [
            _message(turn.get("role"), turn.get("content"), where) for turn in _turns(prompt, "prompt", where)]
        if record.get("completion") is not None:
            messages.append(_message("assistant", _completion_text(record["completion"], where), where))
        return tuple(messages)
    raise UsageError(f"{where}: the record has none of the fields `messages`, `conversations`, `prompt`")


def _turns(value: object, field: str, where: str) -> list[Record]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise UsageError(f"{where}: `{field}` must be a list of at least one turn")
    return value


def _completion_text(value: object, where: str) -> object:
    if isinstance(value, str):
        return value
    turns = _turns(value, "completion", where)
    if len(turns) != 1:
        raise UsageError(f"{where}: `completion` must be one assistant turn")
    return turns[0].get("content")


def _message(role: object, content: object, where: str) -> Message:
    if role not in _ROLES:
        raise UsageError(f"{where}: a turn has an unknown role; known are {', '.join(sorted(_ROLES))}")
    if not isinstance(content, str):
        raise UsageError(f"{where}: a turn's content is not text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: a turn holds characters that are not valid Unicode ({error.reason})") from None
    return Message(str(role), content)


def _fit(messages: tuple[Message, ...], responses: Responses, where: str) -> tuple[Message, ...]:
    if responses == "target":
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
    elif not any(m.role == "assistant" for m in messages):
        raise UsageError(f"{where}: there is no response to score; give one, or use --responses target")
    if not any(m.role == "user" and m.content.strip() for m in messages):
        raise UsageError(f"{where}: the prompt is empty")
    if responses == "target" and not messages[-1].content.strip():
        raise UsageError(f"{where}: the last turn of the prompt is empty")
    return messages


def _prompt_id(record: Record, messages: tuple[Message, ...], where: str) -> str:
    for field in ("id", "prompt_id"):
        if isinstance(record.get(field), (str, int)):
            return _short(str(record[field]), field, where)
    digest = hashlib.sha256()
    for message in messages:
        digest.update(f"{message.role}\0{message.content}\0".encode())
    return digest.hexdigest()[:16]


def _domain(record: Record, where: str) -> str | None:
    domain = record.get("domain")
    if domain is not None and not isinstance(domain, str):
        raise UsageError(f"{where}: `domain` is not text")
    return None if domain is None else _short(domain, "domain", where)


def _short(text: str, field: str, where: str) -> str:
    """Readers of a dataset allow this much and no more, whatever a file claims."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: `{field}` holds characters that are not valid Unicode ({error.reason})") from None
    if size > STRING_BYTES:
        raise UsageError(f"{where}: `{field}` has {size} bytes; at most {STRING_BYTES} are stored")
    return text
