"""Losses over several drafted positions: how long a draft is accepted, end to end.

A position counts only when all before it were accepted, so what a draft of P positions is worth is

    E[accepted] = sum_p prod_{i <= p} alpha_i

`expected_length_loss` optimises just that (Bebop, arXiv 2606.12370 eq. 13): early positions matter most, and late ones
the more the better the early ones are. Where drafts hardly accept its gradient vanishes with the products, so it suits
drafts that were trained with another loss before. `over_positions` is what the LK paper does instead: one loss per
position, weighted by gamma.

Shapes: P positions, R rows, each a chain of P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distill_pipe.consume.comparison import Comparing, DraftLogits, TailRule, Target, compare
from distill_pipe.consume.ranks import sum_over
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError


@dataclass(frozen=True, slots=True, eq=False)
class LengthOutput:
    """A loss, and the number of drafted tokens that are accepted on average (without the target's own next token).

    `loss` is a scalar with a gradient, the rest is detached. The expected length lies between `length_lower` and
    `length_upper`, which follow from the bounds of each alpha. `alpha_P` is the mean acceptance rate of each position.
    """

    loss: Tensor
    length: Tensor
    length_lower: Tensor
    length_upper: Tensor
    alpha_P: Tensor


def expected_length_loss(draft_logits: Sequence[DraftLogits], targets: Sequence[Target], *, tail: TailRule = "sampled",
                         gamma: float = 1.0, weights_PR: Tensor | None = None,
                         vocabulary: DraftVocabulary | None = None, temperature: float = 1.0,
                         group: ProcessGroup | None = None) -> LengthOutput:
    """`1 - mean_p prod_{i <= p} alpha_i`, Bebop's end-to-end loss (arXiv 2606.12370 eq. 13).

    The mean over positions and rows is weighted by `gamma^(p - 1) w_pr` and divided by the sum of these weights; with
    gamma = 1 it is Bebop's. Products of independent unbiased estimates are unbiased, so `sampled` keeps what it
    promises. The other arguments are those of `losses`.

    Args:
        draft_logits, targets: one of each per position, first to last, with the same R rows: row r of position p
            follows row r of position p - 1.
        gamma: how much a position counts beside the one before it.
        weights_PR: row weights by position; 0 where a chain has ended, whose rows may hold anything finite.

    Raises:
        UsageError: the positions do not fit each other, or gamma is not positive.
    """
    weights_PR = _require_chains(draft_logits, targets, gamma, weights_PR)
    how = Comparing(tail, vocabulary, temperature)
    rows = [compare(draft, target, how, weights_R)
            for draft, target, weights_R in zip(draft_logits, targets, weights_PR, strict=True)]
    log_alpha_PR = torch.where(weights_PR > 0, torch.stack([r.log_alpha_R for r in rows]), 0.0)
    # Sums of logs, because the gradient of a product with a zero in it takes a division by it.
    reached_PR = log_alpha_PR.cumsum(0).exp()
    lower_PR, upper_PR = (torch.where(weights_PR > 0, torch.stack(bounds), 1.0).cumprod(0)
                          for bounds in ([r.lower_R for r in rows], [r.upper_R for r in rows]))
    weights_PR = weights_PR.to(reached_PR.dtype)
    faded_PR = weights_PR * gamma ** torch.arange(len(rows), device=weights_PR.device)[:, None]
    whole_R, kept_PR = weights_PR[0], (weights_PR > 0).to(weights_PR.dtype)
    # Pairs of a sum and what it is divided by.
    lost = (faded_PR * (1 - reached_PR)).sum(), faded_PR.sum()
    lengths = [((kept_PR * chain_PR).sum(0) @ whole_R, whole_R.sum())
               for chain_PR in (reached_PR.detach(), lower_PR, upper_PR)]
    alphas = zip((weights_PR * log_alpha_PR.detach().exp()).sum(1), weights_PR.sum(1), strict=True)
    sums_N2 = sum_over(torch.stack([torch.stack(pair) for pair in (lost, *lengths, *alphas)]), group)
    means_N = sums_N2[:, 0] / torch.where(sums_N2[:, 1] > 0, sums_N2[:, 1], 1.0).detach()
    length, lower, upper = means_N[1:4].detach()
    return LengthOutput(loss=means_N[0], length=length, length_lower=lower, length_upper=upper,
                        alpha_P=means_N[4:].detach())


def over_positions(losses: Sequence[Tensor], gamma: float = 0.8) -> Tensor:
    """`sum_p gamma^(p - 1) loss_p` (arXiv 2602.23881 section 5.3, gamma = 0.8; the sum is not normalised)."""
    return torch.stack([gamma**p * loss for p, loss in enumerate(losses)]).sum()


def _require_chains(draft_logits: Sequence[DraftLogits], targets: Sequence[Target], gamma: float,
                    weights_PR: Tensor | None) -> Tensor:
    if not draft_logits or len(draft_logits) != len(targets) or len({len(t) for t in targets}) != 1:
        raise UsageError(f"expected_length_loss needs a target with the same rows for each of its {len(draft_logits)} "
                         "positions, and at least one position")
    if gamma <= 0:
        raise UsageError(f"gamma must be positive, and is {gamma}")
    shape = len(targets), len(targets[0])
    if weights_PR is None:
        return torch.ones(shape, device=draft_logits[0].device)
    if tuple(weights_PR.shape) != shape:
        raise UsageError(f"weights have shape {tuple(weights_PR.shape)}; there are {shape[0]} positions of {shape[1]} "
                         "rows")
    return weights_PR.float()
