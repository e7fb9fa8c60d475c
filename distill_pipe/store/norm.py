"""The target's final norm, kept once per dataset: hidden states are stored before it, so that either side of it can be
had. A Parquet file of one float32 column, so that any reader can take it."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill_pipe.errors import DamageError
from distill_pipe.store.manifest import FINAL_NORM
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.parquet_writer import write_table
from distill_pipe.store.root import Root

_SCHEMA = pa.schema([("weight", pa.float32())])


def write_final_norm(root: Root, weight_H: NDArray[np.float32]) -> None:
    """Store the weight unless it is there already."""
    with root.scratch() as folder:
        write_table(folder / "norm", pa.table([pa.array(weight_H, pa.float32())], _SCHEMA))
        root.create(folder / "norm", FINAL_NORM)


def read_final_norm(root: Root, hidden_size: int) -> NDArray[np.float32]:
    """The weight, `[H]`.

    Raises:
        DamageError: it is missing, unreadable, or of another size.
    """
    with root.fetched(FINAL_NORM) as path:
        table = read_table(path, _SCHEMA, {"weight": Limit(hidden_size)})
    if table.num_rows != hidden_size:
        raise DamageError(f"{root}/{FINAL_NORM} has {table.num_rows} entries, expected {hidden_size}")
    weight_H: NDArray[np.float32] = table["weight"].to_numpy()
    return weight_H
