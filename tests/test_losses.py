"""Catches wrong values, wrong gradients and dead or NaN gradients in the losses, against dense float64 oracles.

The oracles are those of `dense_losses`, differentiated by autograd, and the paper's analytic gradients. Shapes: R rows,
V vocabulary.
"""

import math

import hypothesis.strategies as st
import pytest
import torch
from dense_losses import CASES, ETA, combine, dense_terms, exact_terms, logits, ordinary_rows, sparse, whole
from hypothesis import given, settings
from torch import Tensor

from distill_pipe.consume import (
    DraftVocabulary,
    FusedLogits,
    LossOutput,
    SparseTarget,
    kl_loss,
    lk_alpha_loss,
    lk_hybrid_loss,
    reverse_kl_loss,
    tv_loss,
)
from distill_pipe.errors import UsageError

LOSSES = {"kl": kl_loss, "reverse_kl": reverse_kl_loss, "tv": tv_loss, "lk_alpha": lk_alpha_loss,
          "lk_hybrid": lk_hybrid_loss}
RULES = ("sampled", "drop", "bucket")


def run(name: str, draft_RV: Tensor, target: SparseTarget, **options: object) -> tuple[LossOutput, Tensor]:
    leaf_RV = draft_RV.detach().clone().requires_grad_()
    output = LOSSES[name](leaf_RV, target, **options)
    output.loss.backward()
    assert leaf_RV.grad is not None
    return output, leaf_RV.grad


def assert_close_gradients(found_RV: Tensor, expected_RV: Tensor, least: float = 1e-30) -> None:
    """Row by row, relative to the row's own size, so that a small gradient is checked as hard as a big one."""
    error_R = (found_RV.double() - expected_RV).norm(dim=1)
    assert (error_R <= 2e-4 * expected_RV.norm(dim=1) + least).all(), error_R / expected_RV.norm(dim=1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tail", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_dense_definition_of_the_tail_rule(name: str, tail: str, case: str) -> None:
    target_RV, draft_RV = CASES[case]()
    target = sparse(target_RV)
    output, grad_RV = run(name, draft_RV, target, tail=tail)
    exact_RV = draft_RV.double().requires_grad_()
    terms = dense_terms(exact_RV, target, tail)
    expected = combine(name, terms)
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-6)
    assert torch.allclose(output.alpha_R.double(), terms.alpha_R, rtol=1e-4, atol=1e-30)
    # Reverse KL is flat where all of q lies outside the head: what is left there is a difference of numbers near 10.
    assert_close_gradients(grad_RV, exact_RV.grad, least=1e-5 if name == "reverse_kl" else 1e-30)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tail", RULES)
def test_a_head_of_the_whole_vocabulary_gives_the_papers_gradients_under_every_rule(tail: str, case: str) -> None:
    target_RV, draft_RV = CASES[case]()
    p_RV, q_RV = target_RV.double().softmax(1), draft_RV.double().softmax(1)
    alpha_R1 = torch.minimum(p_RV, q_RV).sum(1, keepdim=True)
    sign_RV = (q_RV - p_RV).sign()
    tv_RV = 0.5 * q_RV * (sign_RV - (q_RV * sign_RV).sum(1, keepdim=True))
    log_ratio_RV = draft_RV.double().log_softmax(1) - target_RV.double().log_softmax(1)
    reverse_RV = q_RV * (log_ratio_RV - (q_RV * log_ratio_RV).sum(1, keepdim=True))
    expected = {"kl": q_RV - p_RV, "reverse_kl": reverse_RV, "tv": tv_RV, "lk_alpha": tv_RV / alpha_R1}
    share = math.exp(-ETA * alpha_R1.mean().item())
    expected["lk_hybrid"] = share * expected["kl"] + (1 - share) * tv_RV
    for name, grad_RV in expected.items():
        _, found_RV = run(name, draft_RV, whole(target_RV), tail=tail)
        # The stored log-probabilities are float32, and so is the q they are compared with; those of reverse KL are
        # multiplied by log q/p, which is near 50 here.
        error_R = (found_RV.double() * len(p_RV) - grad_RV).norm(dim=1)
        assert (error_R <= 2e-4 * grad_RV.norm(dim=1) + (5e-6 if name == "reverse_kl" else 1e-6)).all(), name


