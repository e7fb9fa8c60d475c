"""A corpus of any shape and place as one local file of plain records: `prepare`.

Read once over the network, checked, cut into one prompt per turn where that is wanted, and then as cheap to read as it
gets. The file appears under its name only when it is whole. The trade-off: a second copy of the text on disk.
"""

import gzip
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct
from msgspec.structs import replace

from distill_pipe.errors import UsageError
from distill_pipe.produce.corpus import read_prompts
from distill_pipe.store.disk import whole_file
from distill_pipe.store.plan import PlannedPrompt
from distill_pipe.store.spec import Responses

_BATCH = 1024
_TURN = pa.struct([("role", pa.string()), ("content", pa.string()), ("reasoning_content", pa.string()),
                   ("tool_calls", pa.string()), ("tool_call_id", pa.string()), ("name", pa.string()),
                   ("supervised", pa.bool_()), ("ended", pa.bool_())])
_SCHEMA = pa.schema([("id", pa.string()), ("domain", pa.string()), ("messages", pa.list_(_TURN)),
                     ("tools", pa.string())])


class Prepared(Struct, frozen=True, kw_only=True):
    """What `prepare` wrote: prompts, their turns and characters, prompts of each domain (`-` has none), and bytes."""

    file: str
    prompts: int
    turns: int
    characters: int
    domains: dict[str, int]
    bytes: int


def prepare_corpus(addresses: Sequence[str], out: Path, responses: Responses, limit: int | None, split_turns: bool,
                   on_prompt: Callable[[], None]) -> Prepared:
    """Write a corpus as one file.

    Raises:
        UsageError: a record cannot be used, or the file's name is of no kind that can be written; nothing is written.
    """
    domains = Counter[str]()
    turns = characters = 0

    def counted() -> Iterator[PlannedPrompt]:
        nonlocal turns, characters
        for prompt in read_prompts(addresses, responses, limit):
            for part in _split(prompt, responses) if split_turns else (prompt,):
                domains[part.domain or "-"] += 1
                turns += len(part.messages)
                characters += sum(len(m.content) for m in part.messages)
                on_prompt()
                yield part

    with whole_file(out) as part:
        _write(part, out.name, counted())
    return Prepared(file=str(out), prompts=domains.total(), turns=turns, characters=characters,
                    domains=dict(sorted(domains.items())), bytes=out.stat().st_size)


def record_of(prompt: PlannedPrompt) -> dict[str, object]:
    """A prompt as a record of a corpus, from which it is read again as it is."""
    messages = [replace(m, tools=None) for m in prompt.messages]
    return {"id": prompt.prompt_id, "domain": prompt.domain, "messages": msgspec.to_builtins(messages),
            "tools": prompt.messages[0].tools}


def _split(prompt: PlannedPrompt, responses: Responses) -> Iterator[PlannedPrompt]:
    """One prompt for each turn of the assistant, what was said before it being context."""
    context = tuple(replace(m, supervised=m.role != "assistant") for m in prompt.messages)
    ends = [i for i, m in enumerate(prompt.messages) if m.role == "assistant" and m.supervised]
    for end in ends:
        messages = context[:end] + prompt.messages[end:end + 1] * (responses == "corpus")
        if messages:
            yield PlannedPrompt(prompt.ordinal, f"{prompt.prompt_id}#{end}", prompt.domain, messages)
    if responses == "target":
        yield PlannedPrompt(prompt.ordinal, f"{prompt.prompt_id}#{len(context)}", prompt.domain, context)


def _write(path: Path, name: str, prompts: Iterator[PlannedPrompt]) -> None:
    if name.endswith(".parquet"):
        with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as table:
            while batch := [record_of(p) for p in islice(prompts, _BATCH)]:
                table.write_table(pa.Table.from_pylist(batch, schema=_SCHEMA))
        return
    with _opened(path, name) as file:
        for prompt in prompts:
            file.write(msgspec.json.encode(record_of(prompt)) + b"\n")


def _opened(path: Path, name: str) -> IO[bytes]:
    if name.endswith(".jsonl.zst"):
        compressed: IO[bytes] = pa.CompressedOutputStream(str(path), "zstd")
        return compressed
    if name.endswith(".jsonl.gz"):
        return cast(IO[bytes], gzip.open(path, "wb"))
    if name.endswith(".jsonl"):
        return open(path, "wb")
    raise UsageError(f"--out {name}: end the name in .jsonl, .jsonl.zst, .jsonl.gz or .parquet")
