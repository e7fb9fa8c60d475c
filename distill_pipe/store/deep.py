"""What only counting again can find: numbers that were measured when a shard was written and do not follow from it.

Hashes tell that a file is the one that was written; this tells that what was written is right. Counts must be equal.
Where a logarithm or an exponential was taken, another processor may round another way: there a few rows may have fallen
into the next bin, and masses may differ in their last digits.
"""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pyarrow as pa

from distill_pipe.errors import DamageError
from distill_pipe.store.manifest import Measured
from distill_pipe.store.statistics import Histogram, shard_statistics, token_table
from distill_pipe.store.trace import Trace

_ROWS_PER_MOVED, _MASS_TOLERANCE = 10_000, 1e-5


def require_measured(path: Path, measured: Measured, traces: Sequence[Trace]) -> None:
    """Hold what a shard's record says was measured against its traces.

    Raises:
        DamageError: naming what differs.
    """
    again = shard_statistics(traces)
    for name in again.__struct_fields__:
        if not _equal(getattr(measured.statistics, name), getattr(again, name), name == "entropy"):
            raise DamageError(f"{path}: the histogram of {name} in the record is not that of the shard")
    tail_R = np.concatenate([np.empty(0), *(t.tail_mass_R for t in traces)])
    mean = float(tail_R.mean()) if len(tail_R) else 0.0
    if not np.isclose(measured.tail_mass_mean, mean, rtol=_MASS_TOLERANCE, atol=0):
        raise DamageError(f"{path}: the mean tail mass is {mean:.6g}, and {measured.tail_mass_mean:.6g} in the record")


def is_token_table_of(table: pa.Table, traces: Sequence[Trace], vocab_size: int) -> bool:
    """Whether a stored token table is that of these traces."""
    again = token_table(traces, vocab_size)
    if not all(table[name].equals(again[name]) for name in ("token_id", "count")):
        return False
    return bool(np.allclose(table["mass"].to_numpy(), again["mass"].to_numpy(), rtol=_MASS_TOLERANCE, atol=0))


def _equal(stored: Histogram, again: Histogram, is_rounded: bool) -> bool:
    if not is_rounded:
        return stored == again
    moved = sum(abs(a - b) for a, b in zip_longest(stored.counts, again.counts, fillvalue=0)) // 2
    return stored.total == again.total and moved <= 1 + again.total // _ROWS_PER_MOVED