@pytest.mark.parametrize("tail", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_mass_that_rounding_left_outside_a_whole_vocabulary_counts_for_nothing(name: str, tail: str) -> None:
    target_RV, draft_RV = ordinary_rows()
    exact = whole(target_RV)
    rounded = SparseTarget(exact.topk_ids_RK, exact.topk_logprobs_RK, torch.full((6,), 1e-6), exact.tail_ids_RM,
                           exact.tail_logprobs_RM, exact.vocab_size)
    (output, grad_RV), (expected, expected_RV) = (run(name, draft_RV, t, tail=tail) for t in (rounded, exact))
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(grad_RV, expected_RV)
    assert torch.equal(output.alpha_upper_R, output.alpha_lower_R)


@pytest.mark.parametrize("tail", RULES)
def test_identical_rows_accept_everything_and_have_no_divergence(tail: str) -> None:
    target_RV, _ = ordinary_rows()
    for target in (whole(target_RV), sparse(target_RV)):
        output, grad_RV = run("kl", target_RV, target, tail=tail)
        exact = tail != "drop" or target.topk_ids_RK.shape[1] == target.vocab_size
        if exact:
            assert torch.allclose(output.alpha_R, torch.ones(6), atol=1e-5)
            assert output.loss.item() == pytest.approx(0, abs=1e-5)
        if exact and tail != "sampled":
            assert grad_RV.abs().max() < 1e-6
        assert torch.allclose(output.alpha_upper_R, torch.ones(6), atol=1e-5)


@pytest.mark.parametrize("tail", RULES)
def test_disjoint_rows_over_a_large_vocabulary_have_a_live_gradient(tail: str) -> None:
    vocab = 262_144
    # The target gives the draft's tokens even less than the draft gives token 5, so that nearly all of alpha is q_5.
    target_RV, draft_RV = torch.full((2, vocab), -40.0), torch.zeros(2, vocab)
    target_RV[:, 5], draft_RV[:, 7] = 40, 60
    target_RV[1, 100], draft_RV[1, 200_000] = 39, 61
    for name in ("kl", "lk_alpha", "lk_hybrid"):
        output, grad_RV = run(name, draft_RV, sparse(target_RV), tail=tail)
        assert math.isfinite(output.loss.item())
        assert grad_RV.isfinite().all()
        assert (grad_RV[:, 5] < -0.1).all(), "the likely token must be pushed up"
        assert (grad_RV[:, 7] > 0.05).all(), "the mistaken token must be pushed down"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 60), top_k=st.integers(1, 60), scale=st.floats(0, 20),
       noise=st.floats(0, 20), temperature=st.sampled_from([1.0, 0.7, 0.2]))
def test_the_true_acceptance_rate_lies_between_the_bounds(seed: int, vocab: int, top_k: int, scale: float,
                                                          noise: float, temperature: float) -> None:
    target_RV = logits(4, vocab, seed, scale)
    draft_RV = target_RV + logits(4, vocab, seed + 1, noise)
    kept = torch.arange(vocab)[torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) < 0.7]
    for vocabulary in [None, DraftVocabulary.from_ids(kept, vocab)] if len(kept) else [None]:
        draft_RD = draft_RV if vocabulary is None else draft_RV[:, vocabulary.d2t_D]
        alpha_R = exact_terms(draft_RD.double(), target_RV, vocabulary, temperature).alpha_R
        output = tv_loss(draft_RD, sparse(target_RV, top_k), vocabulary=vocabulary, temperature=temperature)
        assert (output.alpha_lower_R <= alpha_R + 1e-5).all()
        assert (alpha_R <= output.alpha_upper_R + 1e-5).all()
        assert (output.alpha_lower_R <= output.alpha_upper_R + 1e-6).all()


def test_no_tail_token_counts_for_more_than_the_smallest_head_entry() -> None:
    target_RV = torch.zeros(1, 100)
    target_RV[0, :10] = 3
    draft_RV = torch.zeros(1, 100)
    draft_RV[0, 99] = 20
    p_RV = target_RV.softmax(1)
    output = tv_loss(draft_RV, sparse(target_RV, top_k=10))
    # All of q is on one token of the tail: the tail's mass is 0.31, but no token of it has more than a head entry.
    assert p_RV[0, 10:].sum() > 0.3
    assert output.alpha_upper.item() == pytest.approx(p_RV[0, 0].item(), rel=1e-4)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(0, 5), vocab=st.integers(2, 50), top_k=st.integers(1, 50),
       samples=st.integers(1, 6), padding=st.integers(0, 3), empty=st.integers(0, 31), size=st.integers(1, 50),
       temperature=st.sampled_from([1.0, 1.0, 0.6]), tail=st.sampled_from(RULES))
