"""Catches a head that is not the top K, a tail mass without relative precision, and tail samples that are biased.

Shapes: R rows, K head entries, M tail samples, V vocabulary.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from distill_pipe.produce.head import BLOCK, HeadReducer, HeadRows, VocabShard, row_uniforms
from distill_pipe.store.spec import CaptureSpec

VOCABS = [7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]


def random_logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32))


def head_rows(logits_RV: Tensor, capture: CaptureSpec, uniform_R: Tensor, next_R: Tensor | None = None) -> HeadRows:
    unknown_R = torch.full((len(logits_RV),), -1)
    return HeadReducer(capture).rows(logits_RV, uniform_R, unknown_R if next_R is None else next_R)


def kept(top_k: int, tail_samples: int, coverage: float | None = None) -> CaptureSpec:
    return CaptureSpec(top_k=top_k, tail_samples=tail_samples, coverage=coverage)


def evenly(rows: int) -> Tensor:
    """Uniforms at the middle of `rows` equal cells of [0, 1)."""
    return ((torch.arange(rows, dtype=torch.float64) + 0.5) / rows).float()


def oracle(logits_RV: Tensor, top_k: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Log-probabilities of all tokens, ids of the head, and the tail's probabilities (0 in the head), in float64."""
    exact_RV = logits_RV.double().log_softmax(-1).numpy()
    ids_RK = np.argsort(-logits_RV.numpy(), axis=1, kind="stable")[:, :top_k]
    tail_RV = np.exp(exact_RV)
    np.put_along_axis(tail_RV, ids_RK, 0.0, axis=1)
    return exact_RV, ids_RK, tail_RV


@pytest.mark.parametrize("vocab", VOCABS)
def test_head_logsumexp_and_tail_mass_agree_with_a_float64_oracle(vocab: int) -> None:
    logits_RV, top_k = random_logits(50, vocab), 5
    rows = head_rows(logits_RV, kept(top_k, 3), evenly(50))
    exact_RV, ids_RK, tail_RV = oracle(logits_RV, top_k)
    assert np.array_equal(rows.topk_ids_RK.numpy(), ids_RK)
    np.testing.assert_allclose(rows.topk_logprobs_RK.numpy(), np.take_along_axis(exact_RV, ids_RK, 1), atol=3e-6)
    np.testing.assert_allclose(rows.logsumexp_R.numpy(), logits_RV.double().logsumexp(-1).numpy(), atol=3e-6)
    np.testing.assert_allclose(rows.tail_mass_R.numpy(), tail_RV.sum(1), rtol=1e-5)
    ids_RM = rows.tail_ids_RM.numpy()
    np.testing.assert_allclose(rows.tail_logprobs_RM.numpy(), np.take_along_axis(exact_RV, ids_RM, 1), atol=3e-6)
    assert (np.diff(rows.topk_logprobs_RK.numpy()) <= 0).all()


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 60.0, 80.0])
def test_the_tail_mass_keeps_its_relative_precision_however_small_it_is(gap: float) -> None:
    logits_RV = random_logits(20, 1000, scale=1.0)
    logits_RV[:, :4] += gap + 8
    rows = head_rows(logits_RV, kept(4, 2), evenly(20))
    _, _, tail_RV = oracle(logits_RV, 4)
    mass_R = tail_RV.sum(1)
    assert mass_R.max() < np.exp(-gap)
    # float32 keeps the difference of logit and logsumexp to half a unit in the last place, of about 100 here.
    np.testing.assert_allclose(rows.tail_mass_R.numpy(), mass_R, rtol=2e-5)
    assert (rows.tail_ids_RM >= 4).all()


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    logits_RV = random_logits(8, 300).bfloat16()
    next_R = torch.arange(8)
    a, b = (head_rows(logits, kept(3, 2), evenly(8), next_R) for logits in (logits_RV, logits_RV.float()))
    assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    assert a.logsumexp_R.dtype == torch.float32


