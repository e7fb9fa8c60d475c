"""Catches bounds that the true acceptance rate can leave, or that are wider than what is stored leaves open.

Rows are rounded as a shard rounds them and scaled as a reader scales them; the truth is the dense target, and the worst
of all targets that would have been stored as the same row. Shapes: R rows, K head entries, V vocabulary.
"""

import itertools
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from dense_losses import exact_terms, logits
from hypothesis import given, settings
from numpy.typing import NDArray
from tiny_datasets import Shape, make_dataset, random_trace, start_run, trace_from_logits
from torch import Tensor

from distill_pipe.consume import DraftVocabulary, ShardReader, SparseTarget, expected_length_loss, tv_loss
from distill_pipe.consume.packing import pack
from distill_pipe.produce.comparison import half_unit
from distill_pipe.store.manifest import Run
from distill_pipe.store.shard import main_table, traces_from_table
from distill_pipe.store.sidecar import EncodedTrace
from distill_pipe.store.trace import Trace

BITS, TEMPERATURES = range(3, 25), (1.0, 0.9, 0.6, 0.25, 0.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start_run(tmp_path_factory.mktemp("run"), 1, Shape(layers=()))


def stored(run: Run, target_RV: Tensor, top_k: int, bits: int) -> tuple[SparseTarget, Trace]:
    """The rows as they come out of a reader, and as they lie in the shard."""
    rows, vocab = target_RV.shape
    shape = Shape(vocab_size=vocab, top_k=top_k, tail_samples=2, layers=(), logprob_bits=bits)
    mask_T = np.arange(rows + 1) > 0
    trace = trace_from_logits(0, np.zeros(rows + 1, np.int32), mask_T, np.pad(target_RV.numpy(), ((0, 1), (0, 0))), {},
                              shape)
    (read,) = traces_from_table(main_table([trace], bits)[0], vocab)
    spec = msgspec.structs.replace(
        run.spec, target=msgspec.structs.replace(run.spec.target, vocab_size=vocab),
        capture=msgspec.structs.replace(run.spec.capture, logprob_bits=bits, top_k=top_k))
    return pack([EncodedTrace(read)], (), msgspec.structs.replace(run, spec=spec)).target, read


@settings(max_examples=300)
@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 60), top_k=st.integers(1, 60), scale=st.floats(0, 12),
       noise=st.floats(0, 6), bits=st.sampled_from(BITS), temperature=st.sampled_from(TEMPERATURES),
       kept=st.floats(0.05, 1))
def test_the_dense_targets_acceptance_rate_lies_within_the_bounds(
        run: Run, seed: int, vocab: int, top_k: int, scale: float, noise: float, bits: int, temperature: float,
        kept: float) -> None:
    target_RV = logits(6, vocab, seed, scale)
    draft_RV = target_RV + logits(6, vocab, seed + 1, noise)
    target, _ = stored(run, target_RV, top_k, bits)
    said = torch.arange(vocab)[torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) < kept]
    for vocabulary in [None, DraftVocabulary.from_ids(said, vocab)] if len(said) else [None]:
        draft_RD = draft_RV if vocabulary is None else draft_RV[:, vocabulary.d2t_D]
        alpha_R = exact_terms(draft_RD.double(), target_RV, vocabulary, temperature).alpha_R
        output = tv_loss(draft_RD, target, vocabulary=vocabulary, temperature=temperature)
        # Logits are divided by T, and so is what float32 leaves out of them.
        assert (output.alpha_lower_R <= alpha_R + 1e-5 / temperature).all()
        assert (alpha_R <= output.alpha_upper_R + 1e-5 / temperature).all()


