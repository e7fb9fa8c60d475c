"""Catches a chain of positions that is multiplied, weighted or ended wrongly.

Shapes: P positions, R rows, V vocabulary.
"""

import math

import pytest
import torch
from dense_losses import dense_terms, exact_terms, logits, sparse, whole
from torch import Tensor

from distill_pipe.consume import SparseTarget, expected_length_loss, over_positions, tv_loss
from distill_pipe.errors import UsageError


def chains(positions: int = 3, rows: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    targets = [logits(rows, 40, seed=p) for p in range(positions)]
    return targets, [t + logits(rows, 40, seed=10 + p, scale=1.0) for p, t in enumerate(targets)]


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("tail", ["sampled", "drop", "bucket"])
def test_value_and_gradient_equal_the_dense_definition(tail: str, gamma: float) -> None:
    targets, drafts = chains()
    held = [sparse(t, seed=p) for p, t in enumerate(targets)]
    leaves = [d.clone().requires_grad_() for d in drafts]
    output = expected_length_loss(leaves, held, tail=tail, gamma=gamma)
    output.loss.backward()
    exact = [d.double().requires_grad_() for d in drafts]
    alpha_PR = torch.stack([dense_terms(d, t, tail).alpha_R for d, t in zip(exact, held, strict=True)])
    weights_P = torch.tensor([gamma**p for p in range(3)]).double()
    expected = 1 - (weights_P @ alpha_PR.cumprod(0)).mean() / weights_P.sum()
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.length.item() == pytest.approx(alpha_PR.cumprod(0).sum(0).mean().item(), rel=1e-5)
    assert torch.allclose(output.alpha_P.double(), alpha_PR.mean(1), rtol=1e-5)
    for leaf, reference in zip(leaves, exact, strict=True):
        assert torch.allclose(leaf.grad.double(), reference.grad, rtol=1e-3, atol=1e-7)


def test_the_expected_length_lies_between_its_bounds() -> None:
    targets, drafts = chains()
    alpha_PR = torch.stack([exact_terms(d.double(), t).alpha_R for d, t in zip(drafts, targets, strict=True)])
    output = expected_length_loss(drafts, [sparse(t) for t in targets])
    assert output.length_lower.item() < alpha_PR.cumprod(0).sum(0).mean().item() < output.length_upper.item()


def test_the_product_of_sampled_acceptance_rates_is_unbiased() -> None:
    targets, drafts = chains(positions=3, rows=1)
    draws = 4000
    held = [sparse(t.expand(draws, -1), samples=2, seed=p) for p, t in enumerate(targets)]
    output = expected_length_loss([d.expand(draws, -1) for d in drafts], held)
    exact = [exact_terms(d.double(), t).alpha_R for d, t in zip(drafts, targets, strict=True)]
    alpha_PR = torch.stack([tv_loss(d.expand(draws, -1), t).alpha_R for d, t in zip(drafts, held, strict=True)])
    spread = alpha_PR.cumprod(0).mean(0).std().item() / math.sqrt(draws)
    assert abs(1 - output.loss.item() - torch.stack(exact).cumprod(0).mean().item()) <= 5 * spread + 1e-6


def test_a_chain_that_has_ended_counts_only_as_far_as_it_goes() -> None:
    targets, drafts = chains()
    held = [whole(t) for t in targets]
    blank = SparseTarget(torch.full((1, 40), -1), torch.full((1, 40), math.nan), torch.zeros(1),
                         torch.full((1, 0), -1), torch.zeros(1, 0), 40)
    ended = [held[0], *(SparseTarget.cat([t[:4], blank]) for t in held[1:])]
    weights_PR = torch.ones(3, 5)
    weights_PR[1:, 4] = 0
    leaves = [d.clone().requires_grad_() for d in drafts]
    output = expected_length_loss(leaves, ended, weights_PR=weights_PR)
    output.loss.backward()
    alpha_PR = torch.stack([exact_terms(d.double(), t).alpha_R for d, t in zip(drafts, targets, strict=True)])
    kept = alpha_PR.cumprod(0)[weights_PR > 0]
    assert output.loss.item() == pytest.approx(1 - kept.mean().item(), rel=1e-5)
    assert output.length.item() == pytest.approx(kept.sum().item() / 5, rel=1e-5)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[1].grad[4] == 0).all()


def test_without_any_weight_the_loss_is_zero_with_a_zero_gradient() -> None:
    targets, drafts = chains()
    leaves = [d.clone().requires_grad_() for d in drafts]
    output = expected_length_loss(leaves, [sparse(t) for t in targets], weights_PR=torch.zeros(3, 5))
    output.loss.backward()
    assert output.loss.item() == 0
    assert all((leaf.grad == 0).all() for leaf in leaves)


def test_losses_of_positions_are_weighted_by_powers_of_gamma() -> None:
    assert over_positions([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]).item() == pytest.approx(4.52)


def test_positions_that_do_not_fit_are_refused() -> None:
    targets, drafts = chains()
    held = [sparse(t) for t in targets]
    with pytest.raises(UsageError, match="at least one position"):
        expected_length_loss([], [])
    with pytest.raises(UsageError, match="the same rows"):
        expected_length_loss(drafts, [*held[:2], held[2][:4]])
    with pytest.raises(UsageError, match="gamma"):
        expected_length_loss(drafts, held, gamma=0)
    with pytest.raises(UsageError, match="weights"):
        expected_length_loss(drafts, held, weights_PR=torch.ones(5, 3))
