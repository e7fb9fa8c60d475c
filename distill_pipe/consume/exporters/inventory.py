"""What an export goes through: every trace of a complete dataset, numbered from 0 in the order of the plan.

Quarantined prompts leave gaps in the ordinals and trainers want none, so samples are counted anew. The numbers must be
the same whenever an export is continued, hence only a complete dataset has them. The trade-off: a small column of every
shard is read before the first sample is written, to know how many there are and how long.

Shapes: N traces.
"""

from collections.abc import Container, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from distill_pipe.consume.exporters.record import Record, batch_records
from distill_pipe.consume.opened import ShardFiles
from distill_pipe.consume.packing import pack
from distill_pipe.errors import UsageError
from distill_pipe.store.commit import committed_shards, shard_fragment
from distill_pipe.store.manifest import require_run
from distill_pipe.store.plan import num_shards
from distill_pipe.store.root import Root
from distill_pipe.store.trace import Trace


class Inventory:
    """The traces of a dataset. `lengths_N` holds the tokens of each.

    Raises:
        MismatchError: there is no dataset, or this version cannot read it.
        UsageError: shards are missing.
        DamageError: a main shard cannot be read.
    """

    def __init__(self, root: Root) -> None:
        self._root, self.run = root, require_run(root)
        self._shards = range(num_shards(self.run))
        missing = set(self._shards) - committed_shards(root)
        if missing:
            raise UsageError(f"{root} is not complete: {len(missing)} of {len(self._shards)} shards are missing; run "
                             "generate again to make them, then export")
        files = ShardFiles(root, self.run, (), check_hashes=True)
        lengths = [files.contents(shard).tokens_N for shard in self._shards]
        self._starts = list(accumulate(map(len, lengths), initial=0))
        self.lengths_N: NDArray[np.int64] = np.concatenate(lengths)

    def __len__(self) -> int:
        return len(self.lengths_N)

    @property
    def dropped_mass(self) -> float:
        """The mean probability outside the head, over all rows."""
        infos = [shard_fragment(self._root, self.run, shard).info for shard in self._shards]
        rows = sum(i.rows for i in infos)
        return sum(i.measured.tail_mass_mean * i.rows for i in infos) / max(rows, 1)

    def traces(self) -> Iterator[list[Trace]]:
        """The traces of each shard, without hidden states."""
        files = ShardFiles(self._root, self.run, (), check_hashes=True)
        for shard in self._shards:
            yield files.open(shard).traces

    def records(self, layers: Sequence[int], wanted: Container[int]) -> Iterator[tuple[int, Record]]:
        """The traces whose numbers are in `wanted`, each with its number. Shards without any are not opened.

        Raises:
            DamageError: a shard or its sidecar is missing or damaged; names it.
        """
        files = ShardFiles(self._root, self.run, layers, check_hashes=True)
        for shard, start, stop in zip(self._shards, self._starts, self._starts[1:], strict=False):
            numbers = [n for n in range(start, stop) if n in wanted]
            if numbers:
                opened = files.open(shard)
                for number in numbers:
                    [record] = batch_records(pack([opened.encoded(number - start)], layers, self.run))
                    yield number, record
