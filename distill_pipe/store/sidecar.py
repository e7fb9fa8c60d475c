"""Hidden-state sidecars: the stored states of a shard's traces in a file of their own, one column per layer.

A reader takes only the layers it trains on, and the main shard stays small and readable by everything. The trade-off:
two files per shard, tied together by name and ordinal. Nothing here decodes a blob; see `hidden_codec`.

Shapes: T tokens of a trace, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill_pipe.errors import DamageError
from distill_pipe.store.codec import HiddenBlob, bytes_per_element, check_blob, has_scale
from distill_pipe.store.manifest import Run, decode_record
from distill_pipe.store.parquet import Limit, check_table, read_footer_value, read_table
from distill_pipe.store.parquet_writer import METADATA_KEY, rows_per_group, write_row_groups
from distill_pipe.store.spec import FORMAT_VERSION, HiddenCodec
from distill_pipe.store.trace import Trace

_SCALES = pa.list_(pa.float32())


class SidecarInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The record in a sidecar's schema metadata: everything needed to decode its blobs."""

    format_version: int = FORMAT_VERSION
    fingerprint: str
    shard: int
    codec: HiddenCodec
    hidden_size: int
    layers: tuple[int, ...]


# As in `manifest`: no thread must be the first to decode it.
msgspec.json.Decoder(SidecarInfo)


@dataclass(frozen=True, slots=True)
class EncodedTrace:
    """A trace whose hidden states are blobs, so that a shard in the making holds few bytes. `errors` holds, by layer,
    the relative errors of the rows that were measured when the trace was encoded; a trace that was read has none."""

    trace: Trace
    blobs: Mapping[int, HiddenBlob] = field(default_factory=dict)
    errors: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)


def layer_column(layer: int) -> str:
    """The sidecar column of canonical layer `layer`."""
    return f"layer_{layer:02d}"


def scale_column(layer: int) -> str:
    """The column of that layer's scales, where its codec has them."""
    return f"scale_{layer:02d}"


def sidecar_info(run: Run, shard: int) -> SidecarInfo:
    """The sidecar record that a run's capture settings imply."""
    capture = run.spec.capture
    return SidecarInfo(fingerprint=run.fingerprint, shard=shard, codec=capture.hidden_codec,
                       hidden_size=run.spec.target.hidden_size, layers=capture.layers)


def sidecar_schema(codec: HiddenCodec, layers: Sequence[int]) -> pa.Schema:
    """The columns that hold `layers`, beside `ordinal`."""
    fields = [("ordinal", pa.int64())]
    for layer in layers:
        fields.append((layer_column(layer), pa.large_binary()))
        fields += [(scale_column(layer), _SCALES)] * has_scale(codec)
    return pa.schema(fields)


def write_sidecar(path: Path, traces: Sequence[EncodedTrace], info: SidecarInfo) -> None:
    """Write the hidden states of a shard's traces, one row group at a time: the shard itself may fill the memory."""
    record = msgspec.json.encode(info, order="deterministic")
    schema = sidecar_schema(info.codec, info.layers).with_metadata({METADATA_KEY: record})
    rows = rows_per_group(len(traces), _table_bytes(traces, info))
    starts = range(0, max(len(traces), 1), rows)
    write_row_groups(path, schema, (_table(traces[i:i + rows], info, schema) for i in starts), rows)


def check_written_sidecar(path: Path, traces: Sequence[EncodedTrace], info: SidecarInfo) -> None:
    """Read a sidecar that was just written, in as little memory; raises DamageError unless all of it decodes and it
    holds these traces."""
    tokens = sum(t.trace.num_tokens for t in traces)
    schema, limits = sidecar_schema(info.codec, info.layers), _limits(info, info.layers, len(traces), tokens)
    check_table(path, schema, limits)
    # Arrow keeps what it freed, and what comes next is mostly not allocated by it.
    pa.default_memory_pool().release_unused()
    require_same_traces(read_sidecar(path, info, (), len(traces), tokens), [t.trace.ordinal for t in traces])


def read_sidecar_info(path: Path) -> SidecarInfo:
    """The record of a sidecar.

    Raises:
        DamageError: the footer cannot be read.
        MismatchError: it holds no record, or one of another format version.
    """
    return decode_record(read_footer_value(path, METADATA_KEY), SidecarInfo, str(path))


