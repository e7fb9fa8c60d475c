"""The domain of every trace of a dataset, by its ordinal: two small columns of each shard."""

import pyarrow as pa

from distill_pipe.store.commit import committed_shards
from distill_pipe.store.manifest import shard_name
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.root import Root
from distill_pipe.store.shard import MAIN_SCHEMA, STRING_BYTES, read_shard_info

_COLUMNS = pa.schema([MAIN_SCHEMA.field("ordinal"), MAIN_SCHEMA.field("domain")])


def domains(root: Root) -> dict[int, str | None]:
    """Domain by ordinal; None where the corpus gave none.

    Raises:
        DamageError: a shard is missing or damaged.
    """
    found: dict[int, str | None] = {}
    for shard in sorted(committed_shards(root)):
        with root.fetched(shard_name(shard)) as path:
            traces = read_shard_info(path).traces
            limits = {"ordinal": Limit(traces), "domain": Limit(traces, traces * (STRING_BYTES + 4))}
            table = read_table(path, _COLUMNS, limits, nullable=("domain",))
        found |= dict(zip(table["ordinal"].to_pylist(), table["domain"].to_pylist(), strict=True))
    return found
