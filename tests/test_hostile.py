"""Catches a dataset that was damaged or made to harm, and is believed: by a trainer's reader, or by `verify`.

`test_parquet.py` attacks single files; here whole datasets are read as users read them. Whatever was changed, a reader
must give the right numbers or name what is wrong, in one of our errors.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_datasets import Shape, commit_traces, make_dataset, random_trace, start_run

from distill_pipe.consume.reader import Batch, ShardReader
from distill_pipe.errors import DamageError, DistillPipeError, MismatchError
from distill_pipe.store.commit import adopt_shard
from distill_pipe.store.manifest import FileRef, Fragment, encode_record, fragment_name, read_fragment, shard_name
from distill_pipe.store.parquet_writer import METADATA_KEY
from distill_pipe.store.root import MAX_RECORD_BYTES, LocalRoot, sha256_of
from distill_pipe.store.verify import verify

SHAPE = Shape(hidden_codec="q8", prompts_per_shard=4)
FLIPS = 250
MEMORY = 1 << 30
READ = """
import sys
from distill_pipe.consume.reader import ShardReader
from distill_pipe.errors import DamageError
try:
    for batch in ShardReader(sys.argv[1], layers=(1,)):
        pass
except DamageError as error:
    print(error)
# Not ru_maxrss: a process inherits that of the one that started it.
print(next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture
def root(tmp_path: Path) -> LocalRoot:
    make_dataset(tmp_path / "dataset", 8, SHAPE)
    return LocalRoot(tmp_path / "dataset")


def fragment_of(root: LocalRoot, shard: int) -> Fragment:
    fragment = read_fragment(root, shard)
    assert fragment is not None
    return fragment


def sidecar_path(root: LocalRoot, shard: int = 0) -> Path:
    ref = fragment_of(root, shard).info.hidden
    assert ref is not None
    return root.local(ref.name)


def batches(root: LocalRoot) -> list[Batch]:
    return list(ShardReader(root.path, layers=(1, 4)))


def outcome(root: LocalRoot) -> list[Batch] | DistillPipeError:
    """What a trainer gets: batches, or the error that names what is wrong."""
    try:
        return batches(root)
    except DistillPipeError as error:
        return error


def same(a: Batch, b: Batch) -> bool:
    return (torch.equal(a.token_ids_T, b.token_ids_T) and torch.equal(a.rows_R, b.rows_R)
            and torch.equal(a.target.topk_ids_RK, b.target.topk_ids_RK)
            and torch.equal(a.target.topk_logprobs_RK, b.target.topk_logprobs_RK)
            and torch.equal(a.target.tail_ids_RM, b.target.tail_ids_RM)
            and torch.equal(a.target.tail_logprobs_RM, b.target.tail_logprobs_RM)
            and torch.equal(a.target.tail_mass_R, b.target.tail_mass_R)
            and all(torch.equal(a.hidden[n], b.hidden[n]) for n in a.hidden))


def flips(data: bytes, seed: int) -> Iterator[bytes]:
    """The data with one bit changed, at positions spread evenly over all of it."""
    random = np.random.default_rng(seed)
    for at in np.linspace(0, len(data) - 1, FLIPS).astype(int):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(random.integers(8))
        yield bytes(flipped)


@pytest.mark.parametrize("which", [lambda r: r.local(shard_name(0)), sidecar_path], ids=["main", "sidecar"])
def test_a_bit_flipped_anywhere_in_a_file_never_gives_a_trainer_other_numbers(
        root: LocalRoot, which: Callable[[LocalRoot], Path]) -> None:
    whole, path = batches(root), which(root)
    refused = 0
    for flipped in flips(path.read_bytes(), seed=1):
        path.write_bytes(flipped)
        found = outcome(root)
        if isinstance(found, DistillPipeError):
            assert isinstance(found, DamageError)
            assert path.name in str(found)
            refused += 1
        else:
            assert all(same(a, b) for a, b in zip(found, whole, strict=True))
    # In so small a file, two thirds are statistics, page indexes and names that decoding does not use.
    assert refused > FLIPS // 4


@pytest.mark.parametrize("which", [lambda r: r.local(shard_name(0)), sidecar_path,
                                   lambda r: r.local("plan/part-0000.parquet")], ids=["main", "sidecar", "plan"])
def test_verify_finds_a_bit_flipped_anywhere(root: LocalRoot, which: Callable[[LocalRoot], Path]) -> None:
    path = which(root)
    for flipped in flips(path.read_bytes(), seed=2):
        path.write_bytes(flipped)
        report = verify(root)
        assert not report.clean
        assert any(path.name in problem for problem in report.problems)


def test_verify_finds_a_bit_flipped_in_a_main_shard_whose_fragment_is_gone_or_it_changed_no_number(
        root: LocalRoot) -> None:
    whole, path = batches(root), root.local(shard_name(0))
    root.local(fragment_name(0)).unlink()
    for flipped in flips(path.read_bytes(), seed=3):
        path.write_bytes(flipped)
        if verify(root).clean:
            assert all(same(a, b) for a, b in zip(batches(root), whole, strict=True))


@pytest.mark.parametrize("which", [lambda r: r.local(shard_name(0)), sidecar_path], ids=["main", "sidecar"])
def test_a_file_cut_at_every_512_bytes_is_named(root: LocalRoot, which: Callable[[LocalRoot], Path]) -> None:
    path = which(root)
    data = path.read_bytes()
    for length in range(0, len(data), 512):
        path.write_bytes(data[:length])
        with pytest.raises(DamageError, match=path.name):
            batches(root)
        assert not verify(root).clean


def test_another_shard_under_our_name_is_refused(root: LocalRoot) -> None:
    root.local(shard_name(0)).write_bytes(root.local(shard_name(1)).read_bytes())
    assert not verify(root).clean
    with pytest.raises(DamageError, match="shard-0000000"):
        batches(root)
    root.local(fragment_name(0)).unlink()
    with pytest.raises(DamageError, match="belongs to another run or another shard"):
        batches(root)
    assert any("another" in problem for problem in verify(root).problems)


def test_a_shard_of_another_run_under_our_name_is_refused(root: LocalRoot, tmp_path: Path) -> None:
    other = Shape(hidden_codec="q8", prompts_per_shard=4, tail_samples=3)
    run = start_run(tmp_path / "other", 8, other)
    commit_traces(tmp_path / "other", run, [random_trace(i, other, seed=1) for i in range(8)])
    for name in (shard_name(0), fragment_name(0)):
        root.local(name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(DamageError, match="belongs to another run"):
        batches(root)
    assert any("another run" in problem for problem in verify(root).problems)


def forged(root: LocalRoot, path: Path) -> None:
    """Make the fragment of shard 0 agree with size and hash of a file that was replaced, and with nothing else."""
    fragment = fragment_of(root, 0)
    ref = FileRef(name=str(path.relative_to(root.path)), sha256=sha256_of(path), size=path.stat().st_size)
    if path == root.local(shard_name(0)):
        fragment = msgspec.structs.replace(fragment, file=ref)
    else:
        fragment = msgspec.structs.replace(fragment, info=msgspec.structs.replace(fragment.info, hidden=ref))
    root.local(fragment_name(0)).write_bytes(encode_record(fragment))


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """The file with other columns and the same record, as sound Parquet."""
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path, compression="zstd",
                   use_dictionary=False, write_page_checksum=True)


def swapped(table: pa.Table) -> pa.Table:
    at = table.column_names.index("topk_ids")
    return table.set_column(at, "topk_ids", table["topk_ids"].cast(pa.list_(pa.float32())))


def test_a_column_of_another_type_is_named(root: LocalRoot) -> None:
    path = root.local(shard_name(0))
    rewritten(path, swapped)
    forged(root, path)
    with pytest.raises(DamageError, match=r"shard-0000000\.parquet: column topk_ids is list<.*float>, expected"):
        batches(root)
    assert not verify(root).clean


def with_null(table: pa.Table, column: str) -> pa.Table:
    """The table with one null in a column: an element of a list, or the value itself."""
    at, kind = table.column_names.index(column), table.schema.field(column).type
    values = table[column].to_pylist()
    if pa.types.is_list(kind):
        values[0] = [None, *values[0][1:]]
    else:
        values[0] = None
    return table.set_column(at, table.schema.field(column), pa.array(values, kind))


@pytest.mark.parametrize("column", ["ordinal", "prompt_id", "token_ids", "loss_mask", "topk_counts", "topk_ids",
                                    "tail_logprobs", "layer_01", "scale_04"])
def test_a_null_where_none_may_be_is_named(root: LocalRoot, column: str) -> None:
    path = sidecar_path(root) if column.startswith(("layer", "scale")) else root.local(shard_name(0))
    rewritten(path, lambda table: with_null(table, column))
    forged(root, path)
    with pytest.raises(DamageError, match=f"{path.name}: column {column} holds nulls"):
        batches(root)
    assert not verify(root).clean


def changed(table: pa.Table, column: str, change: Callable[[list[int]], list[int]]) -> pa.Table:
    at, field = table.column_names.index(column), table.schema.field(column)
    return table.set_column(at, field, pa.array([change(v) for v in table[column].to_pylist()], field.type))


@pytest.mark.parametrize("column", ["token_ids", "topk_ids", "tail_ids"])
def test_a_token_id_outside_the_vocabulary_is_named(root: LocalRoot, column: str) -> None:
    path = root.local(shard_name(0))
    rewritten(path, lambda table: changed(table, column, lambda ids: [10**6, *ids[1:]]))
    forged(root, path)
    with pytest.raises(DamageError, match=r"shard-0000000.*token id 1000000 lies outside the vocabulary of 64"):
        batches(root)
    assert any("outside the vocabulary" in problem for problem in verify(root).problems)


def test_verify_finds_a_token_that_is_twice_in_a_head(root: LocalRoot) -> None:
    path = root.local(shard_name(0))
    rewritten(path, lambda table: changed(table, "topk_ids", lambda ids: [ids[1], *ids[1:]]))
    forged(root, path)
    assert any("a head holds a token twice" in problem for problem in verify(root).problems)


@pytest.mark.parametrize("claim", [{"rows": 10**6}, {"tokens": 10**12}])
def test_verify_finds_a_record_that_claims_more_than_the_shard_holds(root: LocalRoot, claim: dict[str, int]) -> None:
    path = root.local(shard_name(0))
    info = msgspec.structs.replace(fragment_of(root, 0).info, **claim)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: msgspec.json.encode(info)}), path, compression="zstd",
                   use_dictionary=False, write_page_checksum=True)
    ref = FileRef(name=shard_name(0), sha256=sha256_of(path), size=path.stat().st_size)
    root.local(fragment_name(0)).write_bytes(encode_record(Fragment(file=ref, info=info)))
    assert any("its record says" in problem for problem in verify(root).problems)


