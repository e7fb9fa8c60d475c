"""How every Parquet file of a dataset is written: zstd, page checksums, no dictionaries.

Numbers are split into byte planes first (BYTE_STREAM_SPLIT): that halves nothing by itself, but zstd then
finds the planes that hardly vary, and beats a dictionary on every column we have. Strings have no dictionary either,
because a dictionary lets a kilobyte unpack to gigabytes and a reader would have to allow for it. The trade-off: strings
that repeat cost a few bytes more.
"""

from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

METADATA_KEY: Final = b"distill_pipe"
ROW_GROUP_BYTES: Final = 64 << 20


def write_table(path: Path, table: pa.Table, level: int = 2) -> None:
    """Write a table at a zstd level, in row groups of about `ROW_GROUP_BYTES` decoded bytes."""
    rows = max(1, int(ROW_GROUP_BYTES * table.num_rows / max(table.nbytes, 1)))
    split = {name: "BYTE_STREAM_SPLIT" for f in table.schema if (name := _split_path(f))}
    pq.write_table(table, path, compression="zstd", compression_level=level, row_group_size=rows, use_dictionary=False,
                   column_encoding=split or None, write_page_checksum=True, write_page_index=True)


def _split_path(field: pa.Field) -> str | None:
    """The Parquet path of a column of numbers, flat or in lists."""
    is_list = pa.types.is_list(field.type)
    kind = field.type.value_type if is_list else field.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    return f"{field.name}.list.element" if is_list else str(field.name)
