"""Where the bytes of one of our Parquet files are, by column, from its footer alone.

The footer is parsed as `parquet` parses it, so a file that was made to harm is an error here too.
"""

from collections import Counter
from pathlib import Path

from distill_pipe.store.pages import I64, STRINGS, Fields, MalformedError, integer, items, struct, structs
from distill_pipe.store.parquet import opened, read_footer


def column_sizes(path: Path) -> dict[str, int]:
    """Compressed bytes by top-level column.

    Raises:
        DamageError: the file is missing, or its footer cannot be read.
    """
    found = Counter[str]()
    with opened(path) as source:
        footer, _ = read_footer(source)
        for group in structs(footer, 4):
            for column in structs(group, 1):
                meta = struct(column, 3)
                found[_top_level(meta)] += integer(meta, 7, I64)
    return dict(found)


def _top_level(meta: Fields) -> str:
    parts = items(meta, 3, STRINGS)
    if not parts or not isinstance(parts[0], bytes):
        raise MalformedError("a column has no name")
    return parts[0].decode(errors="replace")
