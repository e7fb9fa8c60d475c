"""Catches an order that loses or repeats a trace, leaves ranks out of step, or goes on elsewhere after a resume."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipe.consume.order import Contents, Cursor, EpochOrder, Selection, Span

Taken = tuple[int, int]


@dataclass(frozen=True)
class Dataset:
    """Token counts of each trace of each shard, without files. Ordinals leave gaps, as quarantined prompts do."""

    shards: tuple[tuple[int, ...], ...]

    def contents(self, shard: int) -> Contents:
        tokens_N = np.array(self.shards[shard], np.int64)
        return Contents(100 * shard + 3 * np.arange(len(tokens_N)), tokens_N)

    def order(self, selection: Selection, epoch: int = 0) -> EpochOrder:
        return EpochOrder(range(len(self.shards)), self.contents, selection, epoch)


datasets = st.lists(st.lists(st.integers(2, 40), max_size=7).map(tuple), max_size=9).map(tuple).map(Dataset)
selections = st.builds(Selection, batch_tokens=st.integers(1, 80), seed=st.integers(0, 3),
                       split=st.sampled_from(["all", "train", "heldout"]), holdout_every=st.integers(2, 5))
layouts = st.tuples(st.integers(1, 7), st.integers(1, 3))
settings.register_profile("order", deadline=None, max_examples=200)
ORDER = settings.get_profile("order")


def wanted(dataset: Dataset, selection: Selection) -> set[Taken]:
    pairs = [(shard, row, int(o)) for shard in range(len(dataset.shards))
             for row, o in enumerate(dataset.contents(shard).ordinals_N)]
    every = selection.holdout_every
    return {(shard, row) for shard, row, o in pairs
            if selection.split == "all" or (o % every == every - 1) == (selection.split == "heldout")}


def traces(order: EpochOrder, span: Span | None) -> list[Taken]:
    return [] if span is None else [(shard, row) for shard, rows in order.traces(span) for row in rows.tolist()]


def run_ranks(order: EpochOrder, cursor: Cursor, layout: tuple[int, int],
              stop: int | None = None) -> tuple[list[list[list[Taken]]], Cursor]:
    """What each rank trains on, step by step, up to a step; and the cursor then, which must be the same on all."""
    world, interleave = layout
    taken, cursors = [], []
    for rank in range(world):
        steps = list(itertools.islice(order.steps(cursor, rank, world, interleave), stop))
        taken.append([traces(order, span) for span, _ in steps])
        cursors.append([after for _, after in steps])
    assert all(c == cursors[0] for c in cursors), "ranks take different numbers of steps, or disagree where they are"
    return taken, cursors[0][-1] if cursors[0] else cursor


def flat(taken: list[list[list[Taken]]]) -> list[Taken]:
    return [trace for rank in taken for step in rank for trace in step]


@ORDER
@given(datasets, selections, layouts, st.integers(0, 3))
def test_every_trace_comes_exactly_once_and_ranks_stay_in_step(dataset: Dataset, selection: Selection,
                                                               layout: tuple[int, int], epoch: int) -> None:
    order = dataset.order(selection, epoch)
    taken, _ = run_ranks(order, Cursor(), layout)
    assert Counter(flat(taken)) == Counter(wanted(dataset, selection))
    for rank in taken:
        # Only the last step may find no batch.
        assert all(rank[:-1])
        for step in rank:
            tokens = [dataset.shards[shard][row] for shard, row in step]
            assert sum(tokens) <= selection.batch_tokens or len(tokens) == 1


@ORDER
@given(datasets, selections, layouts)
def test_what_is_in_a_batch_does_not_depend_on_the_world(dataset: Dataset, selection: Selection,
                                                         layout: tuple[int, int]) -> None:
    order = dataset.order(selection)
    alone, _ = run_ranks(order, Cursor(), (1, 1))
    shared, _ = run_ranks(order, Cursor(), layout)
    assert sorted(alone[0]) == sorted(step for rank in shared for step in rank if step)


@ORDER
@given(datasets, selections, layouts, st.integers(0, 12))
def test_a_resumed_epoch_goes_on_in_the_same_order_at_the_same_world(dataset: Dataset, selection: Selection,
                                                                     layout: tuple[int, int], stop: int) -> None:
    order = dataset.order(selection)
    whole, _ = run_ranks(order, Cursor(), layout)
    before, cursor = run_ranks(order, Cursor(), layout, stop)
    after, _ = run_ranks(dataset.order(selection), cursor, layout)
    assert [a + b for a, b in zip(before, after, strict=True)] == whole


@ORDER
@given(datasets, selections, st.lists(st.tuples(layouts, st.integers(0, 4)), max_size=4), layouts)
def test_however_often_the_world_changes_every_trace_comes_exactly_once(
        dataset: Dataset, selection: Selection, stages: list[tuple[tuple[int, int], int]],
        last: tuple[int, int]) -> None:
    order, cursor, seen = dataset.order(selection), Cursor(), []
    for layout, stop in stages:
        taken, cursor = run_ranks(order, cursor, layout, stop)
        seen += flat(taken)
    taken, _ = run_ranks(order, cursor, last)
    assert Counter(seen + flat(taken)) == Counter(wanted(dataset, selection))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    dataset = Dataset(((5,) * 6,) * 5)
    orders = {(seed, epoch): flat(run_ranks(dataset.order(Selection(
        batch_tokens=10, seed=seed, split="all", holdout_every=2), epoch), Cursor(), (1, 1))[0])
        for seed in range(3) for epoch in range(3)}
    assert len({tuple(o) for o in orders.values()}) == 9


def test_a_rank_opens_about_as_many_shards_as_it_trains_on() -> None:
    dataset = Dataset(((10,) * 64,) * 256)
    order = dataset.order(Selection(batch_tokens=80, seed=0, split="all", holdout_every=2))
    taken, _ = run_ranks(order, Cursor(), (16, 1))
    opened = [len({shard for step in rank for shard, _ in step}) for rank in taken]
    assert max(opened) <= 2 * 256 / 16


def test_the_first_batch_looks_at_few_shards() -> None:
    looked_at = []
    dataset = Dataset(((10,) * 64,) * 10_000)

    def contents(shard: int) -> Contents:
        looked_at.append(shard)
        return dataset.contents(shard)

    order = EpochOrder(range(10_000), contents, Selection(batch_tokens=80, seed=0, split="all", holdout_every=2), 0)
    next(order.steps(Cursor(), 3, 8))
    assert len(set(looked_at)) <= 8


def test_interleaving_takes_batches_of_several_shards_by_turns() -> None:
    dataset = Dataset(((10,) * 8,) * 8)
    order = dataset.order(Selection(batch_tokens=20, seed=0, split="all", holdout_every=2))
    taken, _ = run_ranks(order, Cursor(), (1, 4))
    assert all(len({step[0][0] for step in taken[0][i:i + 4]}) >= 3 for i in range(0, 32, 4))
