"""Traces to Parquet and back: the main shard (plain lists that any reader understands) and its hidden-state sidecar.

Token-level columns are ordinary numbers, so DuckDB, Polars and `datasets` read them without this package; only hidden
states are opaque blobs. Page checksums are always on, because Parquet with zstd does not notice a flipped bit by
itself. The trade-off for plain columns: about 14 % more bytes than a delta codec of our own would take.

Shapes: R supervised rows, N flat entries of all rows of all traces.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distill_pipe.errors import DamageError, MismatchError
from distill_pipe.store.codec import decode_hidden, encode_hidden, round_logprobs
from distill_pipe.store.manifest import Measured, ShardInfo, decode_record
from distill_pipe.store.spec import FORMAT_VERSION, CaptureSpec, HiddenCodec
from distill_pipe.store.trace import Trace

METADATA_KEY = b"distill_pipe"
ROW_GROUP_BYTES = 64 << 20

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
# Values on the log-probability grid repeat, so a dictionary halves them; ids and float32 scalars do not.
_DICTIONARY = ["domain", "finish_reason", "topk_logprobs.list.element", "tail_logprobs.list.element",
               "topk_counts.list.element", "tail_counts.list.element"]


class SidecarInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The record in a sidecar's schema metadata: everything needed to decode its blobs."""

    format_version: int = FORMAT_VERSION
    fingerprint: str
    shard: int
    codec: HiddenCodec
    hidden_size: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QuarantinedPrompt:
    """A prompt that was given up on, and why. Codes: `too_long`, `template`, `engine`, `not_finite`."""

    ordinal: int
    prompt_id: str
    code: str
    message: str


def layer_column(layer: int) -> str:
    """The sidecar column of canonical layer `layer`."""
    return f"layer_{layer:02d}"


def main_table(traces: Sequence[Trace], grid: float) -> tuple[pa.Table, Measured]:
    """The main shard's columns, with log-probabilities rounded to `grid`, and the error that put into them."""
    topk_N = _concat(traces, "topk_logprobs_N")
    rounded_N = round_logprobs(topk_N, grid)
    columns = {
        "ordinal": pa.array([t.ordinal for t in traces], pa.int64()),
        "prompt_id": pa.array([t.prompt_id for t in traces], pa.string()),
        "domain": pa.array([t.domain for t in traces], pa.string()),
        "finish_reason": pa.array([t.finish_reason for t in traces], pa.string()),
        "topk_logprobs": _lists(traces, "topk_logprobs_N", _F32, rounded_N),
        "tail_logprobs": _lists(traces, "tail_logprobs_N", _F32,
                                round_logprobs(_concat(traces, "tail_logprobs_N"), grid)),
    }
    for field in MAIN_SCHEMA:
        if field.name not in columns:
            columns[field.name] = _lists(traces, _attribute(field.name), field.type)
    counts_R = _concat(traces, "topk_counts_R")
    tv_R = _head_tv(topk_N, rounded_N, counts_R)
    tail_R = _concat(traces, "tail_mass_R")
    measured = Measured(head_tv_error_max=float(tv_R.max(initial=0)),
                        head_tv_error_mean=float(tv_R.mean()) if len(tv_R) else 0.0,
                        tail_mass_mean=float(tail_R.mean()) if len(tail_R) else 0.0)
    return pa.table([columns[name] for name in MAIN_SCHEMA.names], schema=MAIN_SCHEMA), measured


def write_main(path: Path, table: pa.Table, info: ShardInfo) -> None:
    """Write a main shard; `info` goes into the footer."""
    metadata = {METADATA_KEY: msgspec.json.encode(info, order="deterministic")}
    _write(path, table.replace_schema_metadata(metadata), _DICTIONARY)


def write_sidecar(path: Path, blobs: Sequence[Mapping[int, bytes]], ordinals: Sequence[int], info: SidecarInfo) -> None:
    """Write the hidden states of a shard: `blobs[i]` maps layer to the encoded blob of `ordinals[i]`."""
    columns: dict[str, pa.Array] = {"ordinal": pa.array(ordinals, pa.int64())}
    for layer in info.layers:
        columns[layer_column(layer)] = pa.array([b[layer] for b in blobs], pa.large_binary())
    table = pa.table(columns, metadata={METADATA_KEY: msgspec.json.encode(info, order="deterministic")})
    _write(path, table, dictionary=[])


def write_quarantine(path: Path, prompts: Sequence[QuarantinedPrompt]) -> None:
    """Write the prompts of a shard that were given up on."""
    rows = [{"ordinal": p.ordinal, "prompt_id": p.prompt_id, "code": p.code, "message": p.message} for p in prompts]
    _write(path, pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA), dictionary=[])