def test_the_logits_are_left_as_they_were() -> None:
    logits_RV = random_logits(4, 300)
    kept_RV = logits_RV.clone()
    head_rows(logits_RV, kept(3, 2), evenly(4))
    assert torch.equal(logits_RV, kept_RV)


@pytest.mark.parametrize("vocab", VOCABS)
def test_a_head_of_the_whole_vocabulary_has_no_tail(vocab: int) -> None:
    rows = head_rows(random_logits(5, vocab), kept(vocab, 3), evenly(5))
    assert (rows.tail_mass_R == 0).all()
    assert (rows.tail_ids_RM == -1).all()
    np.testing.assert_allclose(rows.topk_logprobs_RK.double().exp().sum(1).numpy(), 1, rtol=1e-5)


def test_no_samples_are_drawn_when_none_are_asked_for() -> None:
    rows = head_rows(random_logits(5, 300), kept(4, 0), evenly(5))
    assert rows.tail_ids_RM.shape == rows.tail_logprobs_RM.shape == (5, 0)
    assert (rows.tail_mass_R > 0).all()


def test_rows_with_all_their_mass_on_one_token_are_finite_and_have_no_tail() -> None:
    logits_RV = torch.zeros(3, 500)
    logits_RV[0, 17], logits_RV[1, 499], logits_RV[2, 0] = 1e4, 3e3, 500.0
    rows = head_rows(logits_RV, kept(4, 2), evenly(3))
    assert all(t.isfinite().all() for t in rows.tensors()[:-1])
    assert rows.topk_ids_RK[:, 0].tolist() == [17, 499, 0]
    assert rows.topk_logprobs_RK[:, 0].tolist() == [0, 0, 0]
    assert rows.tail_mass_R.tolist() == [0, 0, 0]
    assert (rows.tail_ids_RM == -1).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_a_tail_of_one_token_gives_that_token_every_time(vocab: int) -> None:
    logits_RV = random_logits(9, vocab)
    rows = head_rows(logits_RV, kept(vocab - 1, 4), evenly(9))
    assert (rows.tail_ids_RM == logits_RV.argmin(1)[:, None]).all()


def test_uniform_logits_give_a_uniform_tail() -> None:
    rows = head_rows(torch.zeros(1, 1000), kept(100, 900), torch.tensor([0.5]))
    assert rows.tail_mass_R.item() == pytest.approx(0.9, rel=1e-6)
    tail = set(range(1000)) - set(rows.topk_ids_RK[0].tolist())
    assert set(rows.tail_ids_RM[0].tolist()) == tail


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(VOCABS), st.integers(1, 7), st.integers(1, 9), st.floats(0.01, 60), st.integers(0, 2**31),
       st.sampled_from([0.0, 0.5, 1 - 2.0**-24]))
def test_samples_are_never_in_the_head_and_always_have_mass(vocab: int, top_k: int, samples: int, scale: float,
                                                            seed: int, uniform: float) -> None:
    logits_RV = random_logits(16, vocab, seed, scale)
    rows = head_rows(logits_RV, kept(top_k, samples), torch.full((16,), uniform))
    for r in range(16):
        ids = rows.tail_ids_RM[r].tolist()
        if rows.tail_mass_R[r] == 0:
            assert ids == [-1] * samples
            continue
        assert not set(ids) & set(rows.topk_ids_RK[r].tolist())
        assert all(0 <= i < vocab for i in ids)
        assert rows.tail_logprobs_RM[r].isfinite().all()
        assert ids == sorted(ids), "systematic samples rise along the cumulative tail"


def expected_counts(rows: HeadRows, vocab: int) -> NDArray[np.float64]:
    """The share of all samples that fell on each token."""
    return np.bincount(rows.tail_ids_RM.flatten().numpy(), minlength=vocab) / rows.tail_ids_RM.numel()