def test_a_record_that_forgets_the_sidecar_is_damage(root: LocalRoot) -> None:
    path = root.local(shard_name(0))
    info = msgspec.structs.replace(fragment_of(root, 0).info, hidden=None)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: msgspec.json.encode(info)}), path, compression="zstd",
                   use_dictionary=False, write_page_checksum=True)
    ref = FileRef(name=shard_name(0), sha256=sha256_of(path), size=path.stat().st_size)
    root.local(fragment_name(0)).write_bytes(encode_record(Fragment(file=ref, info=info)))
    with pytest.raises(DamageError, match="lacks the hidden-state sidecar"):
        batches(root)
    assert any("lacks a hidden-state sidecar" in problem for problem in verify(root).problems)


def test_a_folder_where_run_json_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(DamageError, match=r"run\.json cannot be read"):
        verify(LocalRoot(tmp_path))


def test_more_entries_than_the_record_allows_are_refused_before_they_are_unpacked(root: LocalRoot) -> None:
    path = root.local(shard_name(0))
    at = pq.read_schema(path).get_field_index("topk_ids")
    million = pa.array([[1] * 1_000_000] * 4, pa.list_(pa.int32()))
    rewritten(path, lambda table: table.set_column(at, "topk_ids", million))
    forged(root, path)
    with pytest.raises(DamageError, match=r"shard-0000000\.parquet.*topk_ids"):
        batches(root)