def encode_layers(trace: Trace, codec: HiddenCodec) -> dict[int, bytes]:
    """All hidden states of a trace as blobs."""
    return {layer: encode_hidden(hidden_TH, codec) for layer, hidden_TH in trace.hidden.items()}


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole Parquet file of ours with page checksums verified.

    Raises:
        DamageError: the file is missing, truncated or corrupt.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True, arrow_extensions_enabled=False) as file:
            return file.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DamageError(f"{path} cannot be read: {error}") from error


def read_shard_info(path: Path) -> ShardInfo:
    """The record in a main shard's footer.

    Raises:
        DamageError: the footer cannot be read, or holds no record.
        MismatchError: the record is of another format version.
    """
    return decode_record(_metadata(path), ShardInfo, str(path))


def read_sidecar_info(path: Path) -> SidecarInfo:
    """The record of a hidden-state sidecar; raises as `read_shard_info`."""
    return decode_record(_metadata(path), SidecarInfo, str(path))


def traces_from_tables(main: pa.Table, hidden: pa.Table | None, info: SidecarInfo | None) -> Iterator[Trace]:
    """The traces of a main shard, with the layers that `hidden` holds.

    Raises:
        DamageError: the columns are not those of a main shard (no checksum covers a Parquet footer), or the sidecar's
            rows are not the main shard's.
        CaptureError: a row violates the invariants of `Trace`.
    """
    main = _main_columns(main)
    if hidden is not None and hidden["ordinal"] != main["ordinal"]:
        raise DamageError("the hidden-state sidecar does not hold the traces of its main shard")
    flats = {f.name: _flat(main[f.name]) for f in MAIN_SCHEMA if pa.types.is_list(f.type)}
    ordinals, prompt_ids = main["ordinal"].to_pylist(), main["prompt_id"].to_pylist()
    domains, reasons = main["domain"].to_pylist(), main["finish_reason"].to_pylist()
    for i, ordinal in enumerate(ordinals):
        layers = {}
        if hidden is not None and info is not None:
            layers = {n: decode_hidden(hidden[layer_column(n)][i].as_buffer(), info.codec, info.hidden_size)
                      for n in info.layers if layer_column(n) in hidden.column_names}
        lists = {_attribute(name): values[offsets[i]:offsets[i + 1]] for name, (values, offsets) in flats.items()}
        yield Trace(ordinal=ordinal, prompt_id=prompt_ids[i], domain=domains[i], finish_reason=reasons[i],
                    hidden=layers, **lists)


def capture_sidecar_info(capture: CaptureSpec, hidden_size: int, fingerprint: str, shard: int) -> SidecarInfo:
    """The sidecar record that a run's capture settings imply."""
    return SidecarInfo(fingerprint=fingerprint, shard=shard, codec=capture.hidden_codec, hidden_size=hidden_size,
                       layers=capture.layers)


def _main_columns(table: pa.Table) -> pa.Table:
    """The columns of a main shard in our order; others, which a later version may add, are ignored."""
    for field in MAIN_SCHEMA:
        found = table.schema.field(field.name).type if field.name in table.column_names else None
        if found != field.type:
            raise DamageError(f"column {field.name} is {found or 'missing'}, expected {field.type}")
    return table.select(MAIN_SCHEMA.names)


def _attribute(column: str) -> str:
    """The `Trace` field behind a list column: its name with the letters of its shape."""
    if column in ("token_ids", "loss_mask"):
        return f"{column}_T"
    flat = column.startswith(("topk", "tail")) and column.endswith(("ids", "logprobs"))
    return f"{column}_{'N' if flat else 'R'}"


def _concat(traces: Sequence[Trace], attribute: str) -> NDArray[Any]:
    parts = [getattr(t, attribute) for t in traces]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _lists(traces: Sequence[Trace], attribute: str, kind: pa.ListType,
           values: NDArray[Any] | None = None) -> pa.ListArray:
    lengths = [len(getattr(t, attribute)) for t in traces]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
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
    difference_N = np.abs(np.exp(exact_N.astype(np.float64)) - np.exp(rounded_N.astype(np.float64)))
    starts_R = np.concatenate([[0], np.cumsum(counts_R)[:-1]])
    return 0.5 * np.add.reduceat(difference_N, starts_R)


def _write(path: Path, table: pa.Table, dictionary: list[str]) -> None:
    rows = max(1, int(ROW_GROUP_BYTES * table.num_rows / max(table.nbytes, 1)))
    pq.write_table(table, path, compression="zstd", compression_level=3, row_group_size=rows,
                   use_dictionary=dictionary or False, write_page_checksum=True, write_page_index=True)


def _metadata(path: Path) -> bytes:
    try:
        with pq.ParquetFile(path, arrow_extensions_enabled=False) as file:
            metadata: dict[bytes, bytes] = file.schema_arrow.metadata or {}
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DamageError(f"{path} cannot be read: {error}") from error
    if METADATA_KEY not in metadata:
        raise MismatchError(f"{path} was not written by distill-pipe")
    return metadata[METADATA_KEY]
