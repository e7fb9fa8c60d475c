"""Catches a shard that reads back as other traces than were written, or that is damaged or foreign and is read anyway.

Shapes: R supervised rows, N flat entries, K head entries.
"""

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_datasets import Shape, make_dataset, random_trace

from distill_pipe.errors import CaptureError, DamageError, MismatchError
from distill_pipe.store import parquet_writer
from distill_pipe.store.codec import scalar_bits, scaled_head
from distill_pipe.store.hidden_codec import as_tensor, decode_layers, encode_trace
from distill_pipe.store.manifest import Measured, ShardInfo, read_fragment, shard_name
from distill_pipe.store.parquet_writer import METADATA_KEY
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import (
    MAIN_SCHEMA,
    main_table,
    read_main,
    read_shard_info,
    traces_from_table,
    write_main,
)
from distill_pipe.store.sidecar import (
    EncodedTrace,
    SidecarInfo,
    blobs_of,
    check_sidecar,
    check_written_sidecar,
    layer_column,
    read_sidecar,
    read_sidecar_info,
    scale_column,
    write_sidecar,
)
from distill_pipe.store.spec import CaptureSpec, HiddenCodec
from distill_pipe.store.statistics import ShardStatistics
from distill_pipe.store.trace import Trace

MEASURED = Measured(head_tv_error_max=0.0, head_tv_error_mean=0.0, tail_mass_mean=0.0, hidden=(),
                    statistics=ShardStatistics())
CAPTURE = CaptureSpec(top_k=64, tail_samples=8)
CODECS: tuple[HiddenCodec, ...] = get_args(HiddenCodec)


def info_of(traces: Sequence[Trace]) -> ShardInfo:
    """A record that says what the traces are."""
    return ShardInfo(fingerprint="0" * 64, shard=0, first_ordinal=0, num_prompts=len(traces), attempt="a",
                     traces=len(traces), tokens=sum(t.num_tokens for t in traces), rows=sum(t.num_rows for t in traces),
                     quarantined=0, hidden=None, quarantine=None, measured=MEASURED)


INFO = info_of([random_trace(0)])


def write_traces(folder: Path, traces: Sequence[Trace], shape: Shape) -> tuple[Path, Path]:
    table, _ = main_table(traces, shape.logprob_bits)
    write_main(folder / "main", table, info_of(traces))
    sidecar = SidecarInfo(fingerprint="0" * 64, shard=0, codec=shape.hidden_codec, hidden_size=shape.hidden_size,
                          layers=shape.layers)
    copies = [replace(t, hidden=dict(t.hidden)) for t in traces]
    write_sidecar(folder / "hidden", [encode_trace(t, shape.hidden_codec) for t in copies], sidecar)
    return folder / "main", folder / "hidden"


def read_traces(main: Path, hidden: Path) -> list[Trace]:
    """Traces with their hidden states as float32."""
    info, sidecar = read_shard_info(main), read_sidecar_info(hidden)
    traces = list(traces_from_table(read_main(main, info, CAPTURE)))
    table = read_sidecar(hidden, sidecar, sidecar.layers, info.traces, info.tokens)
    check_sidecar(table, sidecar, traces)
    for i, trace in enumerate(traces):
        decoded = decode_layers(blobs_of(table, sidecar, i), sidecar.codec, sidecar.hidden_size)
        trace.hidden.update({n: h.numpy() for n, h in decoded.items()})
    return traces


def assert_same(found: Trace, wanted: Trace, codec: HiddenCodec) -> None:
    for name in Trace.__dataclass_fields__:
        if name == "hidden":
            continue
        a, b = getattr(found, name), getattr(wanted, name)
        assert np.array_equal(a, b) if isinstance(b, np.ndarray) else a == b, name
        assert not isinstance(b, np.ndarray) or a.dtype == b.dtype, name
    assert set(found.hidden) == set(wanted.hidden)
    for layer, hidden_TH in wanted.hidden.items():
        stored_TH = as_tensor(hidden_TH)
        if codec in ("f32", "bf16", "bf16-split"):
            stored_TH = stored_TH.to(torch.float32 if codec == "f32" else torch.bfloat16).float()
            assert np.array_equal(found.hidden[layer], stored_TH.numpy()), layer
        else:
            error_T = np.linalg.norm(found.hidden[layer] - stored_TH.numpy(), axis=1)
            assert (error_T <= 0.12 * stored_TH.norm(dim=1).numpy()).all(), layer


