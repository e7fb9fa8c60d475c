"""Catches a shard that reads back as other traces than were written, or that is damaged or foreign and is read anyway.

Shapes: R supervised rows, N flat entries, K head entries.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_datasets import Shape, make_dataset, random_trace

from distill_pipe.errors import CaptureError, DamageError, MismatchError
from distill_pipe.store.codec import bf16_bits
from distill_pipe.store.manifest import Measured, ShardInfo, read_fragment, shard_name
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import (
    MAIN_SCHEMA,
    METADATA_KEY,
    SidecarInfo,
    encode_layers,
    layer_column,
    main_table,
    read_shard_info,
    read_sidecar_info,
    read_table,
    traces_from_tables,
    write_main,
    write_sidecar,
)
from distill_pipe.store.trace import Trace

MEASURED = Measured(head_tv_error_max=0.0, head_tv_error_mean=0.0, tail_mass_mean=0.0)
INFO = ShardInfo(fingerprint="0" * 64, shard=0, first_ordinal=0, num_prompts=1, attempt="a", traces=1, tokens=1, rows=1,
                 quarantined=0, hidden=None, quarantine=None, measured=MEASURED)


def write_traces(folder: Path, traces: Sequence[Trace], shape: Shape) -> tuple[Path, Path]:
    table, _ = main_table(traces, shape.logprob_grid)
    write_main(folder / "main", table, INFO)
    sidecar = SidecarInfo(fingerprint="0" * 64, shard=0, codec=shape.hidden_codec, hidden_size=shape.hidden_size,
                          layers=shape.layers)
    write_sidecar(folder / "hidden", [encode_layers(t, shape.hidden_codec) for t in traces],
                  [t.ordinal for t in traces], sidecar)
    return folder / "main", folder / "hidden"


def read_traces(main: Path, hidden: Path) -> list[Trace]:
    return list(traces_from_tables(read_table(main), read_table(hidden), read_sidecar_info(hidden)))


def assert_same(found: Trace, wanted: Trace, codec: str) -> None:
    for name in Trace.__dataclass_fields__:
        if name == "hidden":
            continue
        a, b = getattr(found, name), getattr(wanted, name)
        assert np.array_equal(a, b) if isinstance(b, np.ndarray) else a == b, name
        assert not isinstance(b, np.ndarray) or a.dtype == b.dtype, name
    assert set(found.hidden) == set(wanted.hidden)
    for layer, hidden_TH in wanted.hidden.items():
        stored = hidden_TH if codec == "f32" or hidden_TH.dtype == np.uint16 else bf16_bits(hidden_TH)
        assert np.array_equal(found.hidden[layer], stored), layer


shapes = st.builds(
    Shape, vocab_size=st.just(24), hidden_size=st.integers(1, 9), num_layers=st.just(4),
    layers=st.lists(st.integers(0, 4), unique=True, min_size=1).map(lambda n: tuple(sorted(n))),
    hidden_codec=st.sampled_from(["bf16", "bf16-split", "f32"]), top_k=st.integers(1, 24),
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
@given(st.sampled_from([1 / 32, 1 / 4, 0.1]), st.integers(1, 64), st.integers(0, 2**31))
def test_the_measured_head_error_is_the_one_a_float64_oracle_finds(grid: float, top_k: int, seed: int) -> None:
    traces = [random_trace(o, Shape(top_k=top_k), seed) for o in range(3)]
    table, measured = main_table(traces, grid)
    errors = []
    for trace, stored in zip(traces, table["topk_logprobs"].to_pylist(), strict=True):
        edges = np.cumsum(trace.topk_counts_R)[:-1]
        exact = np.split(trace.topk_logprobs_N.astype(np.float64), edges)
        rounded = np.split(np.array(stored, np.float64), edges)
        errors += [0.5 * np.abs(np.exp(a) - np.exp(b)).sum() for a, b in zip(exact, rounded, strict=True)]
    assert measured.head_tv_error_max == pytest.approx(max(errors), rel=1e-9)
    assert measured.head_tv_error_mean == pytest.approx(np.mean(errors), rel=1e-9)
    assert measured.head_tv_error_max <= (np.exp(grid / 2) - 1) / 2 + 1e-6
    masses = np.concatenate([t.tail_mass_R for t in traces]).astype(np.float64)
    assert measured.tail_mass_mean == pytest.approx(masses.mean(), rel=1e-5)


def test_without_a_grid_the_measured_error_is_zero() -> None:
    _, measured = main_table([random_trace(0)], 0.0)
    assert (measured.head_tv_error_max, measured.head_tv_error_mean) == (0, 0)


def test_a_shard_without_traces_can_be_written_and_read(tmp_path: Path) -> None:
    main, hidden = write_traces(tmp_path, [], Shape())
    assert read_traces(main, hidden) == []
    assert read_table(main).schema.equals(MAIN_SCHEMA)


def test_one_layer_can_be_read_without_the_others(tmp_path: Path) -> None:
    shape = Shape()
    main, hidden = write_traces(tmp_path, [random_trace(5, shape)], shape)
    part = read_table(hidden, ["ordinal", layer_column(2)])
    (trace,) = traces_from_tables(read_table(main), part, read_sidecar_info(hidden))
    assert set(trace.hidden) == {2}


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


def test_a_flipped_bit_anywhere_is_detected_or_harmless_and_never_gives_other_values(tmp_path: Path) -> None:
    make_dataset(tmp_path, 4)
    path = tmp_path / shard_name(0)
    data, whole = path.read_bytes(), read_table(path)
    random = np.random.default_rng(0)
    detected = 0
    for at in random.integers(0, len(data), 1000):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        try:
            table = read_table(path)
            read_shard_info(path)
            traces = list(traces_from_tables(table, None, None))
        except (DamageError, MismatchError, CaptureError):
            detected += 1
        else:
            assert table.equals(whole), f"byte {at}"
            assert len(traces) == 4
    # What is left are statistics, page indexes and other parts of the file that decoding does not use.
    assert detected > 500


def test_every_flipped_bit_of_a_page_is_detected_by_its_checksum(tmp_path: Path) -> None:
    main, hidden = write_traces(tmp_path, [random_trace(i) for i in range(4)], Shape())
    for path in (main, hidden):
        with pq.ParquetFile(path) as file:
            column = file.metadata.row_group(0).column(file.metadata.num_columns - 1)
        data = path.read_bytes()
        begin = column.dictionary_page_offset or column.data_page_offset
        stop = begin + column.total_compressed_size
        for at in range(stop - 40, stop):
            flipped = bytearray(data)
            flipped[at] ^= 0x10
            path.write_bytes(flipped)
            with pytest.raises(DamageError, match=path.name):
                read_table(path)


def test_a_truncated_shard_is_refused_at_any_length(tmp_path: Path) -> None:
    main, _ = write_traces(tmp_path, [random_trace(0)], Shape())
    data = main.read_bytes()
    for length in (0, 3, 4, len(data) // 2, len(data) - 9, len(data) - 8, len(data) - 1):
        main.write_bytes(data[:length])
        with pytest.raises(DamageError, match="cannot be read"):
            read_table(main)
        with pytest.raises(DamageError, match="cannot be read"):
            read_shard_info(main)


def test_a_missing_shard_is_damage_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match=r"nothing\.parquet cannot be read"):
        read_table(tmp_path / "nothing.parquet")


def test_a_foreign_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["hello"]}), tmp_path / "foreign")
    with pytest.raises(MismatchError, match="was not written by distill-pipe"):
        read_shard_info(tmp_path / "foreign")
    with pytest.raises(DamageError, match="column ordinal is missing"):
        list(traces_from_tables(read_table(tmp_path / "foreign"), None, None))


def test_a_renamed_column_is_damage_and_no_crash(tmp_path: Path) -> None:
    table, _ = main_table([random_trace(0)], 0.0)
    wrong = table.rename_columns([name.replace("tail_mass", "tail_mess") for name in table.column_names])
    with pytest.raises(DamageError, match="column tail_mass is missing"):
        list(traces_from_tables(wrong, None, None))


@pytest.mark.parametrize("version", [0, 2, 99])
def test_an_unknown_format_version_is_refused_with_both_versions(tmp_path: Path, version: int) -> None:
    table, _ = main_table([random_trace(0)], 0.0)
    write_main(tmp_path / "main", table, msgspec.structs.replace(INFO, format_version=version))
    with pytest.raises(MismatchError, match=f"format version {version}; this distill-pipe reads version 1"):
        read_shard_info(tmp_path / "main")


@pytest.mark.parametrize("record", [b"{}", b"not json", b"\xff\xfe", b'{"format_version": "two"}', b"[1]"])
def test_a_footer_record_that_is_no_record_is_refused(tmp_path: Path, record: bytes) -> None:
    table, _ = main_table([random_trace(0)], 0.0)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: record}), tmp_path / "main")
    with pytest.raises(MismatchError, match="cannot be read"):
        read_shard_info(tmp_path / "main")


def test_a_shard_that_breaks_an_invariant_is_refused_though_its_checksums_are_right(tmp_path: Path) -> None:
    table, _ = main_table([random_trace(7)], 0.0)
    at = table.column_names.index("tail_mass")
    spoilt = table.set_column(at, MAIN_SCHEMA.field(at), pa.array([[2.0] * len(table["tail_mass"][0])], pa.list_(
        pa.float32())))
    write_main(tmp_path / "main", spoilt, INFO)
    with pytest.raises(CaptureError, match="prompt 7: a tail mass"):
        list(traces_from_tables(read_table(tmp_path / "main"), None, None))


def test_the_fragment_knows_what_a_page_checksum_cannot(tmp_path: Path) -> None:
    make_dataset(tmp_path, 4)
    fragment = read_fragment(LocalRoot(tmp_path), 0)
    assert fragment is not None
    assert fragment.info == read_shard_info(tmp_path / shard_name(0))
    assert fragment.file.size == (tmp_path / shard_name(0)).stat().st_size
