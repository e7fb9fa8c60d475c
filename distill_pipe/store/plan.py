"""The frozen plan: which prompts make up which shard, with the prompts themselves.

A plan file is Parquet with one row group per shard, so a worker fetches little but its own prompts and the run no
longer depends on the corpus file. The price is one compressed copy of the corpus text in the dataset; next to hidden
states it is nothing. Shard i holds ordinals `[i * n, (i + 1) * n)` at any number of workers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipe.errors import MismatchError
from distill_pipe.store.manifest import Run
from distill_pipe.store.root import Root

SHARDS_PER_PART = 1000
_SCHEMA = pa.schema([("ordinal", pa.int64()), ("prompt_id", pa.string()), ("domain", pa.string()),
                     ("messages", pa.string())])


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation. Roles are `system`, `developer`, `user`, `assistant`, `tool`.

    `reasoning_content` is what the assistant thought before it spoke. `tool_calls` (of an assistant) and `tools` (of
    the first turn: what the conversation may call) are JSON texts, which only the chat template reads. A given response
    that is there as context alone is not `supervised`; one that was cut off has not `ended`.
    """

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: str | None = None
    tool_call_id: str | None = None
    name: str | None = None
    tools: str | None = None
    supervised: bool = True
    ended: bool = True


@dataclass(frozen=True, slots=True)
class PlannedPrompt:
    """One prompt of the plan: an ordinal, the caller's id, and the conversation to render.

    When the target writes the response, the conversation ends with a user turn; when responses are given, it ends with
    the assistant's.
    """

    ordinal: int
    prompt_id: str
    domain: str | None
    messages: tuple[Message, ...]


def write_plan_part(path: Path, shards: Iterable[Sequence[PlannedPrompt]]) -> None:
    """Write one plan file, a row group per shard."""
    encoder = msgspec.json.Encoder()
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd", use_dictionary=False,
                          write_page_checksum=True) as writer:
        for prompts in shards:
            columns = [[p.ordinal for p in prompts], [p.prompt_id for p in prompts], [p.domain for p in prompts],
                       [encoder.encode(p.messages).decode() for p in prompts]]
            arrays = [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), row_group_size=len(prompts))


def num_shards(run: Run) -> int:
    """How many shards the run's prompts make."""
    return run.spec.num_shards


def read_planned_shard(root: Root, run: Run, shard: int) -> list[PlannedPrompt]:
    """The prompts of one shard, in ordinal order.

    Raises:
        MismatchError: the plan file is missing, damaged, or holds other ordinals than the shard's.
    """
    part = run.plan[shard // SHARDS_PER_PART]
    try:
        with root.opened(part.name) as source, pq.ParquetFile(
                source, page_checksum_verification=True, arrow_extensions_enabled=False) as file:
            table = file.read_row_group(shard % SHARDS_PER_PART)
            if not table.schema.equals(_SCHEMA):
                raise MismatchError(f"{root}/{part.name} does not have the columns of a plan")
            prompts = list(_prompts(table))
    except (OSError, pa.ArrowException, IndexError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise MismatchError(f"{root}/{part.name} cannot be read: {error}; the plan is part of the dataset and must be "
                            "restored from a copy") from error
    first, stop = shard_range(run, shard)
    if [p.ordinal for p in prompts] != list(range(first, stop)):
        raise MismatchError(f"{root}/{part.name}: shard {shard} does not hold prompts {first} to {stop - 1}")
    return prompts


def shard_range(run: Run, shard: int) -> tuple[int, int]:
    """First ordinal of a shard, and the one after its last."""
    first = shard * run.spec.prompts_per_shard
    return first, min(first + run.spec.prompts_per_shard, run.spec.corpus.prompts)


def _prompts(table: pa.Table) -> Iterator[PlannedPrompt]:
    decoder = msgspec.json.Decoder(tuple[Message, ...])
    for row in table.to_pylist():
        yield PlannedPrompt(row["ordinal"], row["prompt_id"], row["domain"], decoder.decode(row["messages"]))