shapes = st.builds(
    Shape, vocab_size=st.just(24), hidden_size=st.integers(1, 9), num_layers=st.just(4),
    layers=st.lists(st.integers(0, 4), unique=True, min_size=1).map(lambda n: tuple(sorted(n))),
    hidden_codec=st.sampled_from(CODECS), top_k=st.integers(1, 24),
    tail_samples=st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(shapes, st.lists(st.integers(0, 10**12), min_size=1, max_size=6, unique=True), st.integers(0, 2**31))
def test_traces_come_back_from_a_shard_as_they_were(shape: Shape, ordinals: list[int], seed: int) -> None:
    traces = [random_trace(o, shape, seed) for o in ordinals]
    with TemporaryDirectory() as folder:
        found = read_traces(*write_traces(Path(folder), traces, shape))
    assert len(found) == len(traces)
    for a, b in zip(found, traces, strict=True):
        assert_same(a, b, shape.hidden_codec)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([5, 7, 12]), st.integers(1, 64), st.integers(0, 2**31))
def test_the_measured_head_error_is_the_one_a_float64_oracle_finds(bits: int, top_k: int, seed: int) -> None:
    traces = [random_trace(o, Shape(top_k=top_k), seed) for o in range(3)]
    table, error_R = main_table(traces, bits)
    expected = []
    for trace, stored in zip(traces, table["topk_logprobs"].to_pylist(), strict=True):
        edges = np.cumsum(trace.topk_counts_R)[:-1]
        for a, b in zip(np.split(trace.topk_logprobs_N, edges), np.split(np.array(stored), edges), strict=True):
            exact_K, rounded_K = np.exp(a.astype(np.float64)), np.exp(b.astype(np.float64))
            expected.append(0.5 * np.abs(exact_K - rounded_K * exact_K.sum() / rounded_K.sum()).sum())
    assert error_R == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # Half of 2^-bits times the row's entropy, at most log(64) here, doubled by scaling the head back.
    assert error_R.max() <= 2.0**-bits * np.log(64) * 1.1


def test_without_rounding_the_measured_error_is_zero() -> None:
    assert main_table([random_trace(0)], 24)[1].max() == 0


@given(st.integers(5, 12), st.integers(0, 2**31))
def test_the_scaled_head_and_the_tail_mass_add_up_to_one(bits: int, seed: int) -> None:
    traces = [random_trace(o, Shape(top_k=20), seed) for o in range(3)]
    for trace in traces_from_table(main_table(traces, bits)[0]):
        scaled_N = scaled_head(trace.topk_logprobs_N, trace.topk_counts_R, trace.tail_mass_R)
        head_R = np.add.reduceat(np.exp(scaled_N.astype(np.float64)), np.cumsum(trace.topk_counts_R) - 20)
        np.testing.assert_allclose(head_R + trace.tail_mass_R, 1, atol=1e-6)


def test_a_row_that_is_nearly_all_tail_is_left_as_it_is() -> None:
    counts_R, tail_mass_R = np.array([1, 1, 1], np.int32), np.array([1.0, 0.0, 0.995], np.float32)
    scaled_N = scaled_head(np.array([-30.0, -0.5, -5.0], np.float32), counts_R, tail_mass_R)
    assert scaled_N.tolist() == [-30.0, 0.0, -5.0]
    assert scaled_head(np.empty(0, np.float32), np.empty(0, np.int32), np.empty(0, np.float32)).size == 0


def test_one_number_per_row_keeps_eight_bits_more_than_a_head_entry() -> None:
    assert [scalar_bits(b) for b in (7, 12, 16, 24)] == [15, 20, 24, 24]
    trace = random_trace(0)
    (stored,) = traces_from_table(main_table([trace], 7)[0])
    for name in ("logsumexp_R", "tail_mass_R", "next_logprob_R"):
        np.testing.assert_allclose(getattr(stored, name), getattr(trace, name), rtol=2.0**-15)
        assert not np.array_equal(getattr(stored, name), getattr(trace, name))


def test_a_shard_without_traces_can_be_written_and_read(tmp_path: Path) -> None:
    main, hidden = write_traces(tmp_path, [], Shape())
    assert read_traces(main, hidden) == []
    assert read_main(main, read_shard_info(main), CAPTURE).schema.equals(MAIN_SCHEMA)


