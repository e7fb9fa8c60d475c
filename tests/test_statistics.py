"""Catches statistics that depend on how traces are cut into shards, or that say something else than their docstrings.

Shapes: T tokens, R supervised rows, N flat entries, K head entries, M tail samples, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_datasets import Shape, random_trace, trace_from_logits

from distill_pipe.errors import CaptureError, MismatchError
from distill_pipe.store.parquet import Limit, read_table
from distill_pipe.store.statistics import (
    TOKEN_SCHEMA,
    Histogram,
    ShardStatistics,
    coverage,
    draft_vocabulary,
    merge,
    merge_token_tables,
    row_entropy,
    shard_statistics,
    token_table,
    token_table_name,
    write_token_table,
)
from distill_pipe.store.trace import Trace

VOCAB = 24
shapes = st.builds(Shape, vocab_size=st.just(VOCAB), layers=st.just(()), top_k=st.integers(1, VOCAB),
                   tail_samples=st.integers(0, 5))
parts = st.lists(st.lists(st.integers(0, 1000), max_size=3), max_size=4)
seeds = st.integers(0, 2**31)


def shard_of(ordinals: Sequence[int], shape: Shape, seed: int) -> list[Trace]:
    return [random_trace(ordinal, shape, seed) for ordinal in ordinals]


def trace_of_rows(logits_RV: NDArray[np.float32], top_k: int, tail_samples: int, ordinal: int = 0) -> Trace:
    """A trace whose rows are these distributions, in order; its next tokens are 0, 1, 2 ... and around again."""
    rows, vocab_size = logits_RV.shape
    tokens_T = (np.arange(-1, rows) % vocab_size).astype(np.int32)
    loss_mask_T = np.arange(rows + 1) > 0
    logits_TV = np.concatenate([logits_RV, logits_RV[-1:]])
    return trace_from_logits(ordinal, tokens_T, loss_mask_T, logits_TV, {},
                             Shape(vocab_size=vocab_size, layers=(), top_k=top_k, tail_samples=tail_samples))


def dense(logits_RV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities in float64."""
    logits_RV = logits_RV.astype(np.float64)
    shifted_RV = logits_RV - logits_RV.max(1, keepdims=True)
    return shifted_RV - np.log(np.exp(shifted_RV).sum(1, keepdims=True))


def dense_entropy(logits_RV: NDArray[np.float32]) -> NDArray[np.float64]:
    logprobs_RV = dense(logits_RV)
    return -(np.exp(logprobs_RV) * logprobs_RV).sum(1)


def random_logits(seed: int, rows: int, vocab_size: int, scale: float = 2.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, scale, (rows, vocab_size)).astype(np.float32)


def table_of(count: dict[int, int], mass: dict[int, float]) -> pa.Table:
    ids = sorted(count | mass)
    return pa.table([ids, [count.get(i, 0) for i in ids], [mass.get(i, 0.0) for i in ids]], schema=TOKEN_SCHEMA)


def assert_same_tables(found: pa.Table, wanted: pa.Table) -> None:
    assert found.schema.equals(TOKEN_SCHEMA)
    assert found["token_id"].equals(wanted["token_id"])
    assert found["count"].equals(wanted["count"])
    np.testing.assert_allclose(found["mass"], wanted["mass"], rtol=1e-6)


@given(parts, shapes, seeds)
def test_merging_the_statistics_of_shards_gives_those_of_all_their_traces(
        ordinals: list[list[int]], shape: Shape, seed: int) -> None:
    shards = [shard_of(some, shape, seed) for some in ordinals]
    assert merge(map(shard_statistics, shards)) == shard_statistics([t for shard in shards for t in shard])


@given(parts, shapes, seeds)
def test_merging_token_tables_gives_the_table_of_all_their_traces(
        ordinals: list[list[int]], shape: Shape, seed: int) -> None:
    shards = [shard_of(some, shape, seed) for some in ordinals]
    merged = merge_token_tables((token_table(shard, VOCAB) for shard in shards), VOCAB)
    assert_same_tables(merged, token_table([t for shard in shards for t in shard], VOCAB))


@given(st.lists(st.integers(0, 1000), max_size=4), shapes, seeds)
def test_every_row_and_every_trace_is_in_exactly_one_bin_of_each_histogram(
        ordinals: list[int], shape: Shape, seed: int) -> None:
    traces = shard_of(ordinals, shape, seed)
    found, rows = shard_statistics(traces), sum(t.num_rows for t in traces)
    assert (found.entropy.total, found.tail_mass.total, found.top_k.total) == (rows, rows, rows)
    assert found.tokens.total == len(traces)