def read_sidecar(path: Path, info: SidecarInfo, layers: Sequence[int], traces: int, tokens: int) -> pa.Table:
    """The columns of some layers, nothing of it decoded. `traces` and `tokens` are what the shard's record says: a file
    that claims more is refused before anything is unpacked.

    Raises:
        DamageError: naming file, row group and column.
    """
    return read_table(path, sidecar_schema(info.codec, layers), _limits(info, layers, traces, tokens))


def blobs_of(table: pa.Table, info: SidecarInfo, index: int) -> dict[int, HiddenBlob]:
    """The blobs of the sidecar's trace `index`, for the layers that the table holds."""
    blobs = {}
    for layer in info.layers:
        if layer_column(layer) not in table.column_names:
            continue
        scale_T = None
        if has_scale(info.codec):
            scale_T = table[scale_column(layer)][index].values.to_numpy(zero_copy_only=False)
        blobs[layer] = HiddenBlob(_bytes_at(table[layer_column(layer)], index), scale_T)
    return blobs


def _bytes_at(column: pa.ChunkedArray, index: int) -> memoryview:
    """A blob where it is: pyarrow's own scalar is a copy of it."""
    for chunk in column.chunks:
        if index < len(chunk):
            _, offsets, data = chunk.buffers()
            start, stop = np.frombuffer(offsets, np.int64, 2, 8 * (chunk.offset + index))
            return memoryview(data if data is not None else b"")[start:stop]
        index -= len(chunk)
    raise IndexError(f"the sidecar has no trace {index} more")


def check_sidecar(table: pa.Table, info: SidecarInfo, traces: Sequence[Trace]) -> None:
    """Hold every blob against its trace, without decoding.

    Raises:
        DamageError: the sidecar holds other traces, or a blob is not its trace's; names the layer and the trace.
    """
    require_same_traces(table, [t.ordinal for t in traces])
    for index, trace in enumerate(traces):
        for layer, blob in blobs_of(table, info, index).items():
            try:
                check_blob(blob, info.codec, (trace.num_tokens - 1, info.hidden_size))
            except DamageError as error:
                raise DamageError(f"column {layer_column(layer)}, prompt {trace.ordinal}: {error}") from None


def require_same_traces(table: pa.Table, ordinals: Sequence[int]) -> None:
    """Raises DamageError unless the sidecar's rows are those of the main shard, in the same order."""
    if table["ordinal"].to_pylist() != list(ordinals):
        raise DamageError("the hidden-state sidecar does not hold the traces of its main shard")


def _table(traces: Sequence[EncodedTrace], info: SidecarInfo, schema: pa.Schema) -> pa.Table:
    columns = [pa.array([t.trace.ordinal for t in traces], pa.int64())]
    for layer in info.layers:
        blobs = [t.blobs[layer] for t in traces]
        columns.append(_joined(blobs))
        if has_scale(info.codec):
            columns.append(pa.array([b.scale_T for b in blobs], _SCALES))
    return pa.table(columns, schema)


def _joined(blobs: Sequence[HiddenBlob]) -> pa.LargeBinaryArray:
    """A column of blobs. Appending them one by one would take up to three times their bytes, since a builder that grows
    holds old and new; a single blob is not copied at all."""
    offsets = np.cumsum([0] + [len(b.data) for b in blobs])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join([b.data for b in blobs]))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(blobs), buffers)


def _table_bytes(traces: Sequence[EncodedTrace], info: SidecarInfo) -> int:
    """`nbytes` of the table of all traces, which decides on the row groups: values, and the offsets of blobs (8 bytes)
    and of lists of scales (4)."""
    blobs = [t.blobs[layer] for t in traces for layer in info.layers]
    scales = [4 + b.scale_T.nbytes for b in blobs if b.scale_T is not None]
    return 8 * len(traces) + sum(8 + len(b.data) for b in blobs) + sum(scales)


def _limits(info: SidecarInfo, layers: Sequence[int], traces: int, tokens: int) -> dict[str, Limit]:
    """What the columns of a sidecar may hold at the most, by what the shard's record says."""
    positions = max(tokens - traces, 0)
    blobs = Limit(values=traces, value_bytes=positions * info.hidden_size * bytes_per_element(info.codec) + 4 * traces)
    limits = {"ordinal": Limit(values=traces)}
    for layer in layers:
        limits[layer_column(layer)] = blobs
        limits[scale_column(layer)] = Limit(values=positions)
    return limits
