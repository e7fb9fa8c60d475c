"""A dataset by index: any trace, at any time, for samplers and loaders that choose for themselves.

The trade-off: Parquet compresses traces together, so the first trace of a shard costs the unpacking of the shard. The
last few shards stay open; where indices jump between more shards than that, every trace costs a shard. To go through a
dataset in random order, `ShardReader` is the way.

With a DataLoader, traces are joined to packed batches:

    dataset = ShardDataset(root, layers=(2, 15, 27))
    loader = DataLoader(dataset, batch_size=8, collate_fn=join, num_workers=2)
"""

import os
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from distill_pipe.consume.batch import Batch
from distill_pipe.consume.open_shards import OpenShards
from distill_pipe.consume.opened import ShardFiles, require_layers
from distill_pipe.consume.order import Split, make_selection
from distill_pipe.consume.packing import pack
from distill_pipe.errors import UsageError
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import Root, open_root


class ShardDataset(Dataset[Batch]):
    """Trace `i` of a dataset as a batch of one. Traces are numbered by ordinal, without gaps.

    Reads the record of every shard when it is made, and no data.

    Args:
        root: the dataset: a folder, an address, or an opened root.
        layers: canonical layers whose hidden states are wanted; only these are read.
        split, holdout_every: which traces, as for `ShardReader`.
        target: whether the target's distribution is read, as for `ShardReader`.
        check_hashes: check the sha256 of each file when this process opens it first.
        open_shards: how many shards stay open.

    Raises:
        UsageError: a layer is not stored, or a setting is out of range.
        MismatchError: `root` is not a dataset that this version reads.
        DamageError: the record of a shard cannot be had.
    """

    def __init__(self, root: str | os.PathLike[str] | Root, *, layers: Sequence[int] = (), split: Split = "all",
                 holdout_every: int = 10, target: bool = True, check_hashes: bool = True, open_shards: int = 4) -> None:
        opened = open_root(root) if isinstance(root, (str, os.PathLike)) else root
        self.run = require_run(opened)
        self._layers = require_layers(opened, self.run, layers)
        if open_shards < 1:
            raise UsageError(f"open_shards must be at least 1, and is {open_shards}")
        self._selection = make_selection(1, 0, split, holdout_every)
        self._files = ShardFiles(opened, self.run, self._layers, check_hashes, target)
        self._opened = OpenShards(self._files.open, open_shards)
        self._shards = sorted(committed_shards(opened))
        wanted = [self._selection.wanted(ordinals).sum() for ordinals in self._files.all_ordinals(self._shards)]
        self._stops = np.cumsum(np.array(wanted, np.int64))

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, index: int) -> Batch:
        """One trace.

        Raises:
            IndexError: there is no such trace.
            DamageError: its shard is missing or damaged.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"trace {index} of {len(self)}")
        index %= len(self)
        at = int(np.searchsorted(self._stops, index, side="right"))
        shard, before = self._shards[at], int(self._stops[at - 1]) if at else 0
        rows = np.flatnonzero(self._selection.wanted(self._files.ordinals(shard)))
        return pack([self._opened.get(shard).encoded(int(rows[index - before]))], self._layers, self.run)
