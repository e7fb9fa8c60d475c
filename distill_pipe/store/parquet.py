"""Reading Parquet files of ours that may be damaged, or made to harm.

A file is trusted no further than the records that describe it allow: what a column may hold at the most is known before
anything is unpacked, and a file that claims more is refused (see `pages`). pyarrow never parses the file's own footer
then, but one made of the few numbers that were checked: it can decode nothing else. After that, page checksums decide.
The trade-off: footer and page headers are parsed in Python, which costs a millisecond or two per file; and files that
are valid Parquet, but not what our writer writes, are refused.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distill_pipe.errors import DamageError, MismatchError
from distill_pipe.store.pages import (
    BINARY,
    I32,
    I32S,
    I64,
    STRINGS,
    STRUCT,
    STRUCTS,
    Chunk,
    CompactReader,
    Fields,
    Limit,
    MalformedError,
    PageWalk,
    binary,
    encode,
    integer,
    items,
    struct,
    structs,
)

__all__ = ["Limit", "check_table", "read_footer_value", "read_table"]

_MAGIC: Final = b"PAR1"
MAX_FOOTER_BYTES: Final = 16 << 20
# pyarrow hands on what its C++ throws: mostly ArrowException and OSError, but also bad_alloc, out_of_range and others.
_FAILURES: Final = (OSError, pa.ArrowException, ValueError, RuntimeError, MemoryError, IndexError, OverflowError)
# Codecs that every pyarrow can unpack: none, Snappy, gzip, Brotli, zstd, LZ4.
_CODECS = (0, 1, 2, 4, 6, 7)


@dataclass(frozen=True, slots=True)
class _Column:
    """A column that is read: its part of the footer's schema, and which of the leaves it is."""

    name: str
    elements: list[Fields]
    leaf: int

    @property
    def is_list(self) -> bool:
        return len(self.elements) > 1


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group: its rows, and the chunks of the columns that are read."""

    rows: int
    chunks: list[Chunk]


def read_table(path: Path, schema: pa.Schema, limits: Mapping[str, Limit], nullable: Sequence[str] = ()) -> pa.Table:
    """The columns of `schema`, and no others, of a Parquet file of ours, with page checksums verified. `limits` has one
    limit for each; nothing is decoded before the file is known to stay within them. Columns that are not in `nullable`
    hold no nulls, neither as a list nor as an element.

    Raises:
        DamageError: the file is missing, truncated, corrupt, lacks a column of the schema or goes beyond a limit;
            names the file and, wherever possible, row group and column.
    """
    with opened(path) as source:
        table = pa.table(_decode(path, _checked_file(source, schema, limits)).columns, schema=schema)
    _refuse_nulls(path, table, nullable)
    return table


def check_table(path: Path, schema: pa.Schema, limits: Mapping[str, Limit], nullable: Sequence[str] = ()) -> None:
    """Raises DamageError where `read_table` would, with one column of one row group in memory at a time."""
    with opened(path) as source:
        file = _checked_file(source, schema, limits)
        for group, name in _places(file):
            _refuse_nulls(path, _decode_column(path, file, group, name), nullable)


def read_footer_value(path: Path, key: bytes) -> bytes:
    """The footer's key-value metadata entry `key`.

    Raises:
        DamageError: the file is missing, or its footer cannot be read.
        MismatchError: there is no such entry.
    """
    with opened(path) as source:
        for entry in structs(read_footer(source)[0], 5):
            if binary(entry, 1) == key:
                return binary(entry, 2)
    raise MismatchError(f"{path} was not written by distill-pipe")


def _checked_file(source: pa.NativeFile, schema: pa.Schema, limits: Mapping[str, Limit]) -> pq.ParquetFile:
    """The columns of `schema`, held against their limits and ready to be decoded."""
    footer, start = read_footer(source)
    parts, num_leaves = _columns(footer, schema.names)
    groups = _groups(footer, start, parts, num_leaves)
    file = pq.ParquetFile(source, metadata=_checked_footer(schema, parts, groups),
                          page_checksum_verification=True, arrow_extensions_enabled=False)
    _check_types(file.schema_arrow, schema)
    _check_pages(source, parts, groups, limits)
    return file


def _refuse_nulls(path: Path, table: pa.Table, nullable: Sequence[str]) -> None:
    for name, column in zip(table.column_names, table.columns, strict=True):
        elements = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if name not in nullable and column.null_count + elements.null_count:
            raise DamageError(f"{path}: column {name} holds nulls")


@contextmanager
def opened(path: Path) -> Iterator[pa.NativeFile]:
    """One handle for all that is read, so that what was checked is what is decoded. Failures become DamageError."""
    try:
        with pa.OSFile(str(path)) as source:
            yield source
    except FileNotFoundError:
        raise DamageError(f"{path} is missing") from None
    except MalformedError as error:
        raise DamageError(f"{path}: {error}") from error
    except _FAILURES as error:
        raise DamageError(f"{path} cannot be read: {error}") from error


def read_footer(source: pa.NativeFile) -> tuple[Fields, int]:
    """The footer, and where it starts. Its length is looked at before as much is allocated."""
    size: int = source.size()
    tail = source.read_at(8, size - 8) if size >= len(_MAGIC) + 8 else b""
    if tail[4:] != _MAGIC or source.read_at(4, 0) != _MAGIC:
        raise MalformedError("cannot be read: truncated, or no Parquet file")
    length = int.from_bytes(tail[:4], "little")
    if length > min(MAX_FOOTER_BYTES, size - len(_MAGIC) - 8):
        raise MalformedError(f"cannot be read: the footer is said to have {length} bytes")
    start = size - 8 - length
    try:
        return CompactReader(source.read_at(length, start)).fields(), start
    except IndexError:
        raise MalformedError("cannot be read: the footer does not end") from None


def _columns(footer: Fields, names: Sequence[str]) -> tuple[list[_Column], int]:
    """The wanted columns, and how many leaves there are in all. The schema is a tree, written in depth-first order."""
    elements = structs(footer, 2)
    children = [integer(e, 5) if 5 in e else 0 for e in elements]
    found: dict[str, _Column | None] = dict.fromkeys(names)
    start = 1
    while start < len(elements):
        end, open_elements = start, 1
        while open_elements and end < len(elements):
            open_elements += children[end] - 1
            end += 1
        name = binary(elements[start], 4).decode(errors="replace")
        if name in found:
            if children[start:end] not in ([0], [1, 1, 0]):
                raise MalformedError(f"column {name} is neither a plain column nor a plain list")
            if found[name]:
                raise MalformedError(f"column {name} is there twice")
            found[name] = _Column(name, elements[start:end], children[1:start].count(0))
        start = end
    missing = [name for name, column in found.items() if column is None]
    if missing:
        raise MalformedError(f"column {missing[0]} is missing")
    return [column for column in found.values() if column is not None], children[1:].count(0)


def _groups(footer: Fields, data_end: int, parts: Sequence[_Column], num_leaves: int) -> list[_Group]:
    """The row groups. Our writer lays chunks end to end from the magic on, in order: so none overlaps another."""
    groups, position, codecs = [], len(_MAGIC), set()
    for number, group in enumerate(structs(footer, 4)):
        columns = structs(group, 1)
        metas = [struct(column, 3) for column in columns]
        if len(metas) != num_leaves:
            raise MalformedError(f"row group {number} has {len(metas)} columns, but the schema {num_leaves}")
        for leaf, meta in enumerate(metas):
            size = integer(meta, 7, I64)
            if size and integer(meta, 11 if 11 in meta else 9, I64) != position:
                raise MalformedError(f"row group {number}: column {leaf} is not where it should be")
            position += size
            codecs.add(integer(meta, 4))
        chunks = []
        for part in parts:
            with _located(number, part.name):
                chunks.append(_chunk(columns[part.leaf], part))
        groups.append(_Group(integer(group, 3, I64), chunks))
    if position > data_end or sum(g.rows for g in groups) != integer(footer, 3, I64) or len(codecs) > 1:
        raise MalformedError("the footer contradicts itself")
    return groups


def _chunk(fields: Fields, part: _Column) -> Chunk:
    meta = struct(fields, 3)
    if {1, 8, 9} & fields.keys():
        raise MalformedError("encrypted, or in another file")
    if {10, 11} & meta.keys():
        raise MalformedError("has a dictionary or an index page")
    if integer(meta, 1) != integer(part.elements[-1], 1) or integer(meta, 4) not in _CODECS:
        raise MalformedError("the footer contradicts itself")
    encodings = tuple(e for e in items(meta, 2, I32S) if isinstance(e, int))
    return Chunk(start=integer(meta, 9, I64), size=integer(meta, 7, I64), physical_type=integer(meta, 1),
                 encodings=encodings, codec=integer(meta, 4), values=integer(meta, 5, I64))


def _check_types(found: pa.Schema, wanted: pa.Schema) -> None:
    for is_, should in zip(found, wanted, strict=True):
        if not is_.equals(should):
            nulls = ["" if field.nullable else " not null" for field in (is_, should)]
            raise MalformedError(f"column {should.name} is {is_.type}{nulls[0]}, expected {should.type}{nulls[1]}")


def _check_pages(source: pa.NativeFile, parts: Sequence[_Column], groups: Sequence[_Group],
                 limits: Mapping[str, Limit]) -> None:
    for index, part in enumerate(parts):
        walk = PageWalk(source, part.is_list, limits[part.name])
        for number, group in enumerate(groups):
            with _located(number, part.name):
                walk.check(group.chunks[index], group.rows)


def _checked_footer(schema: pa.Schema, parts: Sequence[_Column], groups: Sequence[_Group]) -> pq.FileMetaData:
    """A footer that says what was checked and nothing else. `ARROW:schema` is what pyarrow tells `binary` from
    `large_binary` by; it comes from the schema, not from the file."""
    root: Fields = {4: (BINARY, b"schema"), 5: (I32, len(parts))}
    arrow: Fields = {1: (BINARY, b"ARROW:schema"), 2: (BINARY, base64.b64encode(schema.serialize().to_pybytes()))}
    footer = encode({
        1: (I32, 2),
        2: (STRUCTS, [root, *(element for part in parts for element in part.elements)]),
        3: (I64, sum(group.rows for group in groups)),
        4: (STRUCTS, [{1: (STRUCTS, [_chunk_fields(chunk) for chunk in group.chunks]), 2: (I64, 0),
                       3: (I64, group.rows)} for group in groups]),
        5: (STRUCTS, [arrow]),
    })
    return pq.read_metadata(pa.BufferReader(_MAGIC + footer + len(footer).to_bytes(4, "little") + _MAGIC))


def _chunk_fields(chunk: Chunk) -> Fields:
    return {2: (I64, 0), 3: (STRUCT, {
        1: (I32, chunk.physical_type), 2: (I32S, list(chunk.encodings)), 3: (STRINGS, []), 4: (I32, chunk.codec),
        5: (I64, chunk.values), 6: (I64, 0), 7: (I64, chunk.size), 9: (I64, chunk.start)})}


def _decode(path: Path, file: pq.ParquetFile) -> pa.Table:
    try:
        table = file.read()
        # List offsets and UTF-8, which decoding does not check.
        table.validate(full=True)
    except _FAILURES as error:
        # One by one, to name the first that fails.
        for group, name in _places(file):
            _decode_column(path, file, group, name)
        raise DamageError(f"{path} cannot be read: {error}") from error
    if table.num_rows != file.metadata.num_rows:
        raise DamageError(f"{path} holds {table.num_rows} rows, but the footer says {file.metadata.num_rows}")
    return table


def _places(file: pq.ParquetFile) -> list[tuple[int, str]]:
    return [(group, name) for group in range(file.num_row_groups) for name in file.schema_arrow.names]


def _decode_column(path: Path, file: pq.ParquetFile, group: int, name: str) -> pa.Table:
    place = f"{path}: row group {group}, column {name}"
    try:
        table = file.read_row_group(group, columns=[name])
        table.validate(full=True)
    except _FAILURES as error:
        raise DamageError(f"{place}: {error}") from error
    if table.num_rows != (rows := file.metadata.row_group(group).num_rows):
        raise DamageError(f"{place} holds {table.num_rows} rows, but the footer says {rows}")
    return table


@contextmanager
def _located(group: int, column: str) -> Iterator[None]:
    try:
        yield
    except MalformedError as error:
        raise MalformedError(f"row group {group}, column {column}: {error}") from None