def limits(stored_K: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """The least and the most that each probability can have been, `[2, K]`."""
    rounded_K = np.where(stored_K == 0, 0, half_unit(stored_K, bits))
    return np.exp(np.stack([stored_K - rounded_K, np.minimum(stored_K + rounded_K, 0)]))


def corners(limits_2K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distributions over a vocabulary of K within the limits: every corner of what they allow. `[corners, K]`."""
    size, found = limits_2K.shape[1], []
    for free in range(size):
        others = np.delete(np.arange(size), free)
        for ends in itertools.product((0, 1), repeat=size - 1):
            p_K = np.zeros(size)
            p_K[others] = limits_2K[list(ends), others]
            p_K[free] = 1 - p_K.sum()
            if limits_2K[0, free] <= p_K[free] <= limits_2K[1, free]:
                found.append(p_K)
    return np.array(found).reshape(-1, size)


def nearest(limits_2K: NDArray[np.float64], q_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """The one within the limits that shares most with q: q moved as a whole until what is clipped adds up to 1."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(q_K + middle, *limits_2K).sum() < 1 else (low, middle)
    return np.clip(q_K + low, *limits_2K)


def worst_alphas(target: SparseTarget, read: Trace, r: int, q_V: Tensor, temperature: float
                 ) -> tuple[float, float] | None:
    """The least and the most alpha of row r over targets that would be stored like it: of all at temperature 1, where
    the least is in a corner, and of many below. None where rounding has left no target at all."""
    size = target.vocab_size
    limits_2K = limits(read.topk_logprobs_N.astype(np.float64)[r * size:(r + 1) * size], target.logprob_bits)
    q_K, found = q_V[target.topk_ids_RK[r]].numpy(), corners(limits_2K)
    if not len(found):
        return None
    powers = np.concatenate([found, nearest(limits_2K, q_K)[None]]) ** (1 / temperature)
    alphas = np.minimum(powers / powers.sum(1, keepdims=True), q_K).sum(1)
    return float(alphas.min()), float(alphas.max())


@settings(max_examples=120)
@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 6), scale=st.floats(0.1, 4), noise=st.floats(0, 3),
       bits=st.integers(3, 12))
def test_at_temperature_1_the_upper_bound_is_exact_and_the_interval_at_most_twice_what_is_possible(
        run: Run, seed: int, vocab: int, scale: float, noise: float, bits: int) -> None:
    target_RV = logits(4, vocab, seed, scale)
    draft_RV = target_RV + logits(4, vocab, seed + 1, noise)
    target, read = stored(run, target_RV, vocab, bits)
    output, q_RV = tv_loss(draft_RV, target), draft_RV.double().softmax(1)
    for r in range(4):
        worst = worst_alphas(target, read, r, q_RV[r], 1.0)
        if worst is None:
            continue
        least, most = worst
        assert output.alpha_lower_R[r] <= least + 2e-6
        assert output.alpha_upper_R[r] == pytest.approx(most, abs=4e-6)
        assert most - output.alpha_lower_R[r] <= 2 * (most - least) + 1e-5


def test_below_temperature_1_the_interval_is_seldom_three_times_what_is_possible(run: Run) -> None:
    ratios = []
    for seed, (bits, temperature) in enumerate(itertools.product((3, 5, 7), (0.9, 0.6, 0.25))):
        target_RV = logits(24, 5, seed)
        draft_RV = target_RV + logits(24, 5, seed + 100, 0.5)
        target, read = stored(run, target_RV, 5, bits)
        output = tv_loss(draft_RV, target, temperature=temperature)
        q_RV = (draft_RV.double() / temperature).softmax(1)
        for r in range(24):
            worst = worst_alphas(target, read, r, q_RV[r], temperature)
            if worst is not None:
                assert output.alpha_lower_R[r] <= worst[0] + 2e-6
                assert output.alpha_upper_R[r] >= worst[1] - 2e-6
                ratios.append(float(output.alpha_upper_R[r] - output.alpha_lower_R[r]) / (worst[1] - worst[0] + 1e-5))
    assert np.median(ratios) < 1.5
    assert np.quantile(ratios, 0.9) < 3