def test_blobs_that_unpack_to_gigabytes_are_refused_in_little_memory(root: LocalRoot) -> None:
    path = sidecar_path(root)
    table = pq.read_table(path)
    names = table.column_names
    zeros = pa.array([bytes(64 << 20)], pa.large_binary())
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False,
                          write_page_checksum=True) as writer:
        for _ in range(32):
            row = [zeros if n.startswith("layer") else table[n].combine_chunks()[:1] for n in names]
            writer.write_table(pa.table(row, table.schema))
    assert path.stat().st_size < 2 << 20, "two gigabytes a layer in less than 2 MB"
    forged(root, path)
    done = subprocess.run([sys.executable, "-c", READ, str(root.path)], capture_output=True, text=True, check=True)
    message, peak = done.stdout.splitlines()
    assert path.name in message
    assert 100 << 20 < int(peak) < MEMORY


FRAGMENTS = {
    "a name that leaves the root": b'"../../etc/passwd"', "an absolute name": b'"/etc/passwd"',
    "a name with NUL": b'"a\\u0000b"', "a number": b"7", "nothing": b"null", "a list": b"[]"}


@pytest.mark.parametrize("value", FRAGMENTS.values(), ids=FRAGMENTS)
def test_a_fragment_whose_names_lead_elsewhere_is_never_followed(root: LocalRoot, value: bytes) -> None:
    path, whole = root.local(fragment_name(0)), batches(root)
    ref = fragment_of(root, 0).info.hidden
    assert ref is not None
    path.write_bytes(path.read_bytes().replace(b'"' + ref.name.encode() + b'"', value))
    found = outcome(root)
    # Rebuilt from the footer, or refused; what lies outside was never opened.
    assert "root:" not in str(found) if isinstance(found, DistillPipeError) else all(
        same(a, b) for a, b in zip(found, whole, strict=True))
    assert verify(root).clean, "the fragment that cannot be trusted is left aside"