@pytest.mark.parametrize(("vocab", "samples"), [(13, 1), (13, 4), (BLOCK + 30, 8), (3 * BLOCK, 3)])
def test_integrating_over_the_uniform_gives_exactly_the_tail_distribution(vocab: int, samples: int) -> None:
    cells, top_k = 20_000, 4
    logits_1V = random_logits(1, vocab, seed=vocab)
    rows = head_rows(logits_1V.expand(cells, -1), kept(top_k, samples), evenly(cells))
    _, _, tail_1V = oracle(logits_1V, top_k)
    # Each token owns one interval of the tail, so a grid of cells * samples points misses it by two points at most.
    found_V, wanted_V = expected_counts(rows, vocab), tail_1V[0] / tail_1V[0].sum()
    assert np.abs(found_V - wanted_V).max() <= 2 / (cells * samples)


def test_the_mean_over_random_uniforms_is_the_tail_distribution_within_five_standard_errors() -> None:
    draws, vocab, samples = 20_000, 300, 4
    logits_1V = random_logits(1, vocab, seed=3)
    uniform_R = torch.from_numpy(row_uniforms(5, 7, np.arange(draws)))
    found_V = expected_counts(head_rows(logits_1V.expand(draws, -1), kept(6, samples), uniform_R), vocab)
    _, _, tail_1V = oracle(logits_1V, 6)
    wanted_V = tail_1V[0] / tail_1V[0].sum()
    # The samples of a row are negatively dependent, so independent rows with M = 1 bound the variance.
    error_V = np.sqrt(wanted_V * (1 - wanted_V) / draws)
    assert (np.abs(found_V - wanted_V) <= 5 * error_V + 1e-9).all()


def test_tail_mass_times_the_mean_of_a_function_is_unbiased_and_varies_no_more_than_with_independent_draws() -> None:
    cells, vocab, samples = 20_000, 600, 8
    logits_1V = random_logits(1, vocab, seed=11)
    rows = head_rows(logits_1V.expand(cells, -1), kept(5, samples), evenly(cells))
    _, _, tail_1V = oracle(logits_1V, 5)
    ratios = []
    for seed in range(40):
        function_V = np.minimum(1, np.exp(np.random.default_rng(seed).normal(0, 2, vocab)))
        estimates_R = rows.tail_mass_R.numpy().astype(np.float64) * function_V[rows.tail_ids_RM.numpy()].mean(1)
        assert estimates_R.mean() == pytest.approx((tail_1V[0] * function_V).sum(), rel=2e-4)
        independent = tail_1V[0].sum() ** 2 * np.cov(function_V, aweights=tail_1V[0], ddof=0) / samples
        ratios.append(estimates_R.var() / independent)
    # One function may suit the order of the ids and another not; over many of them strata can only help.
    assert 0 < np.mean(ratios) < 1


def test_the_samples_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    logits_RV, uniform_R = random_logits(12, 700), evenly(12)
    together = head_rows(logits_RV, kept(4, 5), uniform_R)
    for r in range(12):
        alone = head_rows(logits_RV[r:r + 1], kept(4, 5), uniform_R[r:r + 1])
        assert torch.equal(alone.tail_ids_RM[0], together.tail_ids_RM[r])


def test_uniforms_are_a_pure_function_of_seed_ordinal_and_position() -> None:
    positions = np.arange(1000)
    base = row_uniforms(1, 2, positions)
    assert base.dtype == np.float32
    assert np.array_equal(base, row_uniforms(1, 2, positions))
    assert np.array_equal(base[[7, 3, 500]], row_uniforms(1, 2, np.array([7, 3, 500])))
    for other in (row_uniforms(0, 2, positions), row_uniforms(1, 3, positions), row_uniforms(2, 1, positions),
                  row_uniforms(1, 2, positions + 1000)):
        assert (base == other).mean() < 0.01


