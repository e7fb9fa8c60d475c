"""A dataset as packed training batches of whole traces, for one rank of any number.

The order is a function of (seed, epoch) alone, and so is what is in a batch; which rank takes it is settled in `order`.
The trade-off: traces of one shard stay near each other within an epoch, and in return every shard is read from front to
back, with about one shard's bytes in memory.

The list of shards is frozen when the reader is made, so a dataset that is still growing does not change under it. A
missing or damaged file ends the iteration with its name, or is left out by all ranks alike where that is asked for;
nothing is replaced. Nothing is written either.

Plain PyTorch, with or without worker processes. What to save with a checkpoint is `batch.state_dict()` of the last
batch that was trained on; it is the same on all ranks.

    reader = ShardReader(root, layers=(2, 15, 27), dp_rank=rank, dp_world=world)
    reader.load_state_dict(saved)                           # only to go on from a checkpoint
    loader = DataLoader(reader, batch_size=None, num_workers=2)
    for epoch in range(reader.epoch, epochs):
        reader.set_epoch(epoch)
        for batch in loader:
            ...

Hugging Face Trainer: the loader is not prepared by Accelerate, which would share out what each rank has to itself. With
`load_state_dict`, set `ignore_data_skip=True`, or the Trainer skips what the reader has skipped already.

    class PackedTrainer(Trainer):
        def get_train_dataloader(self):
            loader = DataLoader(self.train_dataset, batch_size=None, collate_fn=lambda batch: {"batch": batch})
            loader.set_epoch = self.train_dataset.set_epoch
            return loader

    PackedTrainer(model, TrainingArguments(..., max_steps=epochs * reader.num_steps()), train_dataset=reader).train()

Accelerate: `prepare` model and optimizer, and use the loader as above with `batch.to(accelerator.device)`.

Lightning: a module whose `training_step` keeps `batch.state_dict()`, and a data module that saves and loads it:

    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(self.reader, batch_size=None)

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.reader.load_state_dict(state)
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, get_args

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from distill_pipe.consume.batch import Batch
from distill_pipe.consume.open_shards import OpenShards
from distill_pipe.consume.opened import ShardFiles, require_layers
from distill_pipe.consume.order import Contents, Cursor, EpochOrder, Span, Split, make_selection
from distill_pipe.consume.packing import pack, padding
from distill_pipe.consume.prefetch import prefetched
from distill_pipe.consume.state import State, as_ranges, decode_state, from_ranges
from distill_pipe.errors import DamageError, UsageError
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.manifest import require_run
from distill_pipe.store.root import Root, open_root
from distill_pipe.store.sidecar import EncodedTrace

__all__ = ["Batch", "OnDamage", "ShardReader", "Split"]

OnDamage = Literal["raise", "skip"]
_NOTHING = Contents(np.empty(0, np.int64), np.empty(0, np.int64))


class ShardReader(IterableDataset[Batch]):
    """Iterates over the batches of one epoch for one rank; iterating again repeats it.

    Args:
        root: the dataset: a folder, an address, or an opened root.
        layers: canonical layers whose hidden states are wanted; only these are read.
        batch_tokens: tokens per batch, at most; a longer trace gets a batch of its own.
        seed, epoch: the order. `at_epoch` gives another epoch over the same shards, `set_epoch` goes there.
        split: `heldout` is every trace whose ordinal is `holdout_every - 1` modulo `holdout_every`, `train` the others.
        dp_rank, dp_world: which of how many data-parallel ranks this is. Ranks that share a model's layers or heads
            (TP, PP, CP) are one data-parallel rank and must get the same `dp_rank`.
        interleave: from how many shards at once a rank takes its batches by turns. More mix better and hold more in
            memory. With a DataLoader, a multiple of `num_workers` saves workers from unpacking the same shards.
        target: whether the target's distribution is read. Without it a batch has no rows; its loss mask still says
            which tokens are supervised.
        on_damage: `raise`, or `skip` a damaged shard. Every rank then reads every shard as a whole before its first
            use, so that all leave out the same ones.
        check_hashes: check the sha256 of each file when this process opens it first.
        threads, prefetch: how many threads read and decode ahead, and how many batches they may be ahead; 0 threads
            work when a batch is asked for.
        device: where hidden states are decoded. On a GPU, coded bytes are moved and not decoded ones, and processors
            only unpack; `batch.to` moves the rest. With threads, and without worker processes.

    Every trace comes exactly once per epoch, over all ranks and workers, and all ranks take the same number of steps:
    where batches do not suffice, the last step of a rank is a padding batch.

    Raises:
        UsageError: a layer is not stored, or a setting is out of range.
        MismatchError: `root` is not a dataset that this version reads.
    """

    def __init__(self, root: str | os.PathLike[str] | Root, *,  # noqa: PLR0913 - settings, each of its own
                 layers: Sequence[int] = (), batch_tokens: int = 8192, seed: int = 0, epoch: int = 0,
                 split: Split = "all", holdout_every: int = 10, dp_rank: int = 0, dp_world: int = 1,
                 interleave: int = 1, target: bool = True, on_damage: OnDamage = "raise", check_hashes: bool = True,
                 threads: int = 1, prefetch: int = 2, device: torch.device | str = "cpu") -> None:
        self._root = open_root(root) if isinstance(root, (str, os.PathLike)) else root
        self.run = require_run(self._root)
        self._layers = require_layers(self._root, self.run, layers)
        if min(batch_tokens, interleave, prefetch) < 1 or min(seed, epoch, threads) < 0:
            raise UsageError(f"batch_tokens {batch_tokens}, interleave {interleave} and prefetch {prefetch} must be at "
                             f"least 1; seed {seed}, epoch {epoch} and threads {threads} must not be negative")
        if not 0 <= dp_rank < dp_world:
            raise UsageError(f"dp_rank {dp_rank} must be at least 0 and below dp_world {dp_world}")
        if on_damage not in get_args(OnDamage):
            raise UsageError(f"on_damage must be one of {', '.join(get_args(OnDamage))}, and is {on_damage!r}")
        self._selection = make_selection(batch_tokens, seed, split, holdout_every)
        self._rank, self._world, self._interleave = dp_rank, dp_world, interleave
        self._on_damage, self._threads, self._prefetch, self._device = on_damage, threads, prefetch, device
        self._files = ShardFiles(self._root, self.run, self._layers, check_hashes, target)
        self._shards = tuple(sorted(committed_shards(self._root)))
        self._resumed: State | None = None
        self._go_to(epoch)

    def at_epoch(self, epoch: int) -> "ShardReader":
        """The same reader, over the same shards, in the order of another epoch."""
        reader = copy.copy(self)
        reader._go_to(epoch)
        return reader

    @property
    def epoch(self) -> int:
        """The epoch that iterating goes through."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; also reaches the copies of persistent workers. In the epoch of a state that
        was loaded the reader stays where it is."""
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._resumed, self._state = None, self._start_of(epoch)

    def num_traces(self) -> int:
        """How many traces an epoch has, over all ranks; reads the record of each shard.

        Shards that are to be skipped count, as long as their record is there.
        """
        return sum(int(self._selection.wanted(o).sum()) for o in self._files.all_ordinals(self._shards))

    def num_steps(self) -> int:
        """How many batches an epoch gives to each rank; looks every shard up."""
        start = self._start_of(self.epoch)
        self._files.look_up(self._shards)
        return sum(1 for _ in self._order(start, set()).steps(start.cursor, self._rank, self._world, self._interleave))

    @property
    def skipped(self) -> tuple[int, ...]:
        """The shards that the running epoch has left out as damaged, up to the last batch."""
        return self._state.skipped

    def state_dict(self) -> dict[str, object]:
        """Where the reader stands after the last batch it gave, as plain values for a checkpoint; all ranks agree.

        Under a DataLoader it is the workers' copies that go on: take `state_dict()` of the last batch instead.
        """
        state: dict[str, object] = msgspec.to_builtins(self._state)
        return state

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a saved state, at any number of ranks and workers. Load before a DataLoader starts its workers.

        Raises:
            MismatchError: the state belongs to another dataset, or to settings that make other batches.
            DamageError: a shard is gone that was there when the state was saved.
        """
        loaded = decode_state(state, self.run.fingerprint, self._selection)
        absent = sorted(set(from_ranges(loaded.shards)) - set(self._shards))
        if absent:
            raise DamageError(f"{self._root}: shards {absent[:5]} were there when the state was saved, and are missing")
        self._epoch.fill_(loaded.epoch)
        self._resumed = self._state = loaded

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch = self.epoch
        # A copy in a persistent worker may hold a state of an epoch that is over.
        state = self._resumed if self._resumed and self._resumed.epoch == epoch else self._start_of(epoch)
        self._resumed = None
        first = worker if state.ahead is None else state.ahead
        for batch in prefetched(self._jobs(state, first, workers), self._threads, self._prefetch):
            self._state = batch.state if batch.state else state
            if info:
                self._state = msgspec.structs.replace(self._state, ahead=workers - 1)
            yield batch

    def _jobs(self, start: State, first: int, stride: int) -> Iterator[Callable[[], Batch]]:
        """What makes each batch of this worker: every `stride`-th step of the rank, from `first` on."""
        skipped = set(start.skipped)
        order = self._order(start, skipped)
        # One for each that is taken by turns; a thread that is behind may still need the one before.
        opened = OpenShards(self._files.open, self._interleave + max(self._threads - 1, 0))
        steps = order.steps(start.cursor, self._rank, self._world, self._interleave)
        for number, (span, cursor) in enumerate(steps):
            if number % stride == first % stride and number >= first:
                state = msgspec.structs.replace(start, cursor=cursor, skipped=tuple(sorted(skipped)), ahead=None)
                yield partial(self._batch, order, opened, span, state)

    def _batch(self, order: EpochOrder, opened: OpenShards, span: Span | None, state: State) -> Batch:
        if span is None:
            return padding(self._layers, self.run, state, self._device)
        encoded: list[EncodedTrace] = []
        for shard, rows in order.traces(span):
            one = opened.get(shard)
            encoded += [one.encoded(row) for row in rows.tolist()]
        return pack(encoded, self._layers, self.run, state, self._device)

    def _order(self, state: State, skipped: set[int]) -> EpochOrder:
        def contents(shard: int) -> Contents:
            if shard in skipped:
                return _NOTHING
            try:
                return self._files.checked(shard) if self._on_damage == "skip" else self._files.contents(shard)
            except DamageError:
                if self._on_damage == "raise":
                    raise
                skipped.add(shard)
                return _NOTHING
        return EpochOrder(from_ranges(state.shards), contents, self._selection, state.epoch, self._files.look_up)

    def _go_to(self, epoch: int) -> None:
        self._epoch = _shared(epoch)
        self._resumed, self._state = None, self._start_of(epoch)

    def _start_of(self, epoch: int) -> State:
        return State(fingerprint=self.run.fingerprint, selection=self._selection, epoch=epoch,
                     shards=as_ranges(self._shards), cursor=Cursor(world=self._world, interleave=self._interleave))


def _shared(number: int) -> Tensor:
    """A number in shared memory: the copies of persistent workers see it change."""
    tensor: Tensor = torch.tensor(number).share_memory_()  # type: ignore[no-untyped-call]
    return tensor
