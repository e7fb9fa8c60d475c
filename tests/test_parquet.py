"""Reading damaged and hostile Parquet files. Bombs are made by hand, page by page, so that building one is cheap."""

import random
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_datasets import Shape, make_dataset

from distill_pipe.errors import DamageError, MismatchError
from distill_pipe.store.pages import BINARY, I32, I32S, I64, STRINGS, STRUCT, STRUCTS, Fields, encode, read_page_header
from distill_pipe.store.parquet import Limit, check_table, read_footer_value, read_table
from distill_pipe.store.parquet_writer import METADATA_KEY, write_table

INT32 = 1
DATA, DICTIONARY = 0, 2
PLAIN, RLE, RLE_DICTIONARY = 0, 3, 8
UNCOMPRESSED, ZSTD = 0, 6
TYPES = {"int32": pa.int32(), "list": pa.list_(pa.int32()), "bools": pa.list_(pa.bool_()), "string": pa.string()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A main shard and its sidecar, as `generate` leaves them."""
    root = tmp_path_factory.mktemp("dataset")
    make_dataset(root, 8, Shape(prompts_per_shard=8))
    return {folder: next((root / folder / "train").rglob("*.parquet")) for folder in ("data", "hidden_states")}


def exact_limits(table: pa.Table) -> dict[str, Limit]:
    limits = {}
    for field in table.schema:
        column = table[field.name].to_pylist()
        if pa.types.is_list(field.type):
            limits[field.name] = Limit(sum(max(len(entries), 1) for entries in column))
        elif field.type in (pa.string(), pa.large_binary()):
            limits[field.name] = Limit(len(column), sum(len(value) + 4 for value in column if value is not None))
        else:
            limits[field.name] = Limit(len(column))
    return limits


def truth(path: Path) -> tuple[pa.Table, pa.Schema, dict[str, Limit]]:
    table = pq.read_table(path).replace_schema_metadata(None)
    return table, table.schema, exact_limits(table)


def test_a_shard_and_its_sidecar_are_read_within_exact_limits(files: dict[str, Path]) -> None:
    for path in files.values():
        table, schema, limits = truth(path)
        assert read_table(path, schema, limits, nullable=["domain"]).equals(table, check_metadata=True)


def test_no_column_may_have_a_value_too_many(files: dict[str, Path]) -> None:
    for path in files.values():
        _, schema, limits = truth(path)
        for name, limit in limits.items():
            tight = limits | {name: Limit(limit.values - 1, limit.value_bytes)}
            with pytest.raises(DamageError, match=f"{path.name}: row group 0, column {name}: more than"):
                read_table(path, schema, tight)


def test_strings_may_not_have_more_bytes_than_allowed(tmp_path: Path) -> None:
    table = pa.table({"x": ["a" * 1000] * 50})
    write_table(tmp_path / "x", table)
    assert read_table(tmp_path / "x", table.schema, {"x": Limit(50, 50 * 1004)}).equals(table)
    with pytest.raises(DamageError, match="row group 0, column x: more than 40000 bytes"):
        read_table(tmp_path / "x", table.schema, {"x": Limit(50, 40000)})


def test_only_the_columns_of_the_schema_are_read_in_its_order(files: dict[str, Path]) -> None:
    table, schema, limits = truth(files["data"])
    part = pa.schema([schema.field("topk_ids"), schema.field("ordinal")])
    assert read_table(files["data"], part, limits).equals(table.select(["topk_ids", "ordinal"]))


def test_many_row_groups_pages_and_empty_tables_are_read(tmp_path: Path) -> None:
    table = pa.table({"a": np.arange(1000),
                      "b": pa.array([[1.5] * (i % 7) for i in range(1000)], pa.list_(pa.float32())),
                      "c": [None if i % 3 else str(i) for i in range(1000)],
                      "d": pa.array([[True] * (i % 3) for i in range(1000)], pa.list_(pa.bool_()))})
    for options in ({}, {"data_page_version": "2.0"}, {"compression": "none"}, {"compression": "snappy"},
                    {"compression": "none", "data_page_version": "2.0"}):
        for held in (table, table.slice(0, 1), table.slice(0, 0)):
            pq.write_table(held, tmp_path / "x", **{"compression": "zstd", "use_dictionary": False,
                           "write_page_checksum": True, "row_group_size": 300, "data_page_size": 500,
                           "write_batch_size": 50} | options)
            assert read_table(tmp_path / "x", held.schema, exact_limits(held), nullable=["c"]).equals(held)


def test_a_column_that_is_not_in_the_schema_is_not_decoded(tmp_path: Path) -> None:
    bomb = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3, np.int32)), ["b" * 100])
    table = pa.table({"x": [1, 2, 3], "later": bomb, "y": [["deep"], [], None]})
    pq.write_table(table, tmp_path / "x", compression="zstd", use_dictionary=["later"], write_page_checksum=True)
    schema = pa.schema([("x", pa.int64())])
    assert read_table(tmp_path / "x", schema, {"x": Limit(3)}).to_pydict() == {"x": [1, 2, 3]}


@pytest.mark.parametrize(("found", "wanted", "message"), [
    (pa.int64(), pa.int32(), "column x is int64, expected int32"),
    (pa.int64(), pa.string(), "column x is int64, expected string"),
    (pa.binary(), pa.string(), "column x is binary, expected string"),
    (pa.float32(), pa.list_(pa.float32()), "column x is float, expected list"),
    (pa.list_(pa.int64()), pa.list_(pa.int32()), "column x is list<element: int64>, expected list<item: int32>"),
    (pa.struct([("a", pa.int32())]), pa.int32(), "column x is neither a plain column nor a plain list"),
])
def test_a_column_of_another_type_is_refused(tmp_path: Path, found: pa.DataType, wanted: pa.DataType,
                                             message: str) -> None:
    write_table(tmp_path / "file", pa.table({"x": pa.nulls(3, found)}))
    with pytest.raises(DamageError, match=f"file: {message}"):
        read_table(tmp_path / "file", pa.schema([("x", wanted)]), {"x": Limit(3, 100)})


def test_missing_columns_missing_files_and_foreign_files_are_named(tmp_path: Path, files: dict[str, Path]) -> None:
    _, schema, limits = truth(files["data"])
    pq.write_table(pa.table({"text": ["someone", "else's"]}), tmp_path / "shard.parquet")
    with pytest.raises(DamageError, match=r"shard\.parquet: column ordinal is missing"):
        read_table(tmp_path / "shard.parquet", schema, limits)
    with pytest.raises(MismatchError, match=r"shard\.parquet was not written by distill-pipe"):
        read_footer_value(tmp_path / "shard.parquet", METADATA_KEY)
    with pytest.raises(DamageError, match=r"none\.parquet is missing"):
        read_table(tmp_path / "none.parquet", schema, limits)
    with pytest.raises(DamageError, match=r"none\.parquet is missing"):
        read_footer_value(tmp_path / "none.parquet", METADATA_KEY)
    with pytest.raises(DamageError, match="cannot be read"):
        read_table(tmp_path, schema, limits)


def test_the_footer_value_is_the_one_that_pyarrow_reads(files: dict[str, Path]) -> None:
    for path in files.values():
        assert read_footer_value(path, METADATA_KEY) == pq.read_metadata(path).metadata[METADATA_KEY]


def test_a_page_without_a_checksum_is_refused(tmp_path: Path) -> None:
    table = pa.table({"x": [1, 2, 3]})
    pq.write_table(table, tmp_path / "x", compression="zstd", use_dictionary=False)
    with pytest.raises(DamageError, match="row group 0, column x: a page has no checksum"):
        read_table(tmp_path / "x", table.schema, {"x": Limit(3)})


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def run(length: int, value: int) -> bytes:
    """A run of equal levels or dictionary indices of at most 8 bits."""
    return varint(length << 1) + bytes([value])


def levels(*runs: bytes) -> bytes:
    return len(b"".join(runs)).to_bytes(4, "little") + b"".join(runs)


def page(kind: int, values: int, encoding: int, body: bytes, page_bytes: int | None = None) -> bytes:
    header: Fields = {1: (I32, values), 2: (I32, encoding), 3: (I32, RLE), 4: (I32, RLE)}
    crc = zlib.crc32(body)
    return encode({1: (I32, kind), 2: (I32, len(body) if page_bytes is None else page_bytes), 3: (I32, len(body)),
                   4: (I32, crc - (crc >> 31 << 32)), 5 if kind == DATA else 7: (STRUCT, header)}) + body


def write_by_hand(path: Path, kind: str, pages: Sequence[bytes], values: int, rows: int, **other: int) -> None:
    """A file of one column `x` in one row group."""
    physical: Fields = {1: (I32, {"int32": INT32, "list": INT32, "bools": 0, "string": 6}[kind]), 3: (I32, 1)}
    elements: list[Fields] = [physical | {4: (BINARY, b"x")} | ({6: (I32, 0)} if kind == "string" else {})]
    if kind in ("list", "bools"):
        elements = [{3: (I32, 1), 4: (BINARY, b"x"), 5: (I32, 1), 6: (I32, 3)},
                    {3: (I32, 2), 4: (BINARY, b"list"), 5: (I32, 1)}, physical | {4: (BINARY, b"element")}]
    first = 4 + len(pages[0]) if other.get("dictionary") else 4
    meta: Fields = {1: physical[1], 2: (I32S, [PLAIN, RLE, RLE_DICTIONARY]), 3: (STRINGS, [b"x"]),
                    4: (I32, other.get("codec", UNCOMPRESSED)), 5: (I64, values), 6: (I64, 0),
                    7: (I64, sum(map(len, pages))), 9: (I64, first)}
    if other.get("dictionary"):
        meta[11] = (I64, 4)
    group: Fields = {1: (STRUCTS, [{2: (I64, 0), 3: (STRUCT, meta)}]), 2: (I64, 0), 3: (I64, rows)}
    footer = encode({1: (I32, 2), 2: (STRUCTS, [{4: (BINARY, b"schema"), 5: (I32, 1)}, *elements]), 3: (I64, rows),
                     4: (STRUCTS, [group])})
    path.write_bytes(b"PAR1" + b"".join(pages) + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def dictionary_strings(path: Path, count: int) -> None:
    """`count` strings of a mebibyte, all the same."""
    entry = (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
    packed = pa.compress(entry, "zstd", asbytes=True)
    body = levels(run(count, 1)) + b"\1" + run(count, 0)
    indices = page(DATA, count, RLE_DICTIONARY, pa.compress(body, "zstd", asbytes=True), len(body))
    write_by_hand(path, "string", [page(DICTIONARY, 1, PLAIN, packed, len(entry)), indices], count, count,
                  dictionary=1, codec=ZSTD)


def one_long_list(path: Path, count: int) -> None:
    """One row of `count` equal numbers, a run of the dictionary's only entry."""
    body = levels(run(1, 0), run(count - 1, 1)) + levels(run(count, 3)) + b"\1" + run(count, 0)
    write_by_hand(path, "list", [page(DICTIONARY, 1, PLAIN, b"\7\0\0\0"), page(DATA, count, RLE_DICTIONARY, body)],
                  count, 1, dictionary=1)


def run_of_booleans(path: Path, count: int) -> None:
    """One row of `count` equal booleans: no dictionary is needed for a run of these."""
    body = levels(run(1, 0), run(count - 1, 1)) + levels(run(count, 3)) + levels(run(count, 1))
    write_by_hand(path, "bools", [page(DATA, count, RLE, body)], count, 1)


def nulls_in_runs(path: Path, count: int) -> None:
    """`count` rows that are null: their levels are one run, and there are no values."""
    write_by_hand(path, "int32", [page(DATA, count, PLAIN, levels(run(count, 0)))], count, count)


def zstd_zeros(path: Path, count: int) -> None:
    """`count` strings of 64 mebibytes, of which zstd leaves some kilobytes each."""
    body = levels(run(1, 1)) + (1 << 26).to_bytes(4, "little") + bytes(1 << 26)
    packed = page(DATA, 1, PLAIN, pa.compress(body, "zstd", asbytes=True), len(body))
    write_by_hand(path, "string", [packed] * count, count, count, codec=ZSTD)


Bomb = Callable[[Path, int], None]
BOMBS: Mapping[Bomb, tuple[str, int, int]] = {
    dictionary_strings: ("string", 3, 1 << 14), one_long_list: ("list", 1000, 1 << 30),
    run_of_booleans: ("bools", 1000, 1 << 30), nulls_in_runs: ("int32", 1000, (1 << 31) - 1),
    zstd_zeros: ("string", 2, 64)}


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda b: b.__name__)
def test_the_bombs_are_files_that_pyarrow_would_decode(tmp_path: Path, bomb: Bomb) -> None:
    kind, small, large = BOMBS[bomb]
    bomb(tmp_path / "small", small)
    column = pq.ParquetFile(tmp_path / "small", page_checksum_verification=True).read()["x"].combine_chunks()
    assert len(column.values if pa.types.is_list(TYPES[kind]) else column) == small
    bomb(tmp_path / "large", large)
    assert (tmp_path / "large").stat().st_size < 1 << 20


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda b: b.__name__)
def test_a_bomb_is_refused_without_being_unpacked(tmp_path: Path, bomb: Bomb) -> None:
    kind, _, large = BOMBS[bomb]
    bomb(tmp_path / "bomb", large)
    assert "bomb: row group 0, column x: " in refusal(tmp_path / "bomb", kind)


