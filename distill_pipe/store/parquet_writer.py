"""How every Parquet file of a dataset is written: zstd, page checksums, no dictionaries.

Numbers are split into byte planes first (BYTE_STREAM_SPLIT): that halves nothing by itself, but zstd then
finds the planes that hardly vary, and beats a dictionary on every column we have. Strings have no dictionary either,
because a dictionary lets a kilobyte unpack to gigabytes and a reader would have to allow for it. The trade-off: strings
that repeat cost a few bytes more.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

METADATA_KEY: Final = b"distill_pipe"
ROW_GROUP_BYTES: Final = 64 << 20


def write_table(path: Path, table: pa.Table, level: int = 2) -> None:
    """Write a table at a zstd level, in row groups of about `ROW_GROUP_BYTES` decoded bytes."""
    write_row_groups(path, table.schema, [table], rows_per_group(table.num_rows, table.nbytes), level)


def write_row_groups(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], rows: int, level: int = 2) -> None:
    """Write tables one after the other, each cut into row groups of `rows` rows. No table is held once it is written:
    tables of `rows` rows each make the same file as all of them in one, in the memory of one row group."""
    split = {name: "BYTE_STREAM_SPLIT" for f in schema if (name := _split_path(f))}
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=level, use_dictionary=False,
                          column_encoding=split or None, write_page_checksum=True, write_page_index=True) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=rows)
            # Or it would be in memory while the next is made.
            del table
    # Arrow keeps what it freed: buffers of several pages, and zstd's tables.
    pa.default_memory_pool().release_unused()


def rows_per_group(num_rows: int, num_bytes: int) -> int:
    """How many of `num_rows` rows, of `num_bytes` decoded bytes in all, make a row group."""
    return max(1, int(ROW_GROUP_BYTES * num_rows / max(num_bytes, 1)))


def _split_path(field: pa.Field) -> str | None:
    """The Parquet path of a column of numbers, flat or in lists."""
    is_list = pa.types.is_list(field.type)
    kind = field.type.value_type if is_list else field.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    return f"{field.name}.list.element" if is_list else str(field.name)