def test_neighbouring_seeds_ordinals_and_positions_do_not_share_their_uniforms() -> None:
    first = {(seed, ordinal): tuple(row_uniforms(seed, ordinal, np.arange(4)))
             for seed in range(30) for ordinal in range(30)}
    assert len(set(first.values())) == 900
    one = {(seed, ordinal): row_uniforms(seed, ordinal, np.arange(2000)) for seed, ordinal in ((0, 0), (0, 1), (1, 0))}
    for a in one:
        assert abs(np.corrcoef(one[a][:-1], one[a][1:])[0, 1]) < 0.1
        for b in one:
            assert a == b or abs(np.corrcoef(one[a], one[b])[0, 1]) < 0.1


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1])
def test_uniforms_lie_in_the_unit_interval_and_fill_it_evenly(seed: int) -> None:
    values = np.concatenate([row_uniforms(seed, ordinal, np.arange(100)) for ordinal in range(1000)])
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, 50, (0, 1))[0]
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    # 49 degrees of freedom: 1 in 10^6 lies above 113.
    assert chi_square < 113


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [1, 8, 200])
def test_an_adaptive_head_is_the_smallest_that_covers_enough_or_the_largest_allowed(coverage: float,
                                                                                    top_k: int) -> None:
    logits_RV = random_logits(60, 2 * BLOCK + 9)
    rows = head_rows(logits_RV, kept(top_k, 3, coverage), evenly(60))
    exact_RV, ids_RK, _ = oracle(logits_RV, top_k)
    for r in range(60):
        size = int((rows.topk_ids_RK[r] >= 0).sum())
        mass_K = np.exp(exact_RV[r, ids_RK[r]])
        assert rows.topk_ids_RK[r, :size].tolist() == ids_RK[r, :size].tolist()
        assert (rows.topk_ids_RK[r, size:] == -1).all()
        assert size == 1 or mass_K[:size - 1].sum() < coverage + 1e-6
        assert size == top_k or mass_K[:size].sum() >= coverage - 1e-6
        head = ids_RK[r, :size]
        tail = 1 - np.exp(exact_RV[r, head]).sum()
        assert rows.tail_mass_R[r].item() == pytest.approx(tail, rel=1e-4, abs=1e-6)
        assert not set(rows.tail_ids_RM[r].tolist()) & set(head.tolist())


def test_a_vocabulary_of_a_quarter_million_keeps_its_last_ids() -> None:
    vocab = 262_144
    logits_RV = random_logits(3, vocab, scale=1.0)
    logits_RV[0, vocab - 1], logits_RV[1, 2**17] = 30.0, 30.0
    rows = head_rows(logits_RV, kept(32, 8), evenly(3))
    assert rows.topk_ids_RK[:2, 0].tolist() == [vocab - 1, 2**17]
    assert rows.topk_ids_RK.max() < vocab
    assert rows.tail_ids_RM[2].max() > 2**17


def test_the_next_token_has_its_own_logprob_wherever_it_is_and_none_where_it_is_not_known() -> None:
    logits_RV = random_logits(40, 3 * BLOCK)
    next_R = torch.from_numpy(np.random.default_rng(1).integers(0, 3 * BLOCK, 40))
    next_R[::5] = -1
    found_R = head_rows(logits_RV, kept(4, 2), evenly(40), next_R).next_logprob_R
    exact_RV, _, _ = oracle(logits_RV, 4)
    assert found_R[::5].isnan().all()
    known = next_R >= 0
    np.testing.assert_allclose(found_R[known], exact_RV[known.numpy(), next_R[known]], atol=3e-6)