def test_one_layer_can_be_read_without_the_others(tmp_path: Path) -> None:
    shape = Shape()
    main, hidden = write_traces(tmp_path, [random_trace(5, shape)], shape)
    info, sidecar = read_shard_info(main), read_sidecar_info(hidden)
    part = read_sidecar(hidden, sidecar, (2,), info.traces, info.tokens)
    assert part.column_names == ["ordinal", layer_column(2)]
    assert set(blobs_of(part, sidecar, 0)) == {2}


@pytest.mark.parametrize("codec", CODECS)
def test_a_sidecar_has_a_scale_per_position_where_the_codec_needs_one(tmp_path: Path, codec: HiddenCodec) -> None:
    shape = Shape(hidden_codec=codec)
    trace = random_trace(5, shape)
    _, hidden = write_traces(tmp_path, [trace], shape)
    table = pq.read_table(hidden)
    assert (scale_column(2) in table.column_names) == (codec in ("fp8", "q8", "q6", "q5"))
    if scale_column(2) in table.column_names:
        assert len(table[scale_column(2)][0]) == trace.num_tokens - 1


def test_a_sidecar_of_another_codec_is_refused_by_its_columns(tmp_path: Path) -> None:
    shape = Shape(hidden_codec="q8")
    main, hidden = write_traces(tmp_path, [random_trace(5, shape)], shape)
    info, sidecar = read_shard_info(main), msgspec.structs.replace(read_sidecar_info(hidden), codec="f32")
    table = read_sidecar(hidden, sidecar, (1,), info.traces, info.tokens)
    with pytest.raises(DamageError, match="column layer_01"):
        check_sidecar(table, sidecar, [random_trace(5, shape)])


def test_the_record_in_the_footer_comes_back_as_it_was(tmp_path: Path) -> None:
    main, _ = write_traces(tmp_path, [random_trace(0)], Shape())
    assert read_shard_info(main) == INFO


def test_a_sidecar_of_other_traces_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    main, _ = write_traces(tmp_path / "a", [random_trace(0), random_trace(1)], Shape())
    _, hidden = write_traces(tmp_path / "b", [random_trace(1), random_trace(0)], Shape())
    with pytest.raises(DamageError, match="does not hold the traces"):
        read_traces(main, hidden)


def test_a_foreign_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["hello"]}), tmp_path / "foreign")
    with pytest.raises(MismatchError, match="was not written by distill-pipe"):
        read_shard_info(tmp_path / "foreign")
    with pytest.raises(DamageError, match="column ordinal is missing"):
        read_main(tmp_path / "foreign", INFO, CAPTURE)


def test_a_renamed_column_is_damage_and_no_crash(tmp_path: Path) -> None:
    table, _ = main_table([random_trace(0)], 24)
    wrong = table.rename_columns([name.replace("tail_mass", "tail_mess") for name in table.column_names])
    with pytest.raises(DamageError, match="column tail_mass is missing"):
        list(traces_from_table(wrong))


@pytest.mark.parametrize("version", [0, 2, 99])
def test_an_unknown_format_version_is_refused_with_both_versions(tmp_path: Path, version: int) -> None:
    table, _ = main_table([random_trace(0)], 24)
    write_main(tmp_path / "main", table, msgspec.structs.replace(INFO, format_version=version))
    with pytest.raises(MismatchError, match=f"format version {version}; this distill-pipe reads version 1"):
        read_shard_info(tmp_path / "main")


@pytest.mark.parametrize("record", [b"{}", b"not json", b"\xff\xfe", b'{"format_version": "two"}', b"[1]"])
def test_a_footer_record_that_is_no_record_is_refused(tmp_path: Path, record: bytes) -> None:
    table, _ = main_table([random_trace(0)], 24)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: record}), tmp_path / "main")
    with pytest.raises(MismatchError, match="cannot be read"):
        read_shard_info(tmp_path / "main")


def test_a_shard_that_breaks_an_invariant_is_refused_though_its_checksums_are_right(tmp_path: Path) -> None:
    table, _ = main_table([random_trace(7)], 24)
    at = table.column_names.index("tail_mass")
    spoilt = table.set_column(at, MAIN_SCHEMA.field(at), pa.array([[2.0] * len(table["tail_mass"][0])], pa.list_(
        pa.float32())))
    write_main(tmp_path / "main", spoilt, info_of([random_trace(7)]))
    with pytest.raises(CaptureError, match="prompt 7: a tail mass"):
        list(traces_from_table(read_main(tmp_path / "main", info_of([random_trace(7)]), CAPTURE)))


