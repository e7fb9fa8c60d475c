"""Which traces make a batch, and which rank takes it when.

(seed, epoch) alone put all traces of an epoch in one order: shards are shuffled, then the traces inside each shard. The
order is cut from front to back into batches of at most `batch_tokens`. Neither knows anything of ranks, so what is in a
batch is the same at any world size.

Ranks share the batches in rounds. A round takes the next shards, about one for each rank, and every rank gets a run of
consecutive batches of it, as many as every other; what does not divide evenly goes into the next round. Only the last
round of an epoch is filled up, with at most one padding batch per rank. So all ranks take the same number of steps,
however few shards there are, and a rank reads the hidden states of about as many shards as it trains on. The trade-off:
every rank looks up the lengths of all traces, one small column of each shard, shortly before it needs them.

A cursor says what is left of an epoch: the batches of the round, how many steps of it are done, and where the next
round starts. It is the same on all ranks, and any other number of ranks may go on from it.

Shapes: N traces of a shard.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Literal, get_args

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from distill_pipe.errors import UsageError

Split = Literal["all", "train", "heldout"]
_Count = Annotated[int, Meta(ge=0)]
_Positive = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True, slots=True)
class Contents:
    """What the order needs to know of a shard: ordinal and number of tokens of each trace, as they are stored."""

    ordinals_N: NDArray[np.int64]
    tokens_N: NDArray[np.int64]


class Span(Struct, frozen=True, array_like=True):
    """A batch: the traces from one place of the order up to another. A place is a shard, by its position in the
    shuffled order, and a trace of it, by its position in the shuffled shard."""

    shard: _Count
    trace: _Count
    stop_shard: _Count
    stop_trace: _Count


class Cursor(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an epoch stands. `pool` are the batches of the round, `steps` how many of its steps are done by each of
    `world` ranks, and `shard` and `trace` the place of the first trace that is in no batch yet."""

    pool: tuple[Span, ...] = ()
    world: _Positive = 1
    interleave: _Positive = 1
    steps: _Count = 0
    shard: _Count = 0
    trace: _Count = 0