def test_the_true_rate_leaves_bounds_that_take_the_stored_numbers_for_exact(run: Run) -> None:
    """What the widening is for: without it, rows of few bits are outside by far."""
    target_RV = logits(200, 50, seed=1)
    draft_RV = target_RV + logits(200, 50, seed=2, scale=0.1)
    target, _ = stored(run, target_RV, 50, 5)
    believed = SparseTarget(target.topk_ids_RK, target.topk_logprobs_RK, target.tail_mass_R, target.tail_ids_RM,
                            target.tail_logprobs_RM, target.vocab_size)
    alpha_R = exact_terms(draft_RV.double(), target_RV).alpha_R
    outside_R = (tv_loss(draft_RV, believed, tail="drop").alpha_upper_R - alpha_R).abs()
    assert outside_R.mean() > 1e-3
    output = tv_loss(draft_RV, target, tail="drop")
    assert (output.alpha_lower_R <= alpha_R).all()
    assert (alpha_R <= output.alpha_upper_R).all()
    # Twice what all errors together may have done, beside what they did on average.
    assert (output.alpha_upper - output.alpha_lower).item() < 16 * outside_R.mean()


@pytest.mark.parametrize("bits", [3, 7, 24])
def test_a_reader_says_how_exact_its_rows_are_and_keeps_it_through_every_step(tmp_path: Path, bits: int) -> None:
    shape = Shape(logprob_bits=bits, layers=(1,))
    make_dataset(tmp_path, 8, shape)
    (batch,) = ShardReader(tmp_path)
    assert batch.target.logprob_bits == bits
    raw_R = np.concatenate([random_trace(o, shape).topk_logprobs_N[::shape.top_k] for o in batch.ordinals_B.tolist()])
    kept_R = (batch.target.topk_logprobs_RK[:, 0] - batch.target.topk_shift_R).numpy()
    assert (np.abs(kept_R - raw_R) <= (2.0**-bits + 1e-6) * np.abs(raw_R) + 1e-6).all()
    draft_RV = logits(len(batch.target), shape.vocab_size, seed=3)
    whole = tv_loss(draft_RV, batch.target)
    for target in (batch.target[torch.arange(len(batch.target))], batch.to("cpu").target, batch.padded().target,
                   SparseTarget.cat([batch.target[:3], batch.target[3:]])):
        again = tv_loss(draft_RV, target)
        assert torch.equal(again.alpha_lower_R, whole.alpha_lower_R)
        assert torch.equal(again.alpha_upper_R, whole.alpha_upper_R)
    assert batch.to("meta").target.topk_shift_R.device.type == "meta"


def test_rows_joined_are_as_exact_as_the_least_exact_of_them(run: Run) -> None:
    fine, coarse, whole = (stored(run, logits(2, 30, seed), 8, bits)[0] for seed, bits in ((0, 12), (1, 5), (2, 24)))
    bare = SparseTarget.from_logits(logits(2, 30, 4), 8, 2)
    joined = SparseTarget.cat([fine, coarse, whole, bare])
    assert joined.logprob_bits == 5
    assert torch.equal(joined.topk_shift_R[:4], torch.cat([fine.topk_shift_R, coarse.topk_shift_R]))
    assert (joined.topk_shift_R[6:] == 0).all()


def test_the_length_of_a_chain_lies_within_bounds_that_know_of_rounding(run: Run) -> None:
    rows = [(logits(40, 20, seed), logits(40, 20, seed + 50, 0.2)) for seed in range(3)]
    drafts = [target_RV + noise_RV for target_RV, noise_RV in rows]
    output = expected_length_loss(drafts, [stored(run, target_RV, 20, 4)[0] for target_RV, _ in rows], tail="drop")
    alphas = [exact_terms(draft_RV.double(), target_RV).alpha_R
              for draft_RV, (target_RV, _) in zip(drafts, rows, strict=True)]
    length = torch.stack(alphas).cumprod(0).sum(0).mean()
    assert output.length_lower < length < output.length_upper
