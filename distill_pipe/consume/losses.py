"""Losses between a draft and a target: KL both ways, TV, and the LK losses of arXiv 2602.23881.

    alpha = sum_v min(p_v, q_v)        the chance that a drafted token is accepted, and 1 - TV(p, q)

Here are the means over rows; `comparison` says what a row is and what stands in for the part of p that is not stored
(`tail`). All losses take the same arguments:

    draft_logits_RV: finite logits of any floating type, or `FusedLogits`; row r is compared with row r of `target`.
    tail: "sampled", "drop" or "bucket" for a SparseTarget, "exact" for an ExactTarget.
    weights_R: non-negative row weights, 1 when not given. Rows of weight 0 may hold anything finite.
    vocabulary: the draft's, where it is smaller than the target's; the logits are then [R, D] in its order.
    temperature: at which the target is run and the draft is sampled. From stored rows at most 1, and then alpha is
        nearly unbiased only, because its normaliser is estimated; bounds are certain. arXiv 2602.23881 trains at 1.
    group: data-parallel ranks whose rows make one batch; see `ranks`.

A loss is `sum w_r loss_r / sum w_r` in float32 (float64 for float64 logits), over the rows of all ranks; 0 when no row
has weight. `UsageError` says which arguments do not fit each other.

Of an unbiased alpha, `-log alpha` is slightly high (Jensen); the other losses are as unbiased as their tail rule.

Shapes: R rows, V vocabulary (D with a draft vocabulary), N losses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distill_pipe.consume.comparison import Comparing, DraftLogits, TailRule, Target, compare
from distill_pipe.consume.entries import Rows
from distill_pipe.consume.ranks import sum_over
from distill_pipe.consume.vocabulary import DraftVocabulary
from distill_pipe.errors import UsageError

__all__ = ["LossOutput", "TailRule", "kl_loss", "lk_alpha_loss", "lk_hybrid_loss", "reverse_kl_loss", "tv_loss"]


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """A loss, and the acceptance rate it was computed with.

    `loss` is a scalar with a gradient. The rest is detached: `alpha_R` follows the tail rule of the loss, and the true
    acceptance rate of row r lies in `[alpha_lower_R[r], alpha_upper_R[r]]` under every rule, whatever its tail is and
    however its numbers were rounded: see `bounds`. `alpha`, `alpha_lower` and `alpha_upper` are their weighted means,
    as scalar tensors. With a group, the scalars are those of all ranks and the rows are this rank's.
    """

    loss: Tensor
    alpha: Tensor
    alpha_lower: Tensor
    alpha_upper: Tensor
    alpha_R: Tensor
    alpha_lower_R: Tensor
    alpha_upper_R: Tensor


def kl_loss(draft_logits_RV: DraftLogits, target: Target, *, tail: TailRule = "sampled",
            weights_R: Tensor | None = None, vocabulary: DraftVocabulary | None = None, temperature: float = 1.0,
            group: ProcessGroup | None = None) -> LossOutput:
    """Forward KL(p || q) in nats (arXiv 2602.23881 section 3.1; gradient q - p, eq. 2). Arguments as in the module."""
    weights_R = _weights(draft_logits_RV, weights_R)
    rows = compare(draft_logits_RV, target, Comparing(tail, vocabulary, temperature), weights_R)
    return _output(_means([rows.kl_R], rows, weights_R, group), rows)


def reverse_kl_loss(draft_logits_RV: DraftLogits, target: Target, *, tail: TailRule = "sampled",
                    weights_R: Tensor | None = None, vocabulary: DraftVocabulary | None = None,
                    temperature: float = 1.0, group: ProcessGroup | None = None) -> LossOutput:
    """Reverse KL(q || p) in nats (arXiv 2602.23881 section 3.1). Arguments as in the module.

    `sampled` is unbiased, but a sample's term grows with q/p: where the draft puts mass on what the target finds
    unlikely, few samples see it and those are large. `bucket` is a lower bound of the loss, and calmer.
    """
    weights_R = _weights(draft_logits_RV, weights_R)
    rows = compare(draft_logits_RV, target, Comparing(tail, vocabulary, temperature), weights_R)
    return _output(_means([rows.reverse_kl_R], rows, weights_R, group), rows)


def tv_loss(draft_logits_RV: DraftLogits, target: Target, *, tail: TailRule = "sampled",
            weights_R: Tensor | None = None, vocabulary: DraftVocabulary | None = None, temperature: float = 1.0,
            group: ProcessGroup | None = None) -> LossOutput:
    """Total variation `TV = 1 - alpha` (arXiv 2602.23881 section 3.1; gradient eq. 3). Arguments as in the module.

    Its gradient vanishes where p and q hardly overlap, so it suits drafts that already accept.
    """
    weights_R = _weights(draft_logits_RV, weights_R)
    rows = compare(draft_logits_RV, target, Comparing(tail, vocabulary, temperature), weights_R)
    return _output(_means([_tv(rows)], rows, weights_R, group), rows)


def lk_alpha_loss(draft_logits_RV: DraftLogits, target: Target, *, tail: TailRule = "sampled",
                  weights_R: Tensor | None = None, vocabulary: DraftVocabulary | None = None,
                  temperature: float = 1.0, group: ProcessGroup | None = None) -> LossOutput:
    """Likelihood of acceptance, `-log alpha` in nats (arXiv 2602.23881 section 4.3; gradient eq. 6).

    The log is taken per row, before the mean. A row that can accept nothing at all, because all that is known of its
    target lies outside the draft's vocabulary, adds 0. Arguments as in the module.
    """
    weights_R = _weights(draft_logits_RV, weights_R)
    rows = compare(draft_logits_RV, target, Comparing(tail, vocabulary, temperature), weights_R)
    loss_R = torch.where(rows.usable_R, -rows.log_alpha_R, 0.0)
    return _output(_means([loss_R], rows, weights_R, group), rows)


def lk_hybrid_loss(  # noqa: PLR0913 - the settings of the paper and of its variants, each by name
        draft_logits_RV: DraftLogits, target: Target, *, tail: TailRule = "sampled", eta: float = 3.0,
        kl_share: float | None = None, per_token: bool = False, weights_R: Tensor | None = None,
        vocabulary: DraftVocabulary | None = None, temperature: float = 1.0,
        group: ProcessGroup | None = None) -> LossOutput:
    """`lambda KL + (1 - lambda) TV` with `lambda = exp(-eta sg[alpha])` (arXiv 2602.23881 eq. 4 and 5).

    One lambda for the whole call, from the detached weighted mean of alpha over all rows: call once per draft position
    and batch, as the paper does. Arguments as in the module, and:

    Args:
        eta: how soon the loss turns to TV as alpha rises; 0 is KL.
        kl_share: a fixed lambda in its place.
        per_token: each row's lambda from its own alpha. Not the paper's loss, but that of several trainers: rows that
            are easy get TV and rows that are hard get KL inside one batch.

    Raises:
        UsageError: also when eta is negative, or the share is not in [0, 1].
    """
    if eta < 0:
        raise UsageError(f"eta must not be negative, and is {eta}")
    if kl_share is not None and not 0 <= kl_share <= 1:
        raise UsageError(f"kl_share must be from 0 to 1, and is {kl_share}")
    weights_R = _weights(draft_logits_RV, weights_R)
    rows = compare(draft_logits_RV, target, Comparing(tail, vocabulary, temperature), weights_R)
    tv_R = _tv(rows)
    if per_token and kl_share is None:
        share_R = torch.exp(-eta * (1 - tv_R.detach()))
        return _output(_means([share_R * rows.kl_R + (1 - share_R) * tv_R], rows, weights_R, group), rows)
    kl, tv, *alphas = _means([rows.kl_R, tv_R], rows, weights_R, group)
    share = torch.exp(-eta * alphas[0].detach()) if kl_share is None else kl_share
    return _output([share * kl + (1 - share) * tv, *alphas], rows)


def _tv(rows: Rows) -> Tensor:
    return 1 - rows.log_alpha_R.exp()


def _weights(draft: DraftLogits, weights_R: Tensor | None) -> Tensor:
    return torch.ones(draft.shape[0], device=draft.device) if weights_R is None else weights_R.float()


def _means(losses: list[Tensor], rows: Rows, weights_R: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """The weighted means of the losses, then of alpha and its bounds, over the rows of all ranks."""
    values_NR = torch.stack([*losses, rows.log_alpha_R.detach().exp(), rows.lower_R, rows.upper_R])
    weights_R = weights_R.to(values_NR.dtype)
    kept_NR = torch.where(weights_R > 0, values_NR, 0.0) * weights_R
    sums = sum_over(torch.cat([kept_NR.sum(1), weights_R.sum()[None]]), group)
    return list((sums[:-1] / torch.where(sums[-1] > 0, sums[-1], 1.0).detach()).unbind())


def _output(means: list[Tensor], rows: Rows) -> LossOutput:
    loss, alpha, lower, upper = means
    return LossOutput(loss=loss, alpha=alpha.detach(), alpha_lower=lower.detach(), alpha_upper=upper.detach(),
                      alpha_R=rows.log_alpha_R.detach().exp(), alpha_lower_R=rows.lower_R, alpha_upper_R=rows.upper_R)