@pytest.mark.parametrize(("vocab", "top_k"), [(49152, 32), (4096, 64), (4096 + 8, 32), (5000, 40), (2048, 32)])
def test_the_head_is_found_in_groups_where_the_vocabulary_divides_and_without_them_where_not(vocab: int,
                                                                                             top_k: int) -> None:
    # Neighbouring groups of large values: a selection that took one token of each group would miss most of them.
    logits_RV = random_logits(6, vocab)
    logits_RV[:, 7:vocab:vocab // 16] += 20
    logits_RV[:, -20:] += 15
    rows = head_rows(logits_RV, kept(top_k, 2), evenly(6))
    assert torch.equal(rows.topk_ids_RK, logits_RV.topk(top_k, dim=-1).indices.int())


@pytest.mark.parametrize("samples", [1, 8])
def test_inclusion_frequencies_over_ten_thousand_draws_match_theory_by_chi_square(samples: int) -> None:
    draws, vocab, top_k = 10_000, 60, 6
    logits_1V = random_logits(1, vocab, seed=21, scale=1.0)
    rows = head_rows(logits_1V.expand(draws, -1), kept(top_k, samples), torch.from_numpy(
        row_uniforms(3, 1, np.arange(draws))))
    _, _, tail_1V = oracle(logits_1V, top_k)
    share_V = tail_1V[0] / tail_1V[0].sum()
    # Sample m of a row is stratum m of the tail, so each column by itself is a sequence of independent draws from it.
    ends_V = np.cumsum(share_V) * samples
    for m in range(samples):
        stratum_V = np.clip(ends_V, m, m + 1) - np.clip(ends_V - share_V * samples, m, m + 1)
        seen = stratum_V * draws > 5
        counts_V = np.bincount(rows.tail_ids_RM[:, m].numpy(), minlength=vocab)
        chi_square = ((counts_V - draws * stratum_V)[seen] ** 2 / (draws * stratum_V)[seen]).sum()
        freedom = max(int(seen.sum()) - 1, 1)
        assert counts_V[stratum_V < 1e-9].sum() == 0
        # Wilson and Hilferty's normal form of chi-square; 4.75 standard deviations are one in a million.
        assert (chi_square / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5


class Devices:
    """Threads that stand for the devices of a tensor-parallel group: `gather` meets the others at a barrier."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier, self._slots = threading.Barrier(count), [torch.empty(0)] * count

    def gather(self, rank: int, part_RN: Tensor) -> Tensor:
        self._slots[rank] = part_RN
        self._barrier.wait(30)
        gathered_SRN = torch.stack(self._slots)
        self._barrier.wait(30)
        return gathered_SRN

    def reduce(self, logits_RV: Tensor, capture: CaptureSpec, uniform_R: Tensor, next_R: Tensor) -> list[HeadRows]:
        ends = [logits_RV.shape[1] * (rank + 1) // self.count for rank in range(self.count)]

        def one(rank: int) -> HeadRows:
            first = ends[rank - 1] if rank else 0
            shard = VocabShard(first, rank, partial(self.gather, rank))
            return HeadReducer(capture, shard).rows(logits_RV[:, first:ends[rank]], uniform_R, next_R)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize(("vocab", "top_k", "coverage"), [(49152, 32, None), (5003, 40, 0.9), (60, 25, None)])
def test_a_vocabulary_split_over_devices_gives_the_same_rows_on_each(devices: int, vocab: int, top_k: int,
                                                                     coverage: float | None) -> None:
    logits_RV, uniform_R = random_logits(50, vocab, seed=2), torch.from_numpy(row_uniforms(1, 2, np.arange(50)))
    next_R = torch.from_numpy(np.random.default_rng(1).integers(-1, vocab, 50))
    capture = kept(top_k, 8, coverage)
    whole = head_rows(logits_RV, capture, uniform_R, next_R)
    for found in Devices(devices).reduce(logits_RV, capture, uniform_R, next_R):
        assert torch.equal(found.topk_ids_RK, whole.topk_ids_RK)
        # A point within rounding of the border between two tokens may fall on either.
        same = found.tail_ids_RM == whole.tail_ids_RM
        assert same.double().mean() >= 0.99
        assert torch.allclose(found.tail_logprobs_RM[same], whole.tail_logprobs_RM[same], atol=3e-6)
        for a, b in zip(found.tensors(), whole.tensors(), strict=True):
            if a.dtype == torch.float32 and a is not found.tail_logprobs_RM:
                np.testing.assert_allclose(a, b, atol=3e-6, rtol=1e-5)