def write_rows_claim(path: Path) -> None:
    write_by_hand(path, "int32", [page(DATA, 1, PLAIN, levels(run(1, 1)) + bytes(4))], 1, 1 << 31)


def write_values_claim(path: Path) -> None:
    write_by_hand(path, "int32", [page(DATA, 1, PLAIN, levels(run(1, 1)) + bytes(4))], 1 << 31, 1 << 31)


def write_page_claim(path: Path) -> None:
    body = levels(run(1, 1)) + bytes(4)
    write_by_hand(path, "int32", [page(DATA, 1, PLAIN, body, (1 << 31) - 1)], 1, 1, codec=ZSTD)


def write_page_beyond_its_chunk(path: Path) -> None:
    whole = page(DATA, 1, PLAIN, levels(run(1, 1)) + bytes(4))
    write_by_hand(path, "int32", [whole[:-4]], 1, 1)


def write_footer_length(path: Path) -> None:
    path.write_bytes(b"PAR1" + bytes(100) + (1 << 31).to_bytes(4, "little") + b"PAR1")


def write_footer_of_nothing(path: Path) -> None:
    """16 MiB that parse as a list of empty structs."""
    footer = b"\x19\xfc" + varint(15 << 20) + bytes((15 << 20) + 1)
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def write_deep_schema(path: Path) -> None:
    """A schema of a hundred thousand groups in each other; without a depth limit, pyarrow overflows the stack."""
    group: Fields = {3: (I32, 0), 4: (BINARY, b"x"), 5: (I32, 1)}
    footer = encode({1: (I32, 2), 2: (STRUCTS, [group] * 100_000 + [{1: (I32, 1), 3: (I32, 0), 4: (BINARY, b"x")}]),
                     3: (I64, 0), 4: (STRUCTS, [])})
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


