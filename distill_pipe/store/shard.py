"""Traces to Parquet and back: the main shard, plain lists that any reader understands.

Token-level columns are ordinary numbers, so DuckDB, Polars and `datasets` read them without this package. Page
checksums are always on, because Parquet with zstd does not notice a flipped bit by itself. The trade-off for plain
columns: a delta codec of our own would take fewer bytes for the token ids and lose every foreign reader.

Shapes: R supervised rows, N flat entries of all rows of all traces.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill_pipe.errors import CaptureError, DamageError
from distill_pipe.store.codec import round_significant, scalar_bits
from distill_pipe.store.manifest import ShardInfo, decode_record
from distill_pipe.store.parquet import Limit, read_footer_value, read_table
from distill_pipe.store.parquet_writer import METADATA_KEY, write_table
from distill_pipe.store.spec import CaptureSpec
from distill_pipe.store.trace import Trace

_I32, _F32, _BOOL = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.bool_())
MAIN_SCHEMA = pa.schema([
    ("ordinal", pa.int64()), ("prompt_id", pa.string()), ("domain", pa.string()), ("finish_reason", pa.string()),
    ("token_ids", _I32), ("loss_mask", _BOOL),
    ("logsumexp", _F32), ("tail_mass", _F32), ("next_logprob", _F32),
    ("topk_counts", _I32), ("topk_ids", _I32), ("topk_logprobs", _F32),
    ("tail_counts", _I32), ("tail_ids", _I32), ("tail_logprobs", _F32),
])
QUARANTINE_SCHEMA = pa.schema([("ordinal", pa.int64()), ("prompt_id", pa.string()), ("code", pa.string()),
                               ("message", pa.string())])
_SCALARS, _LOGPROBS = ("logsumexp", "tail_mass", "next_logprob"), ("topk_logprobs", "tail_logprobs")
# A main shard is small beside its sidecar and read once per epoch: 6 % fewer bytes are worth a slower writer.
_MAIN_LEVEL = 12
# No identifier or label is longer; a shard that claims more is not one of ours. See `corpus`.
STRING_BYTES = 1024
_MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class QuarantinedPrompt:
    """A prompt that was given up on, and why. Codes: `too_long`, `template`, `engine`, `not_finite`."""

    ordinal: int
    prompt_id: str
    code: str
    message: str


def main_table(traces: Sequence[Trace], logprob_bits: int) -> tuple[pa.Table, NDArray[np.float64]]:
    """The main shard's columns with rounded numbers, and the total variation that this put into each row's head after
    a reader has scaled it to `1 - tail_mass`, `[R]`."""
    columns = {
        "ordinal": pa.array([t.ordinal for t in traces], pa.int64()),
        "prompt_id": pa.array([t.prompt_id for t in traces], pa.string()),
        "domain": pa.array([t.domain for t in traces], pa.string()),
        "finish_reason": pa.array([t.finish_reason for t in traces], pa.string()),
    }
    for names, bits in ((_SCALARS, scalar_bits(logprob_bits)), (_LOGPROBS, logprob_bits)):
        for name in names:
            rounded = round_significant(_concat(traces, _attribute(name)), bits)
            columns[name] = _lists(traces, _attribute(name), _F32, rounded)
    for field in MAIN_SCHEMA:
        if field.name not in columns:
            columns[field.name] = _lists(traces, _attribute(field.name), field.type)
    table = pa.table([columns[name] for name in MAIN_SCHEMA.names], schema=MAIN_SCHEMA)
    rounded_N, edges = _flat(table["topk_logprobs"])
    # One trace at a time: float64 takes several times what the shard does.
    errors = [_head_tv(t.topk_logprobs_N, rounded_N[start:stop], t.topk_counts_R)
              for t, start, stop in zip(traces, edges[:-1], edges[1:], strict=True)]
    return table, np.concatenate([np.empty(0), *errors])


def write_main(path: Path, table: pa.Table, info: ShardInfo) -> None:
    """Write a main shard; `info` goes into the footer."""
    metadata = {METADATA_KEY: msgspec.json.encode(info, order="deterministic")}
    write_table(path, table.replace_schema_metadata(metadata), _MAIN_LEVEL)


def write_quarantine(path: Path, prompts: Sequence[QuarantinedPrompt]) -> None:
    """Write the prompts of a shard that were given up on."""
    rows = [{"ordinal": p.ordinal, "prompt_id": p.prompt_id, "code": p.code, "message": p.message} for p in prompts]
    write_table(path, pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))


def read_main(path: Path, info: ShardInfo, capture: CaptureSpec) -> pa.Table:
    """A main shard. What `info`, its record, and the run's settings allow is the most that it may hold: a file that
    claims more is refused before anything is unpacked.

    Raises:
        DamageError: naming file, row group and column.
    """
    strings = Limit(values=info.traces, value_bytes=info.traces * (STRING_BYTES + 4))
    entries = {"topk": info.rows * capture.top_k, "tail": info.rows * capture.tail_samples}
    limits = {}
    for field in MAIN_SCHEMA:
        part = field.name[:4]
        values = info.traces
        if field.name in ("token_ids", "loss_mask"):
            values = info.tokens
        elif pa.types.is_list(field.type):
            values = entries[part] if _is_flat(field.name) else info.rows
        limits[field.name] = strings if pa.types.is_string(field.type) else Limit(max(values, info.traces))
    return read_table(path, MAIN_SCHEMA, limits, nullable=("domain",))


def read_quarantine(path: Path, prompts: int) -> list[QuarantinedPrompt]:
    """The prompts of a shard that were given up on; `prompts` is how many its record says.

    Raises:
        DamageError: naming file, row group and column.
    """
    limits = {name: Limit(prompts, prompts * (_MESSAGE_BYTES + 4)) for name in QUARANTINE_SCHEMA.names}
    return [QuarantinedPrompt(**row) for row in read_table(path, QUARANTINE_SCHEMA, limits).to_pylist()]


def read_shard_info(path: Path) -> ShardInfo:
    """The record in a main shard's footer.

    Raises:
        DamageError: the footer cannot be read.
        MismatchError: it holds no record, or one of another format version.
    """
    return decode_record(read_footer_value(path, METADATA_KEY), ShardInfo, str(path))


def traces_from_table(main: pa.Table, vocab_size: int = 2**31) -> Iterator[Trace]:
    """The traces of a main shard, without hidden states. Token ids lie below `vocab_size`.

    Raises:
        DamageError: the columns are not those of a main shard.
        CaptureError: a row violates the invariants of `Trace`, or a token id lies outside the vocabulary.
    """
    for field in MAIN_SCHEMA:
        found = main.schema.field(field.name).type if field.name in main.column_names else None
        if found != field.type:
            raise DamageError(f"column {field.name} is {found or 'missing'}, expected {field.type}")
    flats = {f.name: _flat(main[f.name]) for f in MAIN_SCHEMA if pa.types.is_list(f.type)}
    ordinals, prompt_ids = main["ordinal"].to_pylist(), main["prompt_id"].to_pylist()
    domains, reasons = main["domain"].to_pylist(), main["finish_reason"].to_pylist()
    for i, ordinal in enumerate(ordinals):
        lists = {_attribute(name): values[offsets[i]:offsets[i + 1]] for name, (values, offsets) in flats.items()}
        largest = max(int(lists[name].max(initial=0)) for name in ("token_ids_T", "topk_ids_N", "tail_ids_N"))
        if largest >= vocab_size:
            raise CaptureError(f"prompt {ordinal}: token id {largest} lies outside the vocabulary of {vocab_size}")
        yield Trace(ordinal=ordinal, prompt_id=prompt_ids[i], domain=domains[i], finish_reason=reasons[i],
                    hidden={}, **lists)


def require_counts(path: Path, info: ShardInfo, traces: Sequence[Trace]) -> None:
    """Raises DamageError unless a shard holds what its record says, which readers believe and are limited by."""
    rows = sum(t.num_rows for t in traces)
    if rows != info.rows:
        raise DamageError(f"{path} holds {rows} rows; its record says {info.rows}")
    require_lengths(path, info, traces)


def require_lengths(path: Path, info: ShardInfo, traces: Sequence[Trace]) -> None:
    """`require_counts` for traces whose rows were not read."""
    lengths = tuple(t.num_tokens for t in traces)
    if (len(lengths), sum(lengths)) != (info.traces, info.tokens):
        raise DamageError(f"{path} holds {len(lengths)} traces of {sum(lengths)} tokens; its record says "
                          f"{info.traces} and {info.tokens}")
    if info.lengths is not None and info.lengths != lengths:
        raise DamageError(f"{path} holds traces of other lengths than its record says")


def _is_flat(column: str) -> bool:
    return column.startswith(("topk", "tail")) and column.endswith(("ids", "logprobs"))


def _attribute(column: str) -> str:
    """The `Trace` field behind a list column: its name with the letters of its shape."""
    if column in ("token_ids", "loss_mask"):
        return f"{column}_T"
    return f"{column}_{'N' if _is_flat(column) else 'R'}"


def _concat(traces: Sequence[Trace], attribute: str) -> NDArray[Any]:
    parts = [getattr(t, attribute) for t in traces]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _lists(traces: Sequence[Trace], attribute: str, kind: pa.ListType,
           values: NDArray[Any] | None = None) -> pa.ListArray:
    offsets = np.cumsum([0] + [len(getattr(t, attribute)) for t in traces])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise CaptureError(f"{offsets[-1]} entries of {attribute} are too many for one shard; lower prompts_per_shard")
    offsets = offsets.astype(np.int32)
    flat = _concat(traces, attribute) if values is None else values
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=kind.value_type), type=kind)


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy().astype(np.int64)
    return array.values.to_numpy(zero_copy_only=False), offsets


def _head_tv(exact_N: NDArray[np.float32], rounded_N: NDArray[np.float32],
             counts_R: NDArray[np.int32]) -> NDArray[np.float64]:
    if len(counts_R) == 0:
        return np.empty(0)
    starts_R = np.cumsum(counts_R) - counts_R
    exact_N, rounded_N = np.exp(exact_N.astype(np.float64)), np.exp(rounded_N.astype(np.float64))
    scale_R = np.add.reduceat(exact_N, starts_R) / np.add.reduceat(rounded_N, starts_R)
    return 0.5 * np.add.reduceat(np.abs(exact_N - rounded_N * np.repeat(scale_R, counts_R)), starts_R)
