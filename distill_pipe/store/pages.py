"""What the columns of a Parquet file would decode to, by its page headers, and whether that is allowed.

A few hundred bytes of Parquet can claim gigabytes, and neither page headers nor the footer have a checksum. So before
pyarrow decodes a column, its pages are walked in the order in which pyarrow reads them, and what is said twice must
agree. Nothing is unpacked here. Thrift is read by code of ours because pyarrow shows no page headers, and aborts the
process when it is asked for some fields of a damaged footer. The trade-off: only what our writer may write is read.
Dictionaries, by which a kilobyte unpacks to gigabytes, and encodings that repeat prefixes are refused.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

import pyarrow as pa

# A struct: by field number, Thrift type and value. The type of a list holds that of its elements in the upper bits.
Value: TypeAlias = "bool | int | bytes | list[Value] | Fields"
Fields: TypeAlias = dict[int, tuple[int, "Value"]]

_BOOL_TRUE, _BOOL_FALSE, _I8, _I16, _DOUBLE, _LIST = 1, 2, 3, 4, 7, 9
I32, I64, BINARY, STRUCT = 5, 6, 8, 12
I32S, STRINGS, STRUCTS = _LIST | I32 << 4, _LIST | BINARY << 4, _LIST | STRUCT << 4
_BITS = {_I16: 16, I32: 32, I64: 64}
_MAX_DEPTH = 16
# What a struct may hold in all, so that 16 MiB of footer cannot become gigabytes of Python objects.
_MAX_VALUES = 1 << 20

_DATA_PAGE, _DATA_PAGE_V2 = 0, 3
_PLAIN, _RLE, _BYTE_STREAM_SPLIT = 0, 3, 9
_NUMERIC = (_PLAIN, _BYTE_STREAM_SPLIT)
# Of each physical type: bytes of a decoded value (0: it varies), encodings. BOOLEAN, INT32, INT64, FLOAT, DOUBLE and
# BYTE_ARRAY.
_TYPES = {0: (1, (_PLAIN, _RLE)), 1: (4, _NUMERIC), 2: (8, _NUMERIC), 4: (4, _NUMERIC), 5: (8, _NUMERIC),
          6: (0, (_PLAIN,))}
# Most headers are below the first; statistics of long strings can make one longer.
_HEADER_BYTES, _MAX_HEADER_BYTES = 1 << 10, 1 << 16
# Beside its values a page holds levels, at most a byte per value, and a few bytes of lengths and run headers. A codec
# that cannot compress a page makes it longer by less than this and a 128th.
_PAGE_OVERHEAD: Final = 64


@dataclass(frozen=True, slots=True)
class Limit:
    """What decoding one column may yield at the most, over the whole file.

    `values`: rows of a flat column; list elements plus empty and null lists. `value_bytes`: bytes of all strings or
    blobs together, each with a length of 4 bytes; of no meaning for numbers.
    """

    values: int
    value_bytes: int = 0


class MalformedError(Exception):
    """The file contradicts itself, claims more than is allowed, or is not what our writer writes."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column in one row group: what the footer says about it."""

    start: int
    size: int
    physical_type: int
    encodings: tuple[int, ...]
    codec: int
    values: int


@dataclass(frozen=True, slots=True)
class PageHeader:
    """A checked data page header. Only pages of version 2 say `nulls` and `level_bytes`."""

    header_bytes: int
    compressed_bytes: int
    page_bytes: int
    encoding: int
    values: int
    nulls: int | None = None
    level_bytes: int = 0
    is_compressed: bool = True