JUNK = {"empty": b"", "not JSON": b"{", "deep": b"[" * 100_000, "not UTF-8": b"\xff\xfe",
        "twice": b'{"file":1,"file":2}',
        "huge number": b'{"format_version": ' + b"9" * 5000 + b"}"}


@pytest.mark.parametrize("data", JUNK.values(), ids=JUNK)
def test_a_fragment_that_is_junk_is_rebuilt_from_its_shard(root: LocalRoot, data: bytes) -> None:
    run, whole = ShardReader(root.path).run, fragment_of(root, 0)
    root.local(fragment_name(0)).write_bytes(data)
    assert adopt_shard(root, run, 0) == whole
    assert fragment_of(root, 0) == whole


def test_a_record_larger_than_any_of_ours_is_not_read(root: LocalRoot) -> None:
    root.local("run.json").write_bytes(b" " * (MAX_RECORD_BYTES + 1))
    with pytest.raises(DamageError, match="no record is that large"):
        ShardReader(root.path)


def test_a_footer_record_that_claims_another_place_is_refused(root: LocalRoot) -> None:
    path = root.local(shard_name(0))
    table = pq.read_table(path)
    info = fragment_of(root, 0).info
    record = msgspec.json.encode(msgspec.structs.replace(info, first_ordinal=10**9))
    pq.write_table(table.replace_schema_metadata({METADATA_KEY: record}), path)
    root.local(fragment_name(0)).unlink()
    with pytest.raises((DamageError, MismatchError)):
        adopt_shard(root, ShardReader(root.path).run, 0)
    assert not verify(root).clean