LIES = (write_rows_claim, write_values_claim, write_page_claim, write_page_beyond_its_chunk, write_footer_length,
        write_footer_of_nothing, write_deep_schema)


@pytest.mark.parametrize("lie", LIES, ids=lambda b: b.__name__)
def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path: Path, lie: Callable[[Path], None]) -> None:
    lie(tmp_path / "lie")
    assert str(tmp_path / "lie") in refusal(tmp_path / "lie", "int32")


CHILD = """
import sys
from pathlib import Path
import pyarrow as pa
from distill_pipe.errors import DamageError
from distill_pipe.store.parquet import Limit, read_table
types = {"int32": pa.int32(), "list": pa.list_(pa.int32()), "bools": pa.list_(pa.bool_()), "string": pa.string()}
try:
    read_table(Path(sys.argv[1]), pa.schema([("x", types[sys.argv[2]])]), {"x": Limit(100_000, 1 << 20)})
except DamageError as error:
    print(error)
# Not ru_maxrss: a process inherits that of the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def refusal(path: Path, kind: str) -> str:
    """What a process says that reads the file; it must stay below a gigabyte."""
    child = subprocess.run([sys.executable, "-c", CHILD, str(path), kind], capture_output=True, text=True, check=True)
    *message, kilobytes = child.stdout.strip().split("\n")
    assert int(kilobytes) < 1 << 20
    assert len(message) == 1
    return message[0]


def test_a_truncated_file_is_named(tmp_path: Path, files: dict[str, Path]) -> None:
    for whole in files.values():
        _, schema, limits = truth(whole)
        data = whole.read_bytes()
        for length in range(0, len(data), 512):
            (tmp_path / "cut.parquet").write_bytes(data[:length])
            with pytest.raises(DamageError, match=r"cut\.parquet"):
                read_table(tmp_path / "cut.parquet", schema, limits)


def regions(path: Path) -> dict[str, list[int]]:
    """The positions of each part of a file."""
    size, metadata = path.stat().st_size, pq.read_metadata(path)
    footer = size - 8 - metadata.serialized_size
    found: dict[str, list[int]] = {"magic": [*range(4), *range(size - 8, size)], "footer": [*range(footer, size - 8)],
                                   "header": [], "body": []}
    with pa.OSFile(str(path)) as source:
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                position = chunk.data_page_offset
                end = position + chunk.total_compressed_size
                while position < end:
                    header = read_page_header(source, position, end)
                    body = position + header.header_bytes
                    found["header"] += range(position, body)
                    position = body + header.compressed_bytes
                    found["body"] += range(body, position)
    found["index"] = [*range(position, footer)]
    return found


def is_refused(path: Path, schema: pa.Schema, limits: Mapping[str, Limit], nullable: Sequence[str] = ("domain",)
               ) -> bool:
    """Whether a check without reading finds fault with a file."""
    try:
        check_table(path, schema, limits, nullable)
    except DamageError:
        return True
    return False


def test_a_check_in_little_memory_refuses_what_a_read_refuses(tmp_path: Path, files: dict[str, Path]) -> None:
    for path in files.values():
        _, schema, limits = truth(path)
        assert not is_refused(path, schema, limits)
        for name, limit in limits.items():
            assert is_refused(path, schema, limits | {name: Limit(limit.values - 1, limit.value_bytes)})
    for column in (pa.array([1, 2, None, 4]), pa.array([[1], [], None, [4]]), pa.array([[1], [2], [], [None]])):
        table = pa.table({"x": column})
        pq.write_table(table, tmp_path / "x", row_group_size=2, use_dictionary=False, write_page_checksum=True)
        for nullable in ([], ["x"]):
            assert is_refused(tmp_path / "x", table.schema, {"x": Limit(4)}, nullable) == (not nullable)


def test_a_flipped_bit_never_changes_what_is_read(tmp_path: Path, files: dict[str, Path]) -> None:
    """Page checksums cover the bodies; headers and footer are caught by saying everything twice."""
    dice, damaged = random.Random(7), tmp_path / "flipped.parquet"
    raised: Counter[str] = Counter()
    for whole in files.values():
        table, schema, limits = truth(whole)
        data = whole.read_bytes()
        for region, positions in regions(whole).items():
            for position in dice.choices(positions, k=150):
                changed = bytearray(data)
                changed[position] ^= 1 << dice.randrange(8)
                damaged.write_bytes(changed)
                message = None
                try:
                    found = read_table(damaged, schema, limits, nullable=["domain"])
                except DamageError as error:
                    message = str(error)
                assert is_refused(damaged, schema, limits) == (message is not None), (region, position)
                if message is None:
                    assert found.equals(table, check_metadata=True), (region, position)
                else:
                    raised[region] += 1
                    assert str(damaged) in message
                    assert region != "body" or ": row group 0, column " in message
    assert raised["body"] == raised["header"] == raised["magic"] == 300
    assert raised["index"] == 0


def test_damage_in_a_later_row_group_is_named(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3, 4], "b": ["one", "two", "three", "four"]})
    pq.write_table(table, tmp_path / "x", row_group_size=2, use_dictionary=False, write_page_checksum=True)
    chunk = pq.read_metadata(tmp_path / "x").row_group(1).column(1)
    data = bytearray((tmp_path / "x").read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DamageError, match="x: row group 1, column b: "):
        read_table(tmp_path / "x", table.schema, {"a": Limit(4), "b": Limit(4, 100)})
