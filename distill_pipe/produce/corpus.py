"""Corpora, read as one kind of record: JSONL (plain, .gz, .zst) and Parquet, here or on the hub or in an object store.

A few are known by name. Any record that cannot be understood stops the reading with its file and line named. Records
are streamed, never held at once.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Final

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipe.errors import UsageError
from distill_pipe.produce.records import Record, domain_of, messages_of, prompt_id
from distill_pipe.produce.sources import Source, find_sources
from distill_pipe.store.plan import Message, PlannedPrompt
from distill_pipe.store.spec import CorpusFile, Responses

# 660,000 prompts with domains; and what the targets of the LK paper (arXiv 2602.23881) answered to them.
NAMED: Final = {"infinity-instruct": "hf://datasets/BAAI/Infinity-Instruct/0625"}
_COMPLETIONS: Final = re.compile(r"^nebius/[\w.-]+-Infinity-Instruct-0625$")


def sources(addresses: Sequence[str]) -> list[Source]:
    """The files of a corpus, in the order given.

    Raises:
        UsageError: a file is missing, empty, or of a kind that cannot be read.
    """
    return [source for address in addresses for source in find_sources(_address(str(address)))]


def _address(name: str) -> str:
    if _COMPLETIONS.match(name):
        return f"hf://datasets/{name}"
    return NAMED.get(name, name)


def corpus_files(addresses: Sequence[str]) -> tuple[CorpusFile, ...]:
    """Name and content hash of each corpus file.

    Raises:
        UsageError: as `sources`.
    """
    files = []
    for source in sources(addresses):
        try:
            files.append(CorpusFile(name=source.name, sha256=source.sha256()))
        except OSError as error:
            raise UsageError(f"corpus {source.address} cannot be read: {error.strerror or error}") from None
    return tuple(files)


def read_prompts(addresses: Sequence[str], responses: Responses, limit: int | None) -> Iterator[PlannedPrompt]:
    """The corpus as prompts, numbered in order.

    With `responses="target"` trailing assistant turns are cut off, since the target will write its own; with
    `responses="corpus"` each conversation must hold at least one.

    Raises:
        UsageError: a record cannot be used; the message names file and line.
    """
    ordinal = 0
    for source in sources(addresses):
        for where, record in _records(source):
            messages = _fit(messages_of(record, where), responses, where)
            yield PlannedPrompt(ordinal, prompt_id(record, messages, where), domain_of(record, where), messages)
            ordinal += 1
            if ordinal == limit:
                return


def _records(source: Source) -> Iterator[tuple[str, Record]]:
    if source.name.endswith(".parquet"):
        yield from _parquet_records(source)
        return
    with source.open() as file, _text(source.name, file) as lines:
        for number, line in enumerate(_lines(lines, source), start=1):
            if not line.strip():
                continue
            where = f"{source.address}:{number}"
            try:
                record = _decoded(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: this line is not JSON ({error})") from None
            if not isinstance(record, dict):
                raise UsageError(f"{where}: this line is JSON but not an object; a corpus has one object per line")
            yield where, record


def _decoded(line: str) -> object:
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeEncodeError):
        # Five times slower, and it takes what is nearly JSON (NaN, half characters), of which more can be said later.
        return json.loads(line)


def _lines(lines: Iterable[str], source: Source) -> Iterator[str]:
    try:
        yield from lines
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise UsageError(f"corpus {source.address} cannot be read: {error}") from None


def _text(name: str, file: IO[bytes]) -> IO[str]:
    if name.endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8")
    if name.endswith(".zst"):
        # Arrow's reader, because the zstandard package takes a truncated file for a complete one.
        return io.TextIOWrapper(pa.input_stream(file, compression="zstd"), encoding="utf-8")
    return io.TextIOWrapper(file, encoding="utf-8")


def _parquet_records(source: Source) -> Iterator[tuple[str, Record]]:
    try:
        with source.open() as opened, pq.ParquetFile(opened, arrow_extensions_enabled=False) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{source.address}: row {number}", record
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"corpus {source.address} cannot be read: {error}") from None


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
