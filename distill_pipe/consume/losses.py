"""Losses between draft logits and a sparse target: forward KL, TV, and the LK losses of arXiv 2602.23881.

    alpha = sum_v min(p_v, q_v)        the chance that a drafted token is accepted, and 1 - TV(p, q)

p is the target, q = softmax(draft logits), both over the whole vocabulary. Of p only the head S is stored entry by
entry; its mass outside, P, is known and sampled. Three rules say what stands in for the tail:

| tail      | alpha                                              | KL(p || q)                             |            |
|-----------|----------------------------------------------------|----------------------------------------|------------|
| `sampled` | D + P mean_{x ~ p_tail} min(1, q_x / p_x)          | head + P mean_{x ~ p_tail} log p_x/q_x | unbiased   |
| `drop`    | D = sum_S min(p, q)                                | head = sum_S p log p/q                 | alpha low  |
| `bucket`  | D + min(P, Q), with Q = 1 - sum_S q                | head + P log P/Q                       | alpha high |

Nothing is renormalised: a renormalised head has another optimum than p. A row's sampled alpha may exceed its upper
bound, or 1; clamping it would bias the mean. `-log alpha` of an unbiased alpha is slightly high (Jensen), the other
losses are not.

Everything is float32, also under autocast, and in log space: `log alpha` is a logsumexp of `min(log p, log q)`, so a
row on which p and q hardly overlap has a finite loss and a live gradient. The draft enters through one logsumexp and
K + M gathers. Only `bucket` reads the logits twice: `1 - sum_S q` in float32 knows nothing below 1e-7, while KL and
-log alpha need log Q at any size, so Q is the logsumexp of the logits outside the head. The bounds do without: they
are reported, not optimised, and good to about 1e-6.

Shapes: R rows, K head entries, M tail samples, X entries of any kind, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from distill_pipe.consume.sparse import SparseTarget
from distill_pipe.errors import UsageError

TailRule = Literal["sampled", "drop", "bucket"]

# The log of no probability at all. Finite, so that a row without anything else is a large number and never inf - inf.
_LOG_NOTHING = -1e30


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """A loss, and the acceptance rate it was computed with.

    `loss` is a scalar with a gradient. The rest is detached: `alpha_R` follows the tail rule of the loss, and the true
    acceptance rate of row r lies in `[alpha_lower_R[r], alpha_upper_R[r]]` under every rule, as far as the stored
    log-probabilities are exact. `alpha`, `alpha_lower` and `alpha_upper` are their weighted means, as scalar tensors.
    """

    loss: Tensor
    alpha: Tensor
    alpha_lower: Tensor
    alpha_upper: Tensor
    alpha_R: Tensor
    alpha_lower_R: Tensor
    alpha_upper_R: Tensor


def kl_loss(draft_logits_RV: Tensor, target: SparseTarget, *, tail: TailRule = "sampled",
            weights_R: Tensor | None = None) -> LossOutput:
    """Forward KL(p || q) in nats (arXiv 2602.23881 section 3.1; gradient q - p, eq. 2).

    Args:
        draft_logits_RV: finite logits of any floating type; row r is compared with row r of `target`.
        tail: what stands in for the mass outside the head; see the module.
        weights_R: non-negative row weights, 1 when not given. Rows of weight 0 may hold anything finite.

    Returns:
        The weighted mean over rows, `sum w_r KL_r / sum w_r`; 0 when no row has weight.

    Raises:
        UsageError: the shapes or the vocabularies differ, the tail rule is unknown, or `sampled` is asked of a target
            that holds no tail samples.
    """
    rows, weights_R = _compare(draft_logits_RV, target, tail, weights_R)
    return _output(_mean(rows.kl_R, weights_R), rows, weights_R)


def tv_loss(draft_logits_RV: Tensor, target: SparseTarget, *, tail: TailRule = "sampled",
            weights_R: Tensor | None = None) -> LossOutput:
    """Total variation `TV = 1 - alpha` (arXiv 2602.23881 section 3.1; gradient eq. 3).

    Its gradient vanishes where p and q hardly overlap, so it suits drafts that already accept. Arguments, reduction and
    errors as `kl_loss`.
    """
    rows, weights_R = _compare(draft_logits_RV, target, tail, weights_R)
    return _output(_mean(1 - rows.log_alpha_R.exp(), weights_R), rows, weights_R)


def lk_alpha_loss(draft_logits_RV: Tensor, target: SparseTarget, *, tail: TailRule = "sampled",
                  weights_R: Tensor | None = None) -> LossOutput:
    """Likelihood of acceptance, `-log alpha` in nats (arXiv 2602.23881 section 4.3; gradient eq. 6).

    The log is taken per row, before the mean. Arguments, reduction and errors as `kl_loss`.
    """
    rows, weights_R = _compare(draft_logits_RV, target, tail, weights_R)
    return _output(_mean(-rows.log_alpha_R, weights_R), rows, weights_R)


def lk_hybrid_loss(draft_logits_RV: Tensor, target: SparseTarget, *, tail: TailRule = "sampled", eta: float = 3.0,
                   weights_R: Tensor | None = None) -> LossOutput:
    """`lambda KL + (1 - lambda) TV` with `lambda = exp(-eta sg[alpha])` (arXiv 2602.23881 eq. 4 and 5).

    One lambda for the whole call, from the detached weighted mean of alpha over all rows: call once per draft position
    and batch, as the paper does. eta = 0 is KL. Arguments, reduction and errors as `kl_loss`.

    Raises:
        UsageError: also when eta is negative.
    """
    if eta < 0:
        raise UsageError(f"eta must not be negative, and is {eta}")
    rows, weights_R = _compare(draft_logits_RV, target, tail, weights_R)
    alpha_R = rows.log_alpha_R.exp()
    kl_share = torch.exp(-eta * _mean(alpha_R.detach(), weights_R))
    return _output(_mean(kl_share * rows.kl_R + (1 - kl_share) * (1 - alpha_R), weights_R), rows, weights_R)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The comparison of each row, with gradients except for the bounds."""

    kl_R: Tensor
    log_alpha_R: Tensor
    lower_R: Tensor
    upper_R: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Stored entries and what the draft makes of them. `logp_RX` is 0 where `held_RX` is not set."""

    ids_RX: Tensor
    held_RX: Tensor
    logp_RX: Tensor
    logq_RX: Tensor


def _compare(draft_logits_RV: Tensor, target: SparseTarget, tail: TailRule,
             weights_R: Tensor | None) -> tuple[_Rows, Tensor]:
    _require_fit(draft_logits_RV, target, tail, weights_R)
    if weights_R is None:
        weights_R = torch.ones(len(target), device=draft_logits_RV.device)
    with torch.autocast(draft_logits_RV.device.type, enabled=False):
        logits_RV = draft_logits_RV.float()
        lse_R = logits_RV.logsumexp(1)
        head = _entries(logits_RV, lse_R, target.topk_ids_RK, target.topk_logprobs_RK)
        # A head that holds the whole vocabulary leaves no tail, whatever rounding put into the stored mass.
        tail_mass_R = torch.where(head.held_RX.sum(1) < target.vocab_size, target.tail_mass_R.float(), 0.0)
        shared_RK = _where_held(head, torch.minimum(head.logp_RX, head.logq_RX))
        kl_R = torch.where(head.held_RX, head.logp_RX.exp() * (head.logp_RX - head.logq_RX), 0.0).sum(1)
        if tail == "sampled":
            samples = _entries(logits_RV, lse_R, target.tail_ids_RM, target.tail_logprobs_RM)
            tail_shared_RX, tail_kl_R = _sampled_tail(samples, tail_mass_R)
        elif tail == "bucket":
            tail_shared_RX, tail_kl_R = _bucket_tail(logits_RV, lse_R, head, tail_mass_R)
        else:
            tail_shared_RX, tail_kl_R = shared_RK[:, :0], torch.zeros_like(kl_R)
        log_alpha_R = torch.cat([shared_RK, tail_shared_RX], 1).logsumexp(1)
        lower_R, upper_R = _bounds(head, shared_RK, tail_mass_R)
    return _Rows(kl_R + tail_kl_R, log_alpha_R, lower_R, upper_R), weights_R.float()


def _entries(logits_RV: Tensor, lse_R: Tensor, ids_RX: Tensor, logprobs_RX: Tensor) -> _Entries:
    held_RX = ids_RX >= 0
    logq_RX = logits_RV.gather(1, ids_RX.clamp(min=0)) - lse_R[:, None]
    return _Entries(ids_RX, held_RX, torch.where(held_RX, logprobs_RX.float(), 0.0), logq_RX)


def _where_held(entries: _Entries, values_RX: Tensor) -> Tensor:
    return torch.where(entries.held_RX, values_RX, _LOG_NOTHING)


def _log_mass(mass_R: Tensor) -> Tensor:
    """log of a stored mass; of no mass, what adds nothing to a logsumexp."""
    return torch.where(mass_R > 0, mass_R, 1.0).log() + torch.where(mass_R > 0, 0.0, _LOG_NOTHING)


def _sampled_tail(samples: _Entries, tail_mass_R: Tensor) -> tuple[Tensor, Tensor]:
    """log of `w min(1, q/p)` per sample and `sum w log p/q`, with w = P / count. A row without samples adds nothing."""
    counts_R = samples.held_RX.sum(1).clamp(min=1)
    log_weights_R1 = (_log_mass(tail_mass_R) - counts_R.log())[:, None]
    ratio_RM = samples.logq_RX - samples.logp_RX
    # `minimum`, as for the head: at p = q it passes half a gradient, which is the sign(0) = 0 of eq. 3.
    shared_RM = _where_held(samples, log_weights_R1 + torch.minimum(ratio_RM, torch.zeros_like(ratio_RM)))
    return shared_RM, -torch.where(samples.held_RX, log_weights_R1.exp() * ratio_RM, 0.0).sum(1)


def _bucket_tail(logits_RV: Tensor, lse_R: Tensor, head: _Entries, tail_mass_R: Tensor) -> tuple[Tensor, Tensor]:
    """`log min(P, Q)` and `P log P/Q`, both with a live gradient at any Q."""
    # Padding must not mask token 0, so it points to a token that is masked anyhow.
    ids_RK = torch.where(head.held_RX, head.ids_RX, head.ids_RX[:, :1].clamp(min=0))
    log_outside_R = logits_RV.scatter(1, ids_RK, _LOG_NOTHING).logsumexp(1) - lse_R
    log_mass_R = _log_mass(tail_mass_R)
    return (torch.minimum(log_mass_R, log_outside_R)[:, None],
            torch.where(tail_mass_R > 0, tail_mass_R * (log_mass_R - log_outside_R), 0.0))


@torch.no_grad()
def _bounds(head: _Entries, shared_RK: Tensor, tail_mass_R: Tensor) -> tuple[Tensor, Tensor]:
    lower_R = shared_RK.exp().sum(1)
    outside_R = (1 - _where_held(head, head.logq_RX).exp().sum(1)).clamp(min=0)
    return lower_R, lower_R + torch.minimum(tail_mass_R, outside_R)


def _mean(values_R: Tensor, weights_R: Tensor) -> Tensor:
    total = weights_R.sum()
    kept_R = torch.where(weights_R > 0, values_R, 0.0) * weights_R
    return kept_R.sum() / torch.where(total > 0, total, 1.0)


def _output(loss: Tensor, rows: _Rows, weights_R: Tensor) -> LossOutput:
    alpha_R = rows.log_alpha_R.detach().exp()
    return LossOutput(loss=loss, alpha=_mean(alpha_R, weights_R), alpha_lower=_mean(rows.lower_R, weights_R),
                      alpha_upper=_mean(rows.upper_R, weights_R), alpha_R=alpha_R, alpha_lower_R=rows.lower_R,
                      alpha_upper_R=rows.upper_R)


def _require_fit(draft_logits_RV: Tensor, target: SparseTarget, tail: str, weights_R: Tensor | None) -> None:
    expected = (len(target), target.vocab_size)
    if tuple(draft_logits_RV.shape) != expected:
        raise UsageError(f"draft logits have shape {tuple(draft_logits_RV.shape)}; the target has {expected[0]} rows "
                         f"over a vocabulary of {expected[1]}")
    if weights_R is not None and tuple(weights_R.shape) != expected[:1]:
        raise UsageError(f"weights have shape {tuple(weights_R.shape)}; the target has {expected[0]} rows")
    if tail not in get_args(TailRule):
        raise UsageError(f"unknown tail rule {tail!r}; known are {', '.join(get_args(TailRule))}")
    if tail == "sampled" and target.tail_ids_RM.shape[1] == 0 and target.topk_ids_RK.shape[1] < target.vocab_size:
        raise UsageError("this target holds no tail samples: ask for tail='drop' or tail='bucket'")
