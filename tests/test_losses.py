"""Catches wrong values, wrong gradients and dead or NaN gradients in the losses, against dense float64 oracles.

The oracles are the definitions of arXiv 2602.23881 over the whole vocabulary, differentiated by autograd, plus the
paper's analytic gradients. Shapes: R rows, K head entries, M samples, V vocabulary.
"""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from distill_pipe.consume import LossOutput, SparseTarget, kl_loss, lk_alpha_loss, lk_hybrid_loss, tv_loss
from distill_pipe.errors import UsageError

LOSSES = {"kl": kl_loss, "tv": tv_loss, "lk_alpha": lk_alpha_loss, "lk_hybrid": lk_hybrid_loss}
RULES = ("sampled", "drop", "bucket")
ETA = 3.0


def logits(rows: int, vocab: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def ordinary_rows() -> tuple[Tensor, Tensor]:
    target_RV = logits(6, 40, seed=1)
    return target_RV, target_RV + logits(6, 40, seed=2, scale=1.0)


def disjoint_rows() -> tuple[Tensor, Tensor]:
    target_RV, draft_RV = logits(4, 40, seed=3), logits(4, 40, seed=4)
    target_RV[:, :20] += 25
    draft_RV[:, 20:] += 25
    return target_RV, draft_RV


def saturated_rows() -> tuple[Tensor, Tensor]:
    signs_RV, other_RV = logits(5, 40, seed=5).sign(), logits(5, 40, seed=6).sign()
    jitter_RV = logits(5, 40, seed=7, scale=0.1)
    return 30 * signs_RV + jitter_RV, 30 * other_RV - jitter_RV


def draft_in_the_tail() -> tuple[Tensor, Tensor]:
    target_RV = logits(5, 40, seed=8)
    return target_RV, logits(5, 40, seed=9) - 12 * target_RV


def target_in_the_tail() -> tuple[Tensor, Tensor]:
    return logits(5, 400, seed=10, scale=0.05), logits(5, 400, seed=11, scale=0.5)


CASES = {f.__name__: f for f in (ordinary_rows, disjoint_rows, saturated_rows, draft_in_the_tail, target_in_the_tail)}


def dense_terms(draft_RV: Tensor, target: SparseTarget, tail: str) -> tuple[Tensor, Tensor]:
    """KL and alpha of each row by the definition of each tail rule, over dense float64 distributions."""
    logq_RV = draft_RV.log_softmax(1)
    head_RV = torch.zeros_like(draft_RV).scatter(1, target.topk_ids_RK, target.topk_logprobs_RK.double().exp())
    in_head_RV = torch.zeros_like(draft_RV, dtype=torch.bool).scatter(1, target.topk_ids_RK, True)
    q_RV, mass_R = logq_RV.exp(), target.tail_mass_R.double()
    alpha_R = torch.minimum(head_RV, q_RV)[in_head_RV].reshape(len(target), -1).sum(1)
    safe_RV = torch.where(in_head_RV, head_RV, 1.0)
    kl_R = torch.where(in_head_RV, head_RV * (safe_RV.log() - logq_RV), 0.0).sum(1)
    if tail == "sampled":
        p_RM = target.tail_logprobs_RM.double().exp()
        q_RM = q_RV.gather(1, target.tail_ids_RM)
        weight_R = mass_R / target.tail_ids_RM.shape[1]
        alpha_R = alpha_R + weight_R * torch.minimum(torch.ones_like(p_RM), q_RM / p_RM).sum(1)
        kl_R = kl_R + weight_R * (p_RM.log() - logq_RV.gather(1, target.tail_ids_RM)).sum(1)
    if tail == "bucket":
        # The logsumexp over the tail alone, because 1 - sum(q) is inexact even in float64 on saturated rows.
        log_outside_R = draft_RV.masked_fill(in_head_RV, -math.inf).logsumexp(1) - draft_RV.logsumexp(1)
        alpha_R = alpha_R + torch.minimum(mass_R, log_outside_R.exp())
        kl_R = kl_R + mass_R * (mass_R.log() - log_outside_R)
    return kl_R, alpha_R


def combine(name: str, kl_R: Tensor, alpha_R: Tensor) -> Tensor:
    """The paper's losses from dense KL and alpha."""
    if name == "kl":
        return kl_R.mean()
    if name == "tv":
        return (1 - alpha_R).mean()
    if name == "lk_alpha":
        return -alpha_R.log().mean()
    share = math.exp(-ETA * alpha_R.mean().item())
    return share * kl_R.mean() + (1 - share) * (1 - alpha_R).mean()


def run(name: str, draft_RV: Tensor, target: SparseTarget, **options: object) -> tuple[LossOutput, Tensor]:
    leaf_RV = draft_RV.detach().clone().requires_grad_()
    output = LOSSES[name](leaf_RV, target, **options)
    output.loss.backward()
    assert leaf_RV.grad is not None
    return output, leaf_RV.grad


def sparse(target_RV: Tensor, top_k: int = 8, samples: int = 4, seed: int = 0) -> SparseTarget:
    return SparseTarget.from_logits(target_RV, top_k, samples, torch.Generator().manual_seed(seed))


def whole(target_RV: Tensor) -> SparseTarget:
    return sparse(target_RV, top_k=target_RV.shape[1], samples=0)


def assert_close_gradients(found_RV: Tensor, expected_RV: Tensor) -> None:
    """Row by row, relative to the row's own size, so that a small gradient is checked as hard as a big one."""
    error_R = (found_RV.double() - expected_RV).norm(dim=1)
    assert (error_R <= 2e-4 * expected_RV.norm(dim=1) + 1e-30).all(), error_R / expected_RV.norm(dim=1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tail", RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_dense_definition_of_the_tail_rule(name: str, tail: str, case: str) -> None:
    target_RV, draft_RV = CASES[case]()
    target = sparse(target_RV)
    output, grad_RV = run(name, draft_RV, target, tail=tail)
    exact_RV = draft_RV.double().requires_grad_()
    kl_R, alpha_R = dense_terms(exact_RV, target, tail)
    expected = combine(name, kl_R, alpha_R)
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-6)
    assert torch.allclose(output.alpha_R.double(), alpha_R, rtol=1e-4, atol=1e-30)
    assert_close_gradients(grad_RV, exact_RV.grad)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tail", RULES)
def test_a_head_of_the_whole_vocabulary_gives_the_papers_gradients_under_every_rule(tail: str, case: str) -> None:
    target_RV, draft_RV = CASES[case]()
    p_RV, q_RV = target_RV.double().softmax(1), draft_RV.double().softmax(1)
    alpha_R1 = torch.minimum(p_RV, q_RV).sum(1, keepdim=True)
    sign_RV = (q_RV - p_RV).sign()
    tv_RV = 0.5 * q_RV * (sign_RV - (q_RV * sign_RV).sum(1, keepdim=True))
    expected = {"kl": q_RV - p_RV, "tv": tv_RV, "lk_alpha": tv_RV / alpha_R1}
    share = math.exp(-ETA * alpha_R1.mean().item())
    expected["lk_hybrid"] = share * expected["kl"] + (1 - share) * tv_RV
    for name, grad_RV in expected.items():
        _, found_RV = run(name, draft_RV, whole(target_RV), tail=tail)
        # The stored log-probabilities are float32, and so is the q they are compared with.
        error_R = (found_RV.double() * len(p_RV) - grad_RV).norm(dim=1)
        assert (error_R <= 2e-4 * grad_RV.norm(dim=1) + 1e-6).all(), name


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
       noise=st.floats(0, 20))
