"""A folder that `datasets.load_from_disk` reads, written as it goes: Arrow streams, and two JSON files that name them.

`datasets` itself would write the same folder, from a table that fits the memory or by way of a cache of the same size.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa

from distill_pipe.store.disk import whole_file


def write_stream(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """One Arrow stream of all tables."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for table in tables:
            stream.write_table(table)


def write_state(folder: Path, names: Sequence[str], fingerprint: str, format_type: str | None) -> None:
    """The two JSON files; the folder is a dataset once they are there. `names` are its streams, relative to it."""
    state: dict[str, object] = {
        "_data_files": [{"filename": name} for name in names], "_fingerprint": fingerprint[:16],
        "_format_columns": None, "_format_kwargs": {}, "_format_type": format_type, "_output_all_columns": False,
        "_split": None,
    }
    info: dict[str, object] = {}
    for name, value in (("dataset_info.json", info), ("state.json", state)):
        with whole_file(folder / name) as path:
            path.write_bytes(msgspec.json.encode(value))