def test_any_shape_with_padding_and_rows_without_entries_is_finite_and_right(
        seed: int, rows: int, vocab: int, top_k: int, samples: int, padding: int, empty: int, size: int,
        temperature: float, tail: str) -> None:
    target_RV, draft_RV = logits(rows, vocab, seed), logits(rows, vocab, seed + 1)
    exact, blank = sparse(target_RV, min(top_k, vocab), samples), torch.full((rows, padding), -1)
    dropped_R = torch.tensor([bool(empty >> r & 1) for r in range(rows)], dtype=torch.bool)
    target = SparseTarget(
        *(torch.where(dropped_R[:, None], fill, torch.cat([x_RX, blank.to(x_RX.dtype)], 1))
          for x_RX, fill in ((exact.topk_ids_RK, -1), (exact.topk_logprobs_RK, -math.inf))),
        torch.where(dropped_R, 0.0, exact.tail_mass_R),
        *(torch.where(dropped_R[:, None], fill, torch.cat([blank.to(x_RX.dtype), x_RX], 1))
          for x_RX, fill in ((exact.tail_ids_RM, -1), (exact.tail_logprobs_RM, math.nan))), vocab)
    vocabulary = DraftVocabulary.most_frequent(torch.arange(vocab) % 7, size) if size < vocab else None
    draft_RD = draft_RV if vocabulary is None else draft_RV[:, :size]
    weights_R = torch.where(dropped_R, 0.0, 1.0 + torch.arange(rows))
    kept_R = ~dropped_R
    for name, loss in LOSSES.items():
        output, grad_RD = run(name, draft_RD, target, tail=tail, weights_R=weights_R, vocabulary=vocabulary,
                              temperature=temperature)
        assert output.loss.isfinite()
        assert grad_RD.isfinite().all()
        assert (grad_RD[dropped_R] == 0).all()
        if kept_R.any():
            alone = loss(draft_RD[kept_R], exact[kept_R], tail=tail, weights_R=weights_R[kept_R],
                         vocabulary=vocabulary, temperature=temperature)
            assert output.loss.item() == pytest.approx(alone.loss.item(), rel=1e-4, abs=1e-5)
            assert output.alpha.item() == pytest.approx(alone.alpha.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", ["ordinary_rows", "draft_in_the_tail", "target_in_the_tail"])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "tv"])
def test_tail_samples_are_unbiased_in_value_and_gradient(name: str, case: str) -> None:
    target_RV, draft_RV = (x_RV[:1] for x_RV in CASES[case]())
    draws = 4000
    target = sparse(target_RV.expand(draws, -1), samples=3)
    leaf_RV = draft_RV.expand(draws, -1).clone().requires_grad_()
    output = LOSSES[name](leaf_RV, target)
    (output.loss * draws).backward()
    exact_RV = draft_RV.double().requires_grad_()
    terms = dense_terms(exact_RV, whole(target_RV), "drop")
    expected = combine(name, terms)
    expected.backward()
    assert leaf_RV.grad is not None
    assert exact_RV.grad is not None
    # Five standard errors of the mean over the draws, per coordinate: a false alarm once in 10^6 coordinates.
    error_V = (leaf_RV.grad.double().mean(0) - exact_RV.grad[0]).abs()
    assert (error_V <= 5 * leaf_RV.grad.double().std(0) / math.sqrt(draws) + 1e-6).all()
    spread = output.alpha_R.std().item() / math.sqrt(draws)
    assert abs(output.alpha_R.mean().item() - terms.alpha_R.item()) <= 5 * spread + 1e-6
    if name == "tv":
        assert abs(output.loss.item() - expected.item()) <= 5 * spread + 1e-6


@pytest.mark.parametrize("tail", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name: str, tail: str) -> None:
    target_RV, draft_RV = ordinary_rows()
    target = sparse(target_RV)
    pad_ids, pad_logprobs = torch.full((6, 3), -1), torch.full((6, 3), math.nan)
    padded = SparseTarget(torch.cat([target.topk_ids_RK, pad_ids], 1),
                          torch.cat([target.topk_logprobs_RK, pad_logprobs], 1), target.tail_mass_R,
                          torch.cat([target.tail_ids_RM, pad_ids], 1),
                          torch.cat([target.tail_logprobs_RM, pad_logprobs], 1), target.vocab_size)
    plain, plain_grad_RV = run(name, draft_RV, target, tail=tail)
    output, grad_RV = run(name, draft_RV, padded, tail=tail)
    assert torch.allclose(output.loss, plain.loss, rtol=1e-6)
    assert torch.allclose(grad_RV, plain_grad_RV, atol=1e-8)
    assert torch.allclose(output.alpha_upper_R, plain.alpha_upper_R)


@pytest.mark.parametrize("tail", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_weight_zero_count_for_nothing_whatever_they_hold(name: str, tail: str) -> None:
    target_RV, draft_RV = ordinary_rows()
    target = sparse(target_RV)
    blank = SparseTarget(torch.full((2, 8), -1), torch.full((2, 8), -math.inf), torch.zeros(2),
                         torch.full((2, 4), -1), torch.full((2, 4), -math.inf), target.vocab_size)
    weights_R = torch.tensor([1.0, 2, 3, 4, 5, 6, 0, 0])
    output, grad_RV = run(name, torch.cat([draft_RV, logits(2, 40, 0, 50)]), SparseTarget.cat([target, blank]),
                          tail=tail, weights_R=weights_R)
    kept, kept_grad_RV = run(name, draft_RV, target, tail=tail, weights_R=weights_R[:6])
    assert torch.allclose(output.loss, kept.loss)
    assert torch.allclose(grad_RV[:6], kept_grad_RV)
    assert (grad_RV[6:] == 0).all()
    assert output.alpha.item() == pytest.approx((kept.alpha_R * weights_R[:6]).sum().item() / 21, rel=1e-5)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("tail", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_call_without_weighted_rows_is_zero_with_a_zero_gradient(name: str, tail: str, rows: int) -> None:
    target_RV, draft_RV = (x_RV[:rows] for x_RV in ordinary_rows())
    output, grad_RV = run(name, draft_RV, sparse(target_RV), tail=tail, weights_R=torch.zeros(rows))
    assert output.loss.item() == 0
    assert output.alpha.item() == 0
    assert grad_RV.shape == (rows, 40)
    assert (grad_RV == 0).all()


def test_a_fixed_share_mixes_kl_and_tv() -> None:
    target_RV, draft_RV = ordinary_rows()
    target = sparse(target_RV)
    kl, tv = kl_loss(draft_RV, target), tv_loss(draft_RV, target)
    for share in (0.0, 0.25, 1.0):
        mixed = lk_hybrid_loss(draft_RV, target, kl_share=share)
        assert mixed.loss.item() == pytest.approx(share * kl.loss.item() + (1 - share) * tv.loss.item(), rel=1e-6)


def test_a_lambda_per_token_comes_from_each_rows_own_acceptance() -> None:
    target_RV, draft_RV = ordinary_rows()
    target, weights_R = sparse(target_RV), torch.tensor([1.0, 0, 2, 1, 1, 3])
    leaf_RV = draft_RV.clone().requires_grad_()
    output = lk_hybrid_loss(leaf_RV, target, per_token=True, weights_R=weights_R)
    output.loss.backward()
    exact_RV = draft_RV.double().requires_grad_()
    kl_R, _, alpha_R = dense_terms(exact_RV, target, "sampled")
    share_R = torch.exp(-ETA * alpha_R.detach())
    expected = ((share_R * kl_R + (1 - share_R) * (1 - alpha_R)) * weights_R).sum() / 8
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_close_gradients(leaf_RV.grad, exact_RV.grad)


def test_the_hybrid_takes_one_lambda_from_the_mean_acceptance_of_all_rows() -> None:
    target_RV, draft_RV = ordinary_rows()
    target = sparse(target_RV)
    hybrid, kl, tv = (LOSSES[n](draft_RV, target) for n in ("lk_hybrid", "kl", "tv"))
    share = math.exp(-ETA * hybrid.alpha.item())
    assert hybrid.loss.item() == pytest.approx(share * kl.loss.item() + (1 - share) * tv.loss.item(), rel=1e-6)
    assert lk_hybrid_loss(draft_RV, target, eta=0).loss.item() == pytest.approx(kl.loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_logits_under_autocast_are_computed_in_float32(name: str) -> None:
    target_RV, draft_RV = ordinary_rows()
    target = sparse(target_RV)
    with torch.autocast("cpu", torch.bfloat16):
        output, grad_RV = run(name, draft_RV.bfloat16(), target)
    plain, _ = run(name, draft_RV.bfloat16().float(), target)
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, plain.loss)
    assert grad_RV.dtype == torch.bfloat16


@pytest.mark.parametrize("tail", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits_for_the_device_or_reads_a_value_on_the_host(name: str, tail: str) -> None:
    # Tensors of the device `meta` have no values, so whoever asks for one fails.
    target = sparse(ordinary_rows()[0]).to("meta")
    half = DraftVocabulary.from_ids(torch.arange(20), 40).to("meta")
    weight_DH = torch.zeros(20, 8, device="meta", requires_grad=True)
    for draft in (torch.zeros(6, 20, device="meta", requires_grad=True),
                  FusedLogits(torch.zeros(6, 8, device="meta"), weight_DH, chunk_rows=4)):
        for temperature in (1.0, 0.5):
            LOSSES[name](draft, target, tail=tail, vocabulary=half, temperature=temperature).loss.backward()
    assert weight_DH.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_losses_over_whole_vocabularies_are_those_of_speculators() -> None:
    eager = pytest.importorskip("speculators.losses.eager")
    target_RV, draft_RV = ordinary_rows()
    theirs = {"kl": eager.kl_div_loss, "reverse_kl": eager.reverse_kl_div_loss, "tv": eager.tv_loss,
              "lk_alpha": eager.neg_log_acceptance_loss, "lk_hybrid": eager.lk_hybrid_loss}
    for name, loss in theirs.items():
        # Their lambda is each token's own.
        options = {"per_token": True} if name == "lk_hybrid" else {}
        output, grad_RV = run(name, draft_RV, whole(target_RV), **options)
        leaf_1RV = draft_RV[None].clone().requires_grad_()
        expected = loss(leaf_1RV, target_RV[None]).mean()
        expected.backward()
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5), name
        assert torch.allclose(grad_RV, leaf_1RV.grad[0], atol=1e-6), name


@pytest.mark.parametrize("top_k", [5, 40])
def test_sparse_rows_hold_all_mass_and_sample_only_the_tail(top_k: int) -> None:
    target_RV, _ = ordinary_rows()
    target = sparse(target_RV, top_k, samples=16)
    total_R = target.topk_logprobs_RK.exp().sum(1) + target.tail_mass_R
    assert torch.allclose(total_R, torch.ones(6), atol=1e-6)
    if top_k == 40:
        assert (target.tail_ids_RM == -1).all()
        assert (target.tail_mass_R == 0).all()
    else:
        assert not (target.tail_ids_RM[:, :, None] == target.topk_ids_RK[:, None]).any()
        exact_RM = target_RV.log_softmax(1).gather(1, target.tail_ids_RM)
        assert torch.allclose(target.tail_logprobs_RM, exact_RM, atol=1e-5)


def test_rows_are_sliced_and_joined_without_change() -> None:
    first, second = sparse(logits(4, 40, 0), top_k=8), sparse(logits(3, 40, 1), top_k=5, samples=2)
    joined = SparseTarget.cat([first, second])
    assert len(joined) == 7
    draft_RV = logits(7, 40, 2)
    alone_R = torch.cat([tv_loss(draft_RV[:4], first).alpha_R, tv_loss(draft_RV[4:], second).alpha_R])
    assert torch.allclose(tv_loss(draft_RV, joined).alpha_R, alone_R)
    picked_R = torch.tensor([6, 0, 2])
    assert torch.allclose(tv_loss(draft_RV[picked_R], joined[picked_R]).alpha_R, alone_R[picked_R])
    assert torch.allclose(tv_loss(draft_RV[2:5], joined[2:5]).alpha_R, alone_R[2:5])


def test_wrong_shapes_rules_and_missing_samples_are_refused_with_a_reason() -> None:
    target_RV, draft_RV = ordinary_rows()
    target = sparse(target_RV)
    with pytest.raises(UsageError, match="vocabulary of 40"):
        kl_loss(draft_RV[:, :39], target)
    with pytest.raises(UsageError, match="6 rows"):
        kl_loss(draft_RV[:5], target)
    with pytest.raises(UsageError, match="weights"):
        kl_loss(draft_RV, target, weights_R=torch.ones(5))
    with pytest.raises(UsageError, match="unknown tail rule 'renormalised'"):
        kl_loss(draft_RV, target, tail="renormalised")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no tail samples"):
        tv_loss(draft_RV, sparse(target_RV, samples=0))
    with pytest.raises(UsageError, match=r"target is on cpu .* \.to\(device\)"):
        kl_loss(draft_RV.to("meta"), target, weights_R=torch.ones(6, device="meta"))
    with pytest.raises(UsageError, match="eta"):
        lk_hybrid_loss(draft_RV, target, eta=-1)
    with pytest.raises(UsageError, match="kl_share"):
        lk_hybrid_loss(draft_RV, target, kl_share=1.5)
    with pytest.raises(UsageError, match="one vocabulary"):
        SparseTarget.cat([target, sparse(logits(2, 30, 0))])
    with pytest.raises(UsageError, match="head"):
        SparseTarget(target.topk_ids_RK[:2], target.topk_logprobs_RK, target.tail_mass_R, target.tail_ids_RM,
                     target.tail_logprobs_RM, 40)
