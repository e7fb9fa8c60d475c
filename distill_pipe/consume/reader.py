"""A dataset as packed training batches of whole traces.

The order is a function of (seed, epoch) alone: shards are shuffled, then the traces inside each shard, and traces are
packed in that order up to a token budget. The trade-off: traces of one shard stay near each other within an epoch, and
in return every shard is read once, from front to back, with one shard's bytes in memory.

The list of shards is frozen when the reader is made, so a dataset that is still growing does not change under it. A
missing or damaged file ends the iteration with its name; nothing is skipped or replaced. Nothing is written either.

Shapes: T tokens of the batch, B traces, R supervised rows, H hidden size.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_pipe.consume.sparse import FlatEntries, SparseTarget
from distill_pipe.errors import CaptureError, DamageError, MismatchError, UsageError
from distill_pipe.store.codec import scaled_head
from distill_pipe.store.commit import committed_shards
from distill_pipe.store.hidden_codec import decode_hidden
from distill_pipe.store.manifest import Run, ShardInfo, read_fragment, require_run, shard_name
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.root import LocalRoot
from distill_pipe.store.shard import MAIN_SCHEMA, read_main, read_shard_info, traces_from_table
from distill_pipe.store.sidecar import (
    EncodedTrace,
    blobs_of,
    check_sidecar,
    read_sidecar,
    read_sidecar_info,
    require_same_traces,
    sidecar_info,
)
from distill_pipe.store.trace import Trace

Split = Literal["all", "train", "heldout"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B whole traces laid end to end.

    Trace i occupies tokens `cu_seqlens_B1[i]` to `cu_seqlens_B1[i + 1]`; positions count from 0 in each. Row r
    supervises token index `rows_R[r]`: `target[r]` is the target's distribution of the token after it, and
    `next_ids_R[r]`, `next_logprob_R[r]` are that token as it was written, and its log-probability. `hidden[n]` is
    `[T, H]` and lines up with the tokens; the last token of a trace has no stored state, and its row is zero. It is
    bfloat16, or float32 where the dataset stores float32. The head of `target` is scaled so that it and the tail mass
    of its row add up to 1.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens_B1: Tensor
    loss_mask_T: Tensor
    rows_R: Tensor
    next_ids_R: Tensor
    next_logprob_R: Tensor
    hidden: dict[int, Tensor]
    target: SparseTarget
    ordinals_B: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(
            token_ids_T=self.token_ids_T.to(device), position_ids_T=self.position_ids_T.to(device),
            cu_seqlens_B1=self.cu_seqlens_B1.to(device), loss_mask_T=self.loss_mask_T.to(device),
            rows_R=self.rows_R.to(device), next_ids_R=self.next_ids_R.to(device),
            next_logprob_R=self.next_logprob_R.to(device), hidden={n: h.to(device) for n, h in self.hidden.items()},
            target=self.target.to(device), ordinals_B=self.ordinals_B.to(device))


class ShardReader:
    """Iterates over the batches of one epoch; iterating again repeats it.

    Args:
        root: the dataset.
        layers: canonical layers whose hidden states are wanted; only these are read.
        batch_tokens: tokens per batch, at most; a longer trace gets a batch of its own.
        seed, epoch: the order. `at_epoch` gives the next epoch over the same shards.
        split: `heldout` is every trace whose ordinal is `holdout_every - 1` modulo `holdout_every`, `train` the others.

    Raises:
        UsageError: a layer is not stored, or a setting is out of range.
        MismatchError: `root` is not a dataset that this version reads.
    """

    def __init__(self, root: str | os.PathLike[str], *, layers: Sequence[int] = (), batch_tokens: int = 8192,
                 seed: int = 0, epoch: int = 0, split: Split = "all", holdout_every: int = 10) -> None:
        self._root = LocalRoot(root)
        self.run = require_run(self._root)
        stored = self.run.spec.capture.layers
        absent = sorted(set(layers) - set(stored))
        if absent:
            raise UsageError(f"{root} does not store layers {absent}; it stores {list(stored)}")
        if batch_tokens < 1 or holdout_every < 2 or split not in get_args(Split):
            raise UsageError(f"batch_tokens {batch_tokens} must be at least 1, holdout_every {holdout_every} at least "
                             f"2, and split {split!r} one of {', '.join(get_args(Split))}")
        self._layers, self._batch_tokens = tuple(dict.fromkeys(layers)), batch_tokens
        self._seed, self._epoch, self._split, self._holdout_every = seed, epoch, split, holdout_every
        self._shards = tuple(sorted(committed_shards(self._root)))

    def at_epoch(self, epoch: int) -> "ShardReader":
        """The same reader, over the same shards, in the order of another epoch."""
        reader = copy.copy(self)
        reader._epoch = epoch
        return reader

    def num_traces(self) -> int:
        """How many traces an epoch has; reads one small column of each shard."""
        return sum(self._wanted(o) for shard in self._shards for o in _ordinals(self._root, self.run, shard))

    def __iter__(self) -> Iterator[Batch]:
        held: list[EncodedTrace] = []
        num_tokens = 0
        for encoded in self._traces():
            if held and num_tokens + encoded.trace.num_tokens > self._batch_tokens:
                yield pack(held, self._layers, self.run)
                held, num_tokens = [], 0
            held.append(encoded)
            num_tokens += encoded.trace.num_tokens
        if held:
            yield pack(held, self._layers, self.run)

    def _traces(self) -> Iterator[EncodedTrace]:
        random = np.random.default_rng([self._seed, self._epoch])
        for shard in random.permutation(np.array(self._shards, np.int64)):
            # Seeded per shard, so that the order inside a shard does not depend on which shards exist.
            inside = np.random.default_rng([self._seed, self._epoch, int(shard)])
            yield from self._shard_traces(int(shard), inside)

    def _shard_traces(self, shard: int, random: np.random.Generator) -> Iterator[EncodedTrace]:
        try:
            main, hidden = _open_shard(self._root, self.run, shard, self._layers)
            info = sidecar_info(self.run, shard)
            for i in random.permutation(main.num_rows):
                if self._wanted(main["ordinal"][i].as_py()):
                    trace = next(traces_from_table(main.slice(i, 1), self.run.spec.target.vocab_size))
                    # Hidden states stay encoded until their batch: those of a whole shard can be gigabytes.
                    part = hidden.slice(i, 1)
                    check_sidecar(part, info, [trace])
                    yield EncodedTrace(trace, blobs_of(part, info, 0))
        except (CaptureError, DamageError, MismatchError) as error:
            raise DamageError(f"{self._root.local(shard_name(shard))}: {error}") from error

    def _wanted(self, ordinal: int) -> bool:
        heldout = ordinal % self._holdout_every == self._holdout_every - 1
        return self._split == "all" or heldout == (self._split == "heldout")


def pack(encoded: Sequence[EncodedTrace], layers: Sequence[int], run: Run) -> Batch:
    """Lay traces end to end and decode their hidden states."""
    traces = [e.trace for e in encoded]
    lengths_B = np.array([t.num_tokens for t in traces])
    starts_B1 = np.concatenate([[0], np.cumsum(lengths_B)])
    token_ids_T = np.concatenate([t.token_ids_T for t in traces]).astype(np.int64)
    rows_R = np.concatenate([start + t.positions_R for start, t in zip(starts_B1[:-1], traces, strict=True)])
    tail_mass_R, topk_counts_R = _joined(traces, "tail_mass_R"), _joined(traces, "topk_counts_R")
    head = FlatEntries(topk_counts_R, _joined(traces, "topk_ids_N"),
                       scaled_head(_joined(traces, "topk_logprobs_N"), topk_counts_R, tail_mass_R).astype(np.float32))
    tail = FlatEntries(_joined(traces, "tail_counts_R"), _joined(traces, "tail_ids_N"),
                       _joined(traces, "tail_logprobs_N"))
    return Batch(
        token_ids_T=torch.from_numpy(token_ids_T),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths_B])),
        cu_seqlens_B1=torch.from_numpy(starts_B1.astype(np.int32)),
        loss_mask_T=torch.from_numpy(_joined(traces, "loss_mask_T")),
        rows_R=torch.from_numpy(rows_R), next_ids_R=torch.from_numpy(token_ids_T[rows_R + 1]),
        next_logprob_R=torch.from_numpy(_joined(traces, "next_logprob_R")),
        hidden={n: _packed_hidden(encoded, n, starts_B1, run) for n in layers},
        target=SparseTarget.from_flat(head, tail, tail_mass_R, run.spec.target.vocab_size),
        ordinals_B=torch.tensor([t.ordinal for t in traces]))


def _packed_hidden(encoded: Sequence[EncodedTrace], layer: int, starts_B1: np.ndarray, run: Run) -> Tensor:
    codec, hidden_size = run.spec.capture.hidden_codec, run.spec.target.hidden_size
    dtype = torch.float32 if codec == "f32" else torch.bfloat16
    packed_TH = torch.zeros(int(starts_B1[-1]), hidden_size, dtype=dtype)
    for start, one in zip(starts_B1[:-1], encoded, strict=True):
        packed_TH[start:start + one.trace.num_tokens - 1] = decode_hidden(one.blobs[layer], codec, hidden_size,
                                                                          dtype=dtype)
    return packed_TH


def _joined(traces: Sequence[Trace], attribute: str) -> np.ndarray:
    return np.concatenate([getattr(t, attribute) for t in traces])


def _open_shard(root: LocalRoot, run: Run, shard: int, layers: Sequence[int]) -> tuple[pa.Table, pa.Table]:
    """The main shard, and as many rows of its sidecar with the wanted layers: none of them leaves ordinals alone."""
    info = _checked_info(root, run, shard)
    main = read_main(root.local(shard_name(shard)), info, run.spec.capture)
    if not layers or not info.traces:
        return main, main.select(["ordinal"])
    if info.hidden is None:
        raise DamageError(f"{root.local(shard_name(shard))}: its record lacks the hidden-state sidecar")
    path = root.local(info.hidden.name)
    _require_size(path, info.hidden.size)
    sidecar = read_sidecar_info(path)
    if sidecar != sidecar_info(run, shard):
        raise DamageError(f"{path} does not hold what this run captures of shard {shard}")
    hidden = read_sidecar(path, sidecar, layers, info.traces, info.tokens)
    require_same_traces(hidden, main["ordinal"].to_pylist())
    return main, hidden


def _ordinals(root: LocalRoot, run: Run, shard: int) -> list[int]:
    info = _checked_info(root, run, shard)
    table = read_table(root.local(shard_name(shard)), pa.schema([MAIN_SCHEMA.field("ordinal")]),
                       {"ordinal": Limit(info.traces)})
    ordinals: list[int] = table["ordinal"].to_pylist()
    return ordinals


def _checked_info(root: LocalRoot, run: Run, shard: int) -> ShardInfo:
    """The shard's record: from its fragment, which also knows the file's size, or from the footer."""
    path = root.local(shard_name(shard))
    fragment = read_fragment(root, shard)
    if fragment is not None and (fragment.info.fingerprint, fragment.info.shard) == (run.fingerprint, shard):
        _require_size(path, fragment.file.size)
        return fragment.info
    info = read_shard_info(path)
    if (info.fingerprint, info.shard) != (run.fingerprint, shard):
        raise DamageError(f"{path} belongs to another run or another shard")
    return info


def _require_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != size:
        raise DamageError(f"{path} is missing" if found is None else f"{path} has {found} bytes, expected {size}")