class PageWalk:
    """What the pages of one column add up to, over all row groups."""

    def __init__(self, source: pa.NativeFile, is_list: bool, limit: Limit) -> None:
        self._source, self._is_list, self._limit = source, is_list, limit
        self._values = self._bytes = 0

    def check(self, chunk: Chunk, rows: int) -> None:
        """Hold the column's next chunk against the footer and the limit; raises MalformedError."""
        if chunk.physical_type not in _TYPES:
            raise MalformedError(f"values of type {chunk.physical_type}")
        width, encodings = _TYPES[chunk.physical_type]
        position, values, end = chunk.start, 0, chunk.start + chunk.size
        while position < end:
            page = read_page_header(self._source, position, end)
            if page.encoding not in encodings or page.encoding not in chunk.encodings:
                raise MalformedError(f"a page in encoding {page.encoding}")
            self._add(page, width)
            position += page.header_bytes + page.compressed_bytes
            values += page.values
        if position > end:
            raise MalformedError("a page reaches beyond its column")
        if values != chunk.values or (values < rows if self._is_list else values != rows):
            raise MalformedError(f"pages of {values} values, but the footer says {chunk.values}, in {rows} rows")

    def _add(self, page: PageHeader, width: int) -> None:
        overhead = page.values + _PAGE_OVERHEAD
        if width and page.page_bytes > page.values * width + overhead:
            raise MalformedError(f"a page of {page.values} values is said to hold {page.page_bytes} bytes")
        if page.compressed_bytes > page.page_bytes + page.page_bytes // 128 + _PAGE_OVERHEAD \
                or (not page.is_compressed and page.compressed_bytes != page.page_bytes):
            raise MalformedError(f"a page of {page.compressed_bytes} bytes is said to hold {page.page_bytes}")
        if page.nulls is not None and width > 1 \
                and page.page_bytes - page.level_bytes != (page.values - page.nulls) * width:
            raise MalformedError("the size of a page does not agree with its number of values")
        self._values += page.values
        if self._values > self._limit.values:
            raise MalformedError(f"more than {self._limit.values} values")
        self._bytes += max(page.page_bytes - overhead, 0)
        if not width and self._bytes > self._limit.value_bytes:
            raise MalformedError(f"more than {self._limit.value_bytes} bytes of values")


def read_page_header(source: pa.NativeFile, position: int, end: int) -> PageHeader:
    """The header of the data page that starts at `position`, in a chunk that ends at `end`.

    Raises:
        MalformedError: it is none, or not one that our writer would write.
    """
    for size in (_HEADER_BYTES, _MAX_HEADER_BYTES):
        reader = CompactReader(source.read_at(min(size, end - position), position))
        try:
            fields = reader.fields()
        except IndexError:
            continue
        return _data_page(fields, reader.position)
    raise MalformedError("a page header does not end")


def _data_page(fields: Fields, header_bytes: int) -> PageHeader:
    """The header as checked numbers. pyarrow skips a field of another type than expected, and does not miss a checksum:
    so all that is used must be there, in its type."""
    kind, page_bytes, compressed_bytes = integer(fields, 1), integer(fields, 2), integer(fields, 3)
    if 4 not in fields or fields[4][0] != I32:
        raise MalformedError("a page has no checksum")
    if kind == _DATA_PAGE:
        page = struct(fields, 5)
        if integer(page, 3) != _RLE or integer(page, 4) != _RLE:
            raise MalformedError("levels are not run-length encoded")
        return PageHeader(header_bytes, compressed_bytes, page_bytes, integer(page, 2), integer(page, 1, least=1))
    if kind != _DATA_PAGE_V2:
        raise MalformedError(f"a page of type {kind}, expected a data page")
    page = struct(fields, 8)
    levels, is_compressed = integer(page, 5) + integer(page, 6), page.get(7, (_BOOL_TRUE, True))[1]
    values, nulls = integer(page, 1, least=1), integer(page, 2)
    if levels > min(page_bytes, compressed_bytes) or nulls > values or not isinstance(is_compressed, bool):
        raise MalformedError("a page header contradicts itself")
    return PageHeader(header_bytes, compressed_bytes, page_bytes, integer(page, 4), values, nulls, levels,
                      is_compressed)