def test_the_fragment_knows_what_a_page_checksum_cannot(tmp_path: Path) -> None:
    make_dataset(tmp_path, 4)
    fragment = read_fragment(LocalRoot(tmp_path), 0)
    assert fragment is not None
    assert fragment.info == read_shard_info(tmp_path / shard_name(0))
    assert fragment.file.size == (tmp_path / shard_name(0)).stat().st_size


def encoded_shard(num_traces: int, codec: HiddenCodec) -> tuple[list[EncodedTrace], SidecarInfo]:
    shape = Shape(hidden_codec=codec)
    info = SidecarInfo(fingerprint="0" * 64, shard=0, codec=codec, hidden_size=shape.hidden_size, layers=shape.layers)
    return [encode_trace(random_trace(o, shape), codec) for o in range(num_traces)], info


def whole_table(traces: Sequence[EncodedTrace], info: SidecarInfo) -> pa.Table:
    """A sidecar's columns as one table, appended blob by blob."""
    columns: dict[str, pa.Array] = {"ordinal": pa.array([t.trace.ordinal for t in traces], pa.int64())}
    for layer in info.layers:
        columns[layer_column(layer)] = pa.array([t.blobs[layer].data for t in traces], pa.large_binary())
        if info.codec in ("fp8", "q8", "q6", "q5"):
            columns[scale_column(layer)] = pa.array([t.blobs[layer].scale_T for t in traces], pa.list_(pa.float32()))
    return pa.table(columns, metadata={METADATA_KEY: msgspec.json.encode(info, order="deterministic")})


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("num_traces", "groups"), [(0, 1), (1, 1), (9, 1), (9, 3), (10, 4), (6, 6)])
def test_a_sidecar_that_is_written_piece_by_piece_is_the_file_of_the_whole_table(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: HiddenCodec, num_traces: int, groups: int) -> None:
    traces, info = encoded_shard(num_traces, codec)
    table = whole_table(traces, info)
    rows = max(-(-num_traces // groups), 1)
    # The least and the most that make groups of so many rows: a table taken for a byte larger or smaller makes others.
    least, beyond = (-(-n * table.nbytes // max(num_traces, 1)) for n in (rows, rows + 1))
    scales = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in table.column_names if name.startswith("scale")}
    pq.write_table(table, tmp_path / "whole", row_group_size=rows, compression="zstd", compression_level=2,
                   use_dictionary=False, column_encoding={"ordinal": "BYTE_STREAM_SPLIT"} | scales,
                   write_page_checksum=True, write_page_index=True)
    for group_bytes in (least, max(beyond - 1, least)):
        monkeypatch.setattr(parquet_writer, "ROW_GROUP_BYTES", group_bytes)
        write_sidecar(tmp_path / "pieces", traces, info)
        assert pq.read_metadata(tmp_path / "pieces").num_row_groups == groups
        assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
        check_written_sidecar(tmp_path / "pieces", traces, info)


def test_a_sidecar_that_was_written_short_or_spoilt_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces, info = encoded_shard(6, "q8")
    monkeypatch.setattr(parquet_writer, "ROW_GROUP_BYTES", 1)
    write_sidecar(tmp_path / "short", traces[:5], info)
    with pytest.raises(DamageError, match="does not hold the traces"):
        check_written_sidecar(tmp_path / "short", traces, info)
    write_sidecar(tmp_path / "spoilt", traces, info)
    chunk = pq.read_metadata(tmp_path / "spoilt").row_group(4).column(1)
    data = bytearray((tmp_path / "spoilt").read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    (tmp_path / "spoilt").write_bytes(data)
    with pytest.raises(DamageError, match="spoilt: row group 4, column layer_01: "):
        check_written_sidecar(tmp_path / "spoilt", traces, info)


def test_making_the_main_table_takes_little_beside_it() -> None:
    traces = [random_trace(o, Shape(vocab_size=2048, top_k=1024)) for o in range(200)]
    tracemalloc.start()
    table, _ = main_table(traces, 7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.nbytes > 8 << 20
    assert peak < 2 * table.nbytes
