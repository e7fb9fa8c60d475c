"""The loss of a batch over all draft positions: sum_k gamma^k loss_k / sum_k gamma^k, with k from 0.

gamma = 0.8 and one loss per position are the paper's (arXiv 2602.23881 section 5.3); that the weights are normalised is
ours, so that the size of the loss does not depend on the number of positions. The adaptive lambda of the hybrid is one
number per position, over all rows of the batch and, in a distributed training, of all ranks.

Shapes: T tokens, K positions, R rows, A anchors, D draft vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta, Struct
from torch import Tensor
from torch.distributed import ProcessGroup

from distill_pipe.consume.comparison import TailRule, Target
from distill_pipe.consume.drafts.draft import Draft, drafted_rows
from distill_pipe.consume.exact import ExactTarget
from distill_pipe.consume.losses import (
    LossOutput,
    kl_loss,
    lk_alpha_loss,
    lk_hybrid_loss,
    reverse_kl_loss,
    tv_loss,
)
from distill_pipe.consume.positions import expected_length_loss, over_positions
from distill_pipe.consume.reader import Batch

LossName = Literal["kl", "reverse-kl", "tv", "lk-alpha", "lk-hybrid", "expected-length"]
# The paper's: heads that learn slowly should move on to TV sooner.
ETA, ETA_BY_ARCH = 3.0, {"medusa": 10.0}


class Objective(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which loss, and its settings. `eta` and `kl_share` are those of `lk-hybrid`: with `kl_share` lambda is fixed."""

    loss: LossName = "lk-hybrid"
    tail: TailRule = "sampled"
    eta: Annotated[float, Meta(ge=0)] | None = None
    kl_share: Annotated[float, Meta(ge=0, le=1)] | None = None
    gamma: Annotated[float, Meta(gt=0, le=1)] = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class BatchLoss:
    """`loss` has a gradient; the acceptance rates by position, and the rows of the first one, have none."""

    loss: Tensor
    alphas: tuple[float, ...]
    rows: int


RowsOf = Callable[[Batch, Tensor], Target]


def stored_rows(batch: Batch, row_R: Tensor) -> Target:
    """Rows of the target as they are stored."""
    return batch.target[row_R]


def exact_rows(norm: Callable[[Tensor], Tensor], lm_head_VH: Tensor, last_layer: int) -> RowsOf:
    """Rows of the target computed from its last hidden state, which the batch must hold."""
    def rows_of(batch: Batch, row_R: Tensor) -> Target:
        return ExactTarget(batch.hidden[last_layer][batch.rows_R[row_R]], lm_head_VH, norm)
    return rows_of


def batch_loss(draft: Draft, batch: Batch, objective: Objective, rows_of: RowsOf = stored_rows,
               group: ProcessGroup | None = None) -> BatchLoss:
    """Run the draft over a batch, teacher-forced, and compare every position with its rows.

    With a group, the loss is that of the rows of all ranks: see `ranks`.

    Raises:
        UsageError: the tail rule needs what the dataset does not hold.
    """
    states = draft(batch)
    if objective.loss == "expected-length":
        return _chain_loss(draft, states, batch, objective, rows_of, group)
    pairs = [drafted_rows(batch, k) for k in range(len(states))]
    outputs = [_position_loss(draft, draft.logits(states[k][index_R], k), rows_of(batch, row_R), objective, group)
               for k, (index_R, row_R) in enumerate(pairs)]
    weight = sum(objective.gamma ** k for k in range(len(outputs)))
    loss = over_positions([out.loss for out in outputs], objective.gamma) / weight
    return BatchLoss(loss, tuple(out.alpha.item() for out in outputs), len(pairs[0][1]))


def _position_loss(draft: Draft, logits_RD: Tensor, target: Target, objective: Objective,
                   group: ProcessGroup | None) -> LossOutput:
    if objective.loss == "lk-hybrid":
        eta = ETA_BY_ARCH.get(draft.arch, ETA) if objective.eta is None else objective.eta
        return lk_hybrid_loss(logits_RD, target, tail=objective.tail, eta=eta, kl_share=objective.kl_share,
                              vocabulary=draft.vocabulary, group=group)
    simple = {"kl": kl_loss, "reverse-kl": reverse_kl_loss, "tv": tv_loss, "lk-alpha": lk_alpha_loss}
    return simple[objective.loss](logits_RD, target, tail=objective.tail, vocabulary=draft.vocabulary, group=group)


def _chain_loss(draft: Draft, states: Sequence[Tensor], batch: Batch, objective: Objective, rows_of: RowsOf,
                group: ProcessGroup | None) -> BatchLoss:
    """The loss of whole chains. A chain ends where the next row is not supervised or the trace is over."""
    anchors_A, _ = drafted_rows(batch)
    row_T = torch.full((len(batch.token_ids_T) + len(states) + 1,), -1, device=anchors_A.device)
    row_T[batch.rows_R] = torch.arange(len(batch.rows_R), device=anchors_A.device)
    ends_T = torch.nn.functional.pad(batch.position_ids_T, (0, len(states) + 1))
    rows_KA, held_KA = [], []
    for k in range(len(states)):
        at_A = anchors_A + 1 + k
        rows_KA.append(row_T[at_A])
        held_KA.append((row_T[at_A] >= 0) & (ends_T[at_A] > k))
    weights_KA = torch.stack(held_KA).long().cumprod(0).float()
    out = expected_length_loss([draft.logits(s[anchors_A], k) for k, s in enumerate(states)],
                               [rows_of(batch, rows_A.clamp(min=0)) for rows_A in rows_KA], tail=objective.tail,
                               gamma=objective.gamma, weights_PR=weights_KA, vocabulary=draft.vocabulary, group=group)
    return BatchLoss(out.loss, tuple(out.alpha_P.tolist()), len(anchors_A))
