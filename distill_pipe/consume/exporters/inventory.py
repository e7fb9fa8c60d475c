"""What an export goes through: the traces of a complete dataset, numbered from 0 in the order of the plan.

Quarantined prompts and held-out traces leave gaps in the ordinals and trainers want none, so samples are counted anew.
The numbers must be the same whenever an export is continued, hence only a complete dataset has them. The trade-off: a
small column of every shard is read before the first sample is written, to know how many there are and how long.

Shapes: N traces.
"""

from collections.abc import Container, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from distill_pipe.consume.exporters.record import Record, batch_records
from distill_pipe.consume.opened import ShardFiles
from distill_pipe.consume.order import Split, make_selection
from distill_pipe.consume.packing import pack
from distill_pipe.errors import UsageError
from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.manifest import require_run
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import Root
from distill_pipe.store.trace import Trace


class Inventory:
    """The traces of a split, as the reader defines it. `lengths_N` holds the tokens of each.

    Raises:
        MismatchError: there is no dataset, or this version cannot read it.
        UsageError: shards are missing, the split is empty, or `holdout_every` is out of range.
        DamageError: a main shard cannot be read.
    """

    def __init__(self, root: Root, split: Split = "all", holdout_every: int = 10) -> None:
        self._root, self.run = root, require_run(root)
        self._shards = range(num_shards(self.run))
        missing = set(self._shards) - committed_shards(root)
        if missing:
            raise UsageError(f"{root} is not complete: {len(missing)} of {len(self._shards)} shards are missing; run "
                             "generate again to make them, then export")
        selection = make_selection(1, 0, split, holdout_every)
        files = ShardFiles(root, self.run, (), check_hashes=True)
        found = [files.contents(shard) for shard in self._shards]
        # Which traces of each shard belong to the split, by their place in it.
        self._rows = [np.flatnonzero(selection.wanted(c.ordinals_N)) for c in found]
        self._starts = list(accumulate(map(len, self._rows), initial=0))
        self.lengths_N: NDArray[np.int64] = np.concatenate([c.tokens_N[rows] for c, rows in
                                                            zip(found, self._rows, strict=True)])
        if len(self) == 0:
            raise UsageError(f"{root} has no trace in the split {split!r}")

    def __len__(self) -> int:
        return len(self.lengths_N)

    @property
    def dropped_mass(self) -> float:
        """The mean probability outside the head, over all rows of the dataset."""
        infos = [shard_fragment(self._root, self.run, shard).info for shard in self._shards]
        rows = sum(i.rows for i in infos)
        return sum(i.measured.tail_mass_mean * i.rows for i in infos) / max(rows, 1)

    def traces(self) -> Iterator[list[Trace]]:
        """The traces of each shard, without hidden states."""
        files = ShardFiles(self._root, self.run, (), check_hashes=True)
        for shard, rows in zip(self._shards, self._rows, strict=True):
            traces = files.open(shard).traces
            yield [traces[row] for row in rows]

    def records(self, layers: Sequence[int], wanted: Container[int]) -> Iterator[tuple[int, Record]]:
        """The traces whose numbers are in `wanted`, each with its number. Shards without any are not opened.

        Raises:
            DamageError: a shard or its sidecar is missing or damaged; names it.
        """
        files = ShardFiles(self._root, self.run, layers, check_hashes=True)
        for shard, rows, start in zip(self._shards, self._rows, self._starts, strict=False):
            numbered = [(number, row) for number, row in enumerate(rows, start) if number in wanted]
            if numbered:
                opened = files.open(shard)
                for number, row in numbered:
                    [record] = batch_records(pack([opened.encoded(row)], layers, self.run))
                    yield number, record