def test_the_true_acceptance_rate_lies_between_the_bounds(seed: int, vocab: int, top_k: int, scale: float,
                                                          noise: float) -> None:
    target_RV = logits(4, vocab, seed, scale)
    draft_RV = target_RV + logits(4, vocab, seed + 1, noise)
    alpha_R = torch.minimum(target_RV.double().softmax(1), draft_RV.double().softmax(1)).sum(1)
    output = tv_loss(draft_RV, sparse(target_RV, top_k))
    assert (output.alpha_lower_R <= alpha_R + 1e-5).all()
    assert (alpha_R <= output.alpha_upper_R + 1e-5).all()
    assert (output.alpha_lower_R <= output.alpha_upper_R).all()


@pytest.mark.parametrize("case", ["ordinary_rows", "draft_in_the_tail", "target_in_the_tail"])
@pytest.mark.parametrize("name", ["kl", "tv"])
def test_tail_samples_are_unbiased_in_value_and_gradient(name: str, case: str) -> None:
    target_RV, draft_RV = (x_RV[:1] for x_RV in CASES[case]())
    draws = 4000
    target = sparse(target_RV.expand(draws, -1), samples=3)
    leaf_RV = draft_RV.expand(draws, -1).clone().requires_grad_()
    output = LOSSES[name](leaf_RV, target)
    (output.loss * draws).backward()
    exact_RV = draft_RV.double().requires_grad_()
    kl_R, alpha_R = dense_terms(exact_RV, whole(target_RV), "drop")
    expected = combine(name, kl_R, alpha_R)
    expected.backward()
    assert leaf_RV.grad is not None
    assert exact_RV.grad is not None
    # Five standard errors of the mean over the draws, per coordinate: a false alarm once in 10^6 coordinates.
    error_V = (leaf_RV.grad.double().mean(0) - exact_RV.grad[0]).abs()
    assert (error_V <= 5 * leaf_RV.grad.double().std(0) / math.sqrt(draws) + 1e-6).all()
    spread = output.alpha_R.std().item() / math.sqrt(draws)
    assert abs(output.alpha_R.mean().item() - alpha_R.item()) <= 5 * spread + 1e-6
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
    with pytest.raises(UsageError, match="eta"):
        lk_hybrid_loss(draft_RV, target, eta=-1)
    with pytest.raises(UsageError, match="one vocabulary"):
        SparseTarget.cat([target, sparse(logits(2, 30, 0))])
    with pytest.raises(UsageError, match="head"):
        SparseTarget(target.topk_ids_RK[:2], target.topk_logprobs_RK, target.tail_mass_R, target.tail_ids_RM,
                     target.tail_logprobs_RM, 40)