class Selection(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything but the epoch and the dataset that decides what is in which batch."""

    batch_tokens: _Positive
    seed: _Count
    split: Split
    holdout_every: Annotated[int, Meta(ge=2)]

    def wanted(self, ordinals_N: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which traces belong to the split."""
        heldout_N: NDArray[np.bool_] = ordinals_N % self.holdout_every == self.holdout_every - 1
        return np.ones_like(heldout_N) if self.split == "all" else heldout_N == (self.split == "heldout")


def make_selection(batch_tokens: int, seed: int, split: Split, holdout_every: int) -> Selection:
    """The settings that decide what is in a batch.

    Raises:
        UsageError: one is out of range.
    """
    if batch_tokens < 1 or holdout_every < 2 or split not in get_args(Split):
        raise UsageError(f"batch_tokens {batch_tokens} must be at least 1, holdout_every {holdout_every} at least "
                         f"2, and split {split!r} one of {', '.join(get_args(Split))}")
    return Selection(batch_tokens=batch_tokens, seed=seed, split=split, holdout_every=holdout_every)


class EpochOrder:
    """All traces of one epoch in their order, and the batches they are cut into.

    Args:
        shards: the numbers of the shards, in ascending order.
        contents: looks a shard up; called when its turn comes, and again when it is needed again.
        look_up: where given, called with the shards of a round before that, so that they are looked up together.
    """

    def __init__(self, shards: Sequence[int], contents: Callable[[int], Contents], selection: Selection, epoch: int,
                 look_up: Callable[[Sequence[int]], None] | None = None) -> None:
        shuffled = np.random.default_rng([selection.seed, epoch]).permutation(np.array(shards, np.int64))
        self.shards: list[int] = shuffled.tolist()
        self._contents, self._look_up, self._selection, self._epoch = contents, look_up, selection, epoch

    def rows(self, position: int) -> NDArray[np.int64]:
        """Which rows of the shard at `position` belong to the split, in the order in which they come."""
        shard = self.shards[position]
        wanted_N = self._selection.wanted(self._contents(shard).ordinals_N)
        # Seeded per shard, so that the order inside a shard does not depend on which shards exist.
        inside = np.random.default_rng([self._selection.seed, self._epoch, shard])
        order_N = inside.permutation(len(wanted_N))
        return order_N[wanted_N[order_N]]

    def lengths(self, position: int) -> list[int]:
        """The tokens of each of these."""
        lengths: list[int] = self._contents(self.shards[position]).tokens_N[self.rows(position)].tolist()
        return lengths

    def traces(self, span: Span) -> list[tuple[int, NDArray[np.int64]]]:
        """The traces of a batch in order: shards, with the rows of each."""
        parts = []
        for position in range(span.shard, min(span.stop_shard + 1, len(self.shards))):
            first = span.trace if position == span.shard else 0
            stop = span.stop_trace if position == span.stop_shard else None
            rows = self.rows(position)[first:stop]
            if len(rows):
                parts.append((self.shards[position], rows))
        return parts

    def steps(self, cursor: Cursor, rank: int, world: int, interleave: int = 1) -> Iterator[tuple[Span | None, Cursor]]:
        """The batches of a rank, each with the cursor after it; None is a padding batch.

        At the world size and interleaving of the cursor its round goes on; at others, what is left of the round is
        shared anew.
        """
        if (cursor.world, cursor.interleave) != (world, interleave):
            cursor = Cursor(pool=self.left(cursor), world=world, interleave=interleave, shard=cursor.shard,
                            trace=cursor.trace)
        while True:
            last = self._is_last(cursor)
            mine = _turns(len(cursor.pool), rank, cursor, last)
            for step in range(cursor.steps, _num_steps(cursor, last)):
                after = msgspec.structs.replace(cursor, steps=step + 1)
                yield (cursor.pool[mine[step]] if step < len(mine) else None), after
            if last:
                return
            cursor = self._next_round(cursor)

    def left(self, cursor: Cursor) -> tuple[Span, ...]:
        """The batches of the round that no rank has taken."""
        last = self._is_last(cursor)
        taken = {turn for rank in range(cursor.world)
                 for turn in _turns(len(cursor.pool), rank, cursor, last)[:cursor.steps]}
        return tuple(span for turn, span in enumerate(cursor.pool) if turn not in taken)

    def _is_last(self, cursor: Cursor) -> bool:
        return cursor.shard >= len(self.shards)

    def _next_round(self, cursor: Cursor) -> Cursor:
        pool = list(cursor.pool[_num_steps(cursor, last=False) * cursor.world:])
        cut = _Cut(self, cursor.shard, cursor.trace, self._selection.batch_tokens)
        # The shard with the open batch was counted in the round before.
        looked_at = -1 if cursor.trace else 0
        if self._look_up is not None:
            self._look_up(self.shards[cursor.shard:cursor.shard + cursor.world * cursor.interleave])
        while not cut.done and (looked_at < cursor.world * cursor.interleave or len(pool) < cursor.world):
            pool += cut.shard()
            looked_at += 1
        if cut.done:
            pool += cut.rest()
        shard, trace = cut.start
        return msgspec.structs.replace(cursor, pool=tuple(pool), steps=0, shard=shard, trace=trace)


class _Cut:
    """Cuts the order into batches, shard by shard. `start` is where the batch starts that is still open."""

    def __init__(self, order: EpochOrder, shard: int, trace: int, batch_tokens: int) -> None:
        self._order, self._budget = order, batch_tokens
        self.start = (shard, trace)
        self._next, self._held = (shard, trace), 0

    @property
    def done(self) -> bool:
        return self._next[0] >= len(self._order.shards)

    def shard(self) -> list[Span]:
        """Look at the next shard; the batches that are complete then."""
        spans = []
        shard, first = self._next
        for trace, tokens in enumerate(self._order.lengths(shard)[first:], first):
            if self._held and self._held + tokens > self._budget:
                spans.append(Span(*self.start, shard, trace))
                self.start, self._held = (shard, trace), 0
            self._held += tokens
        self._next = (shard + 1, 0)
        return spans

    def rest(self) -> list[Span]:
        """After the last shard: the batch that is still open, if any."""
        spans = [Span(*self.start, *self._next)] if self._held else []
        self.start = self._next
        return spans


def _num_steps(cursor: Cursor, last: bool) -> int:
    """Steps of the round. Only the last one is filled up."""
    return -(-len(cursor.pool) // cursor.world) if last else len(cursor.pool) // cursor.world


def _turns(total: int, rank: int, cursor: Cursor, last: bool) -> list[int]:
    """Which batches of the round a rank takes, in its order: a run of consecutive ones, and of that run `interleave`
    parts by turns."""
    each, rest = divmod(total, cursor.world)
    rest = rest if last else 0
    first = rank * each + min(rank, rest)
    size = each + (rank < rest)
    part, longer = divmod(size, cursor.interleave)
    parts = []
    for lane in range(cursor.interleave):
        stop = first + part + (lane < longer)
        parts.append(range(first, stop))
        first = stop
    return [turn for turns in zip_longest(*parts) for turn in turns if turn is not None]