@given(st.lists(st.integers(0, 1000), max_size=4), shapes, seeds)
def test_mass_sums_to_the_rows_less_the_tails_that_were_not_sampled(
        ordinals: list[int], shape: Shape, seed: int) -> None:
    traces = shard_of(ordinals, shape, seed)
    table = token_table(traces, VOCAB)
    unknown = sum(float(t.tail_mass_R[t.tail_counts_R == 0].sum(dtype=np.float64)) for t in traces)
    rows = sum(t.num_rows for t in traces)
    assert sum(table["count"].to_pylist()) == rows
    assert sum(table["mass"].to_pylist()) == pytest.approx(rows - unknown, rel=1e-6, abs=1e-9)


@given(st.lists(st.integers(0, 1000), max_size=3), shapes, seeds)
def test_the_token_table_is_the_one_that_a_loop_over_rows_finds(
        ordinals: list[int], shape: Shape, seed: int) -> None:
    traces = shard_of(ordinals, shape, seed)
    count: dict[int, int] = {}
    mass: dict[int, float] = {}
    for trace in traces:
        heads, tails = np.cumsum(trace.topk_counts_R)[:-1], np.cumsum(trace.tail_counts_R)[:-1]
        rows = zip(trace.positions_R, trace.tail_mass_R.tolist(), np.split(trace.topk_ids_N, heads),
                   np.split(trace.topk_logprobs_N.astype(np.float64), heads), np.split(trace.tail_ids_N, tails),
                   strict=True)
        for position, tail_mass, head_K, logprobs_K, tail_M in rows:
            following = int(trace.token_ids_T[position + 1])
            count[following] = count.get(following, 0) + 1
            shares_K = (1 - tail_mass) * np.exp(logprobs_K) / np.exp(logprobs_K).sum()
            for token, weight in [*zip(head_K, shares_K, strict=True), *((x, tail_mass / len(tail_M)) for x in tail_M)]:
                mass[int(token)] = mass.get(int(token), 0.0) + float(weight)
    assert_same_tables(token_table(traces, VOCAB), table_of(count, mass))


@given(st.integers(2, 200), st.floats(0.1, 5), seeds)
def test_entropy_is_exact_when_the_head_holds_the_whole_vocabulary(vocab_size: int, scale: float, seed: int) -> None:
    logits_RV = random_logits(seed, 7, vocab_size, scale)
    found_R = row_entropy([trace_of_rows(logits_RV, vocab_size, 0)])
    np.testing.assert_allclose(found_R, dense_entropy(logits_RV), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("top_k", "tail_samples"), [(1, 1), (4, 2), (16, 8)])
def test_entropy_of_a_sampled_tail_is_unbiased(top_k: int, tail_samples: int) -> None:
    logits_RV = np.repeat(random_logits(3, 1, 200), 4000, 0)
    found_R = row_entropy([trace_of_rows(logits_RV, top_k, tail_samples)])
    error = found_R.std() / np.sqrt(len(found_R))
    assert error < 0.02
    assert abs(found_R.mean() - dense_entropy(logits_RV)[0]) < 4 * error


@given(st.integers(2, 60), st.integers(1, 8), seeds)
def test_entropy_without_tail_samples_is_a_lower_bound_above_the_heads_own(
        vocab_size: int, top_k: int, seed: int) -> None:
    logits_RV = random_logits(seed, 5, vocab_size)
    head_RK = -np.sort(-dense(logits_RV), 1)[:, :top_k]
    found_R = row_entropy([trace_of_rows(logits_RV, min(top_k, vocab_size), 0)])
    assert (found_R <= dense_entropy(logits_RV) + 1e-4).all()
    assert (found_R >= -(np.exp(head_RK) * head_RK).sum(1) - 1e-4).all()


def test_values_beyond_the_bins_are_counted_in_the_outermost() -> None:
    bins = Histogram(scale="log10", first=-2.0, step=1.0, bins=4)
    assert bins.edges.tolist() == pytest.approx([0.1, 1, 10])
    assert bins.of(np.array([0.0, 1e-9, 0.09])).counts == (3,)
    assert bins.of(np.array([0.11, 1.0, 9.9, 10.0, 1e30])).counts == (0, 1, 2, 2)
    assert bins.of(np.array([])).counts == ()


@given(st.integers(0, 23))
def test_a_power_of_two_opens_a_bin_of_lengths_and_of_head_sizes(power: int) -> None:
    empty = ShardStatistics()
    assert empty.tokens.of(np.array([2.0**power])).counts.index(1) == power
    assert empty.tokens.of(np.array([2.0**power - 1])).counts.index(1) == max(power - 1, 0)
    assert empty.top_k.of(np.array([2.0**power])).counts.index(1) == min(2 * power, 31)


def test_a_row_without_a_tail_and_a_row_that_is_all_tail_are_in_the_outermost_bins() -> None:
    assert ShardStatistics().tail_mass.of(np.array([0.0, 1e-7, 1.0])).counts == (2, *[0] * 23, 1)