def integer(fields: Fields, number: int, kind: int = I32, least: int = 0) -> int:
    """A field that must be there and at least `least`."""
    found, value = fields.get(number, (0, 0))
    if found != kind or not isinstance(value, int):
        raise MalformedError(f"field {number} is missing")
    if value < least:
        raise MalformedError(f"field {number} is {value}")
    return value


def binary(fields: Fields, number: int) -> bytes:
    """A field of bytes; empty when absent."""
    value = fields.get(number, (BINARY, b""))[1]
    if not isinstance(value, bytes):
        raise MalformedError(f"field {number} is no string")
    return value


def struct(fields: Fields, number: int) -> Fields:
    """A struct that must be there."""
    value = fields.get(number, (0, 0))[1]
    if not isinstance(value, dict):
        raise MalformedError(f"field {number} is missing")
    return value


def items(fields: Fields, number: int, kind: int) -> list[Value]:
    """A list of type `kind`; empty when absent."""
    found, value = fields.get(number, (kind, []))
    if not isinstance(value, list) or (found != kind and value):
        raise MalformedError(f"field {number} is no list of its type")
    return value


def structs(fields: Fields, number: int) -> list[Fields]:
    """A list of structs; empty when absent."""
    return [value for value in items(fields, number, STRUCTS) if isinstance(value, dict)]


class CompactReader:
    """Thrift's compact protocol, as far as Parquet uses it. Runs into IndexError where the data ends early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._left = _MAX_VALUES
        self.position = 0

    def fields(self, depth: int = 0) -> Fields:
        """The fields of a struct. A number must not come twice: pyarrow would take the last."""
        if depth > _MAX_DEPTH:
            raise MalformedError("structs are nested too deeply")
        found: Fields = {}
        number = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self._integer(16)
            if number <= 0 or number in found:
                raise MalformedError(f"field {number} is where it cannot be")
            kind = byte & 15
            if kind == _LIST:
                head = self._byte()
                size, kind = head >> 4, _LIST | (head & 15) << 4
                values = [self._value(head & 15, depth) for _ in range(size if size < 15 else self._varint())]
                found[number] = kind, values
            elif kind in (_BOOL_TRUE, _BOOL_FALSE):
                found[number] = kind, kind == _BOOL_TRUE
            else:
                found[number] = kind, self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Value:
        self._left -= 1
        if self._left < 0:
            raise MalformedError(f"more than {_MAX_VALUES} values in a footer")
        if kind in _BITS:
            return self._integer(_BITS[kind])
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind == STRUCT:
            return self.fields(depth + 1)
        if kind in (_I8, _DOUBLE):
            return self._bytes(1 if kind == _I8 else 8)
        raise MalformedError(f"a value of type {kind}")

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _bytes(self, size: int) -> bytes:
        self.position += size
        if self.position > len(self._data):
            raise IndexError
        return self._data[self.position - size:self.position]

    def _varint(self) -> int:
        result = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            result |= (byte & 127) << shift
            if byte < 128:
                return result
        raise MalformedError("a number does not end")

    def _integer(self, bits: int) -> int:
        raw = self._varint()
        if raw >> bits:
            raise MalformedError("a number is too large for its type")
        return raw >> 1 ^ -(raw & 1)


def encode(fields: Fields) -> bytes:
    """A struct in the compact protocol."""
    out = bytearray()
    for number, (kind, value) in fields.items():
        out += bytes([kind & 15]) + _varint(number << 1) + _encoded(kind, value)
    return bytes(out) + b"\0"


def _encoded(kind: int, value: Value) -> bytes:
    if isinstance(value, bool):
        return b""
    if isinstance(value, int):
        return _varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if isinstance(value, bytes):
        return (_varint(len(value)) if kind == BINARY else b"") + value
    if isinstance(value, dict):
        return encode(value)
    return bytes([0xF0 | kind >> 4]) + _varint(len(value)) + b"".join(_encoded(kind >> 4, item) for item in value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])
