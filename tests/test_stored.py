"""Catches a temperature that is applied to one side only, or to a row that cannot give it.

Shapes: R rows, V vocabulary.
"""

import math

import pytest
import torch
from dense_losses import combine, dense_terms, exact_terms, logits, ordinary_rows, sparse, whole

from distill_pipe.consume import kl_loss, lk_alpha_loss, lk_hybrid_loss, reverse_kl_loss, tv_loss
from distill_pipe.errors import UsageError

LOSSES = {"kl": kl_loss, "reverse_kl": reverse_kl_loss, "tv": tv_loss, "lk_alpha": lk_alpha_loss,
          "lk_hybrid": lk_hybrid_loss}


@pytest.mark.parametrize("temperature", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("tail", ["sampled", "drop", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_the_dense_definition(name: str, tail: str, temperature: float) -> None:
    target_RV, draft_RV = ordinary_rows()
    target = sparse(target_RV, samples=6)
    leaf_RV = draft_RV.clone().requires_grad_()
    output = LOSSES[name](leaf_RV, target, tail=tail, temperature=temperature)
    output.loss.backward()
    exact_RV = draft_RV.double().requires_grad_()
    expected = combine(name, dense_terms(exact_RV, target, tail, temperature=temperature))
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert torch.allclose(leaf_RV.grad.double(), exact_RV.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_whole_head_gives_the_exact_loss_at_any_temperature(name: str) -> None:
    target_RV, draft_RV = ordinary_rows()
    for temperature in (1.0, 0.7, 0.3):
        expected = combine(name, exact_terms(draft_RV.double(), target_RV, temperature=temperature))
        output = LOSSES[name](draft_RV, whole(target_RV), tail="drop", temperature=temperature)
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert torch.allclose(output.alpha_lower_R, output.alpha_upper_R, atol=1e-6)


def test_the_tempered_acceptance_rate_is_nearly_unbiased() -> None:
    target_RV, draft_RV = logits(1, 400, 10, scale=0.5), logits(1, 400, 11, scale=0.7)
    draws = 2000
    output = tv_loss(draft_RV.expand(draws, -1), sparse(target_RV.expand(draws, -1), samples=8), temperature=0.7)
    alpha = exact_terms(draft_RV.double(), target_RV, temperature=0.7).alpha_R.item()
    spread = output.alpha_R.std().item() / math.sqrt(draws)
    assert abs(output.alpha.item() - alpha) <= 5 * spread + 0.01
    assert output.alpha_lower.item() < alpha < output.alpha_upper.item()


def test_at_a_low_temperature_acceptance_is_whether_the_likeliest_tokens_agree() -> None:
    target_RV, draft_RV = ordinary_rows()
    output = tv_loss(draft_RV, sparse(target_RV), temperature=1e-3)
    assert torch.equal(output.alpha_R.round(), (target_RV.argmax(1) == draft_RV.argmax(1)).float())


def test_temperatures_that_a_row_cannot_give_are_refused_with_the_reason() -> None:
    target_RV, draft_RV = ordinary_rows()
    with pytest.raises(UsageError, match="the tail grows"):
        tv_loss(draft_RV, sparse(target_RV), temperature=1.2)
    with pytest.raises(UsageError, match="above 0"):
        tv_loss(draft_RV, sparse(target_RV), temperature=0)
    with pytest.raises(UsageError, match="no tail samples"):
        tv_loss(draft_RV, sparse(target_RV, samples=0), tail="bucket", temperature=0.8)
