"""The target's final norm, kept once per dataset: hidden states are stored before it, so that either side of it can be
had. A Parquet file of one float32 column, so that any reader can take it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distill_pipe.errors import DamageError
from distill_pipe.store.manifest import FINAL_NORM
from distill_pipe.store.parquet import read_table
from distill_pipe.store.root import LocalRoot


def write_final_norm(root: LocalRoot, weight_H: NDArray[np.float32]) -> None:
    """Store the weight unless it is there already."""
    with root.scratch() as folder:
        pq.write_table(pa.table({"weight": pa.array(weight_H, pa.float32())}), folder / "norm",
                       compression="zstd", use_dictionary=False, write_page_checksum=True)
        root.create(folder / "norm", FINAL_NORM)


def read_final_norm(root: LocalRoot) -> NDArray[np.float32]:
    """The weight, `[H]`.

    Raises:
        DamageError: it is missing or unreadable.
    """
    if root.size(FINAL_NORM) is None:
        raise DamageError(f"{root}/{FINAL_NORM} is missing")
    weight_H: NDArray[np.float32] = read_table(root.local(FINAL_NORM))["weight"].to_numpy().astype(np.float32)
    return weight_H