def test_histograms_with_different_bins_cannot_be_added() -> None:
    wide, narrow = (Histogram(scale="linear", first=0.0, step=step, bins=4, counts=(1,)) for step in (1.0, 0.5))
    with pytest.raises(MismatchError, match="different bins"):
        _ = wide + narrow


def test_statistics_survive_json_and_stay_small_when_every_bin_is_full() -> None:
    empty = ShardStatistics()
    full = ShardStatistics(**{name: msgspec.structs.replace(getattr(empty, name), counts=(
        123456,) * getattr(empty, name).bins) for name in empty.__struct_fields__})
    for statistics in (empty, full, shard_statistics([random_trace(0)])):
        data = msgspec.json.encode(statistics)
        assert msgspec.json.decode(data, type=ShardStatistics) == statistics
        assert len(data) < 1500


@settings(max_examples=200)
@given(st.dictionaries(st.integers(0, 40), st.tuples(st.integers(0, 3), st.integers(0, 3))),
       st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_a_vocabulary_is_the_one_that_sorting_tokens_in_python_finds(
        tokens: dict[int, tuple[int, int]], sizes: list[int]) -> None:
    table = table_of({i: c for i, (c, _) in tokens.items()}, {i: m / 2 for i, (_, m) in tokens.items()})
    rows = max(sum(c for c, _ in tokens.values()), 1)
    ranked = sorted(tokens, key=lambda i: (-tokens[i][1], -tokens[i][0], i))
    for size, covered in zip(sizes, coverage(table, rows, sizes), strict=True):
        inside = ranked[:size]
        assert draft_vocabulary(table, size).tolist() == sorted(inside)
        assert covered.size == size
        assert covered.tokens == pytest.approx(sum(tokens[i][0] for i in inside) / rows)
        assert covered.mass == pytest.approx(min(sum(tokens[i][1] for i in inside) / 2 / rows, 1))


def test_coverage_is_the_highest_mean_acceptance_of_a_draft_with_that_vocabulary() -> None:
    logits_RV = random_logits(1, 50, 30)
    table = token_table([trace_of_rows(logits_RV, 30, 0)], 30)
    probs_RV = np.exp(dense(logits_RV))
    for covered in coverage(table, 50, (1, 5, 29, 30, 1000)):
        kept = draft_vocabulary(table, covered.size)
        best_RV = np.zeros_like(probs_RV)
        best_RV[:, kept] = probs_RV[:, kept] / probs_RV[:, kept].sum(1, keepdims=True)
        assert covered.mass == pytest.approx(np.minimum(probs_RV, best_RV).sum(1).mean(), rel=1e-5)
    assert coverage(table, 50, (30,))[0].mass == pytest.approx(1, rel=1e-6)
    assert coverage(table, 50, (30,))[0].tokens == 1


def test_nothing_is_covered_where_there_are_no_rows() -> None:
    covered, = coverage(token_table([], VOCAB), 0, (8,))
    assert (covered.tokens, covered.mass) == (0, 0)
    assert merge([]) == shard_statistics([])


def test_a_vocabulary_of_262144_tokens_works(tmp_path: Path) -> None:
    vocab_size = 262_144
    table = token_table([trace_of_rows(random_logits(0, 3, vocab_size), 32, 8, ordinal) for ordinal in range(3)],
                        vocab_size)
    assert sum(table["mass"].to_pylist()) == pytest.approx(9, rel=1e-6)
    assert_same_tables(merge_token_tables([table], vocab_size), table)
    last = table_of({vocab_size - 1: 1}, {vocab_size - 1: 0.5})
    assert draft_vocabulary(merge_token_tables([table, last], vocab_size), 10**6)[-1] == vocab_size - 1


def test_ids_outside_the_vocabulary_are_refused() -> None:
    trace = trace_of_rows(random_logits(0, 3, VOCAB), VOCAB, 0)
    with pytest.raises(CaptureError, match="token id 23 lies outside the vocabulary of 23 tokens"):
        token_table([trace], VOCAB - 1)
    with pytest.raises(MismatchError, match="outside the vocabulary of 23 tokens"):
        merge_token_tables([token_table([trace], VOCAB)], VOCAB - 1)


def test_a_token_table_comes_back_from_its_file_within_the_limit_of_the_vocabulary(tmp_path: Path) -> None:
    table = token_table(shard_of(range(8), Shape(vocab_size=VOCAB, layers=()), 0), VOCAB)
    write_token_table(tmp_path / "tokens", table)
    limits = dict.fromkeys(TOKEN_SCHEMA.names, Limit(VOCAB))
    assert read_table(tmp_path / "tokens", TOKEN_SCHEMA, limits).equals(table)
    assert token_table_name("_manifest/0000/0000123.json") == "_manifest/0000/0000123.tokens.parquet"
